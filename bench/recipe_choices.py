"""What each choice of recipes/medquad.yaml is worth: the recipe beside itself with one choice changed.

    python bench/recipe_choices.py --data train.jsonl.gz --valid valid.jsonl.gz [--steps 24] [--rows 60] [--only NAME]

Every line trains the same rows in the same order from the same seed and reads the completion loss on the same
held-out rows, spread evenly over the file. Times include nothing but optimizer steps; runs that share the
machine with others give losses, not speeds.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ORIGINAL = [
    "lora.r=64", "lora.lora_alpha=16", "lora.lora_dropout=0.1", "lora.target_modules=[q_proj,v_proj]",
    "lora.use_rslora=false", "training.learning_rate=2e-5", "training.lr_scheduler_type=linear",
    "training.warmup_steps=0", "prompt.loss_on=all", "training.per_device_train_batch_size=4",
]  # fmt: skip
CHOICES = {
    "the recipe": [],
    "learning_rate 5e-4": ["training.learning_rate=5e-4"],
    "learning_rate 1e-3": ["training.learning_rate=1e-3"],
    "learning_rate 4e-3": ["training.learning_rate=4e-3"],
    "constant schedule": ["training.lr_scheduler_type=constant_with_warmup"],
    "q and v only": ["lora.target_modules=[q_proj,v_proj]"],
    "lora_alpha / r": ["lora.use_rslora=false"],
    "r 64": ["lora.r=64"],
    "loss on all": ["prompt.loss_on=all"],
    "original settings": ORIGINAL,
}


def measure(overrides: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Held-out completion loss after the steps, and the training's tokens a second."""
    import torch

    from medlora.data.build import build
    from medlora.evaluate.loss import held_out_loss
    from medlora.model.adapter import add_lora
    from medlora.model.load import load_model
    from medlora.recipe import load_recipe
    from medlora.train.run import prepare
    from medlora.train.trainer import choose_engine, make_trainer, running

    common = [f"data.path={arguments.data}", f"data.valid_path={arguments.valid}"]
    common += [
        f"training.max_steps={arguments.steps}",
        "training.logging_steps=1",
        f"data.max_length={arguments.max_length}",
    ]
    recipe = load_recipe("medquad", [*common, f"training.warmup_steps={min(10, arguments.steps // 4)}", *overrides])
    run = prepare(recipe)
    completions = recipe.model_copy(update={"prompt": recipe.prompt.model_copy(update={"loss_on": "completion"})})
    held = build(completions, run.tokenizer).valid
    held = held[:: max(1, len(held) // arguments.rows)][: arguments.rows]
    model = add_lora(load_model(run.base, recipe.base), recipe.lora, recipe.training.seed).train()
    with TemporaryDirectory() as folder:
        engine = choose_engine(model, recipe)
        trainer = make_trainer(recipe, model, run.tokenizer, run.corpus.train, engine, Path(folder), [])
        if not overrides:
            print(json.dumps({"choice": "untuned", "loss": held_out_loss(model, held).loss}), flush=True)
            torch.manual_seed(recipe.training.seed)
        model.train()
        began = time.perf_counter()
        with running(trainer):
            trainer.train()
        seconds = time.perf_counter() - began
    return {"loss": held_out_loss(model, held).loss, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--only", choices=CHOICES, action="append")
    arguments = parser.parse_args()
    from medlora.privacy import quiet

    quiet()
    for name in arguments.only or CHOICES:
        print(json.dumps({"choice": name, **measure(CHOICES[name], arguments)}), flush=True)


if __name__ == "__main__":
    main()
