"""Held-out loss that the choices of recipes/medquad.yaml and the compute paths come to, one table a call.

    python bench/quality.py choices --data train.jsonl.gz --valid valid.jsonl.gz [--steps 200] [--jobs 1]
    python bench/quality.py paths   --data train.jsonl.gz --valid valid.jsonl.gz --steps 300 --seeds 1 2 3
    python bench/quality.py time    --data train.jsonl.gz --valid valid.jsonl.gz --rows 200

`choices` sets the recipe beside itself with one choice changed. `paths` sets TRL's padded micro-batches beside
packed rows and, on a GPU, beside packed rows with FP8 products, which should come to the same. `time` lets the
original script train its 100 steps on a CPU through TRL, PEFT and bitsandbytes, at TRL's rate for LoRA, and then
the recipe for as many steps as the same seconds allow, at the pace of its first five. Every run trains the
same rows in the same order from its seed, in a process of its own, and reads the completion loss on the same
held-out rows, spread evenly over the file.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cpu_training import original

ORIGINAL = [
    "lora.r=64", "lora.lora_alpha=16", "lora.lora_dropout=0.1", "lora.target_modules=[q_proj,v_proj]",
    "lora.use_rslora=false", "training.learning_rate=2e-5", "training.lr_scheduler_type=linear",
    "training.warmup_steps=0", "prompt.loss_on=all", "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
]  # fmt: skip
TABLES: dict[str, dict[str, list[str]]] = {
    "choices": {
        "the recipe": [],
        "learning_rate 5e-4": ["training.learning_rate=5e-4"],
        "learning_rate 1e-3": ["training.learning_rate=1e-3"],
        "learning_rate 4e-3": ["training.learning_rate=4e-3"],
        "constant schedule": ["training.lr_scheduler_type=constant_with_warmup"],
        "linear schedule": ["training.lr_scheduler_type=linear"],
        "q and v only": ["lora.target_modules=[q_proj,v_proj]"],
        "lora_alpha / r": ["lora.use_rslora=false"],
        "r 64": ["lora.r=64"],
        "loss on all": ["prompt.loss_on=all"],
        "padded micro-batches": ["training.engine=plain"],
        "original settings": ORIGINAL,
    },
    "paths": {
        "padded": ["training.engine=plain"],
        "packed": [],
        "packed, FP8": ["training.fp8=true"],
    },
    "time": {"the original script": ORIGINAL, "the recipe": []},
}
PACE = 5  # steps


def measure(overrides: list[str], seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Held-out completion loss before and after the steps, and how long those took."""
    from medlora.data.build import build
    from medlora.evaluate.loss import held_out_loss
    from medlora.model.adapter import add_lora
    from medlora.model.load import load_model
    from medlora.recipe import load_recipe
    from medlora.train.run import prepare
    from medlora.train.trainer import choose_engine, make_trainer, running

    warm_up = min(10, arguments.steps // 4)
    common = [f"data.path={arguments.data}", f"data.valid_path={arguments.valid}", f"training.seed={seed}"]
    common += [f"training.max_steps={arguments.steps}", f"training.warmup_steps={warm_up}"]
    recipe = load_recipe("medquad", [*common, f"data.max_length={arguments.max_length}", *overrides])
    run = prepare(recipe)
    completions = recipe.model_copy(update={"prompt": recipe.prompt.model_copy(update={"loss_on": "completion"})})
    held = run.corpus.valid if completions == recipe else build(completions, run.tokenizer).valid
    held = held[:: max(1, len(held) // arguments.rows)][: arguments.rows]
    model = add_lora(load_model(run.base, recipe.base), recipe.lora, seed)
    paces = arguments.table == "time" and arguments.steps == PACE  # and is not scored
    before = float("nan") if paces else held_out_loss(model, held).loss
    with TemporaryDirectory() as folder:
        if arguments.table == "time" and overrides == ORIGINAL:
            trainer = original(run, arguments.steps, Path(folder), learning_rate=recipe.training.learning_rate)
        else:
            engine = choose_engine(model.train(), recipe, run.corpus.train)
            trainer = make_trainer(recipe, model, run.tokenizer, run.corpus.train, engine, Path(folder), [])
        began = time.perf_counter()
        with running(trainer):
            trainer.train()
        seconds = time.perf_counter() - began
        model = trainer.model
    after = float("nan") if paces else held_out_loss(model, held).loss
    return {"before": before, "after": after, "seconds": round(seconds, 1), "rows": len(held), "steps": arguments.steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1000, help="held-out rows at most")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; their times then say nothing")
    parser.add_argument("--only", action="append", help="lines of the table, by name")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    table = TABLES[arguments.table]
    if arguments.run:
        from medlora.privacy import quiet

        quiet(compiler=True)
        print(json.dumps(measure(table[arguments.run], arguments.seeds[0], arguments)))
        return
    wanted = [(name, seed) for name in arguments.only or table for seed in arguments.seeds]
    print(f"{'':24}{'seed':>5}{'steps':>6}{'before':>9}{'after':>9}{'change':>9}{'seconds':>9}")
    if arguments.table == "time":
        original_run, first_steps = report("the original script", 42, 100), report("the recipe", 42, PACE)
        if not (original_run and first_steps):
            sys.exit(1)
        report("the recipe", 42, int(original_run["seconds"] / first_steps["seconds"] * PACE))
        return
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in pool.map(lambda pair: report(*pair), wanted):
            pass


def report(name: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Run one line in a process of its own, and print it."""
    command = [sys.executable, *sys.argv, "--run", name, "--seeds", str(seed)]
    command += ["--steps", str(steps)] if steps else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{name:24}{seed:5}  exit status {done.returncode}", flush=True)
        return {}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name:24}{seed:5}{found['steps']:6}{found['before']:9.4f}{found['after']:9.4f}"
        f"{found['after'] - found['before']:+9.4f}{found['seconds']:9.1f}", flush=True,
    )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
