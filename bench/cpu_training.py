"""Training on a CPU: medlora beside the original script's TRL + PEFT + bitsandbytes path, in one call.

    python bench/cpu_training.py [--steps 12] [--threads 2] [--out result.json]

Both train the embedded base on the embedded data with the original script's settings (LoRA r 64 on q and v, alpha 16,
dropout 0.1, batch 2, accumulation 2), the same rows in the same order from the same seed. Each runs in a process of
its own, one after the other, in bfloat16 where the CPU has it and else in float32. Tokens are real ones, without
padding; the first three steps are left out of the times. Losses are printed side by side: they must be equal to about
a percent, since dropout draws differ.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WARM_UP = 3
SETTINGS = ["prompt.loss_on=all", "lora.r=64", "lora.lora_alpha=16", "lora.lora_dropout=0.1", "data.max_length=1024",
            "lora.use_rslora=false",
            "lora.target_modules=[q_proj,v_proj]", "training.learning_rate=5e-5", "training.lr_scheduler_type=linear",
            "training.warmup_steps=0", "training.per_device_train_batch_size=2", "training.logging_steps=1",
            "training.gradient_accumulation_steps=2"]  # fmt: skip


def prepared(steps: int) -> Any:
    from medlora.recipe import load_recipe
    from medlora.train.run import prepare

    return prepare(load_recipe("demo", [*SETTINGS, f"training.max_steps={steps}"]))


def ours(run: Any, steps: int, folder: Path) -> Any:
    from medlora.model.adapter import add_lora
    from medlora.model.load import load_model
    from medlora.train.trainer import choose_engine, make_trainer

    model = add_lora(load_model(run.base, run.recipe.base), run.recipe.lora, run.recipe.training.seed)
    model.train()
    return make_trainer(
        run.recipe,
        model,
        run.tokenizer,
        run.corpus.train,
        choose_engine(model, run.recipe, run.corpus.train),
        folder,
        [],
    )


def original(run: Any, steps: int, folder: Path, learning_rate: float = 5e-5) -> Any:
    """The script's trainer over the rows of a prepared run, the model loaded as it loads it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from medlora.model.load import compute_dtype

    dtype = compute_dtype(run.recipe.base, torch.device("cpu"))  # bfloat16 is slow where the CPU lacks it
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        run.base.path, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    model.config.use_cache = False
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps,
            learning_rate=learning_rate, lr_scheduler_type="linear", gradient_checkpointing=True, logging_steps=1,
            seed=42, use_cpu=True, bf16=dtype == torch.bfloat16, report_to=[], save_strategy="no", disable_tqdm=True,
            max_length=1024,
        ),
        train_dataset=Dataset.from_dict({"text": [run.tokenizer.decode(e.input_ids) for e in run.corpus.train]}),
        processing_class=run.tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.1),
    )  # fmt: skip


def measure(side: str, steps: int) -> dict[str, Any]:
    """Train and time each optimizer step: losses, real tokens and seconds a step."""
    from transformers import TrainerCallback

    from medlora.train.trainer import running

    tokens, seconds = [0], [time.perf_counter()]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter())
            tokens.append(0)

    with TemporaryDirectory() as folder:
        trainer = {"medlora": ours, "original": original}[side](prepared(steps), steps, Path(folder))
        trainer.add_callback(Clock())
        step = trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens[-1] += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            return step(model, inputs, *rest, **named)

        trainer.training_step = counted
        with running(trainer):
            seconds[0] = time.perf_counter()
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    times = [b - a for a, b in pairwise(seconds)]
    return {"losses": losses, "tokens": tokens[:-1], "seconds": times}


def speed(result: dict[str, Any]) -> float:
    """Median over steps of real tokens a second, warm-up left out."""
    pairs = list(zip(result["tokens"], result["seconds"], strict=True))[WARM_UP:]
    return statistics.median(count / seconds for count, seconds in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["medlora", "original"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        from medlora.privacy import quiet

        quiet(compiler=True)
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(arguments.side, arguments.steps)))
        return
    found = {side: _run(side, arguments) for side in ("original", "medlora")}
    print("step   original    medlora   difference")
    for i, (a, b) in enumerate(zip(found["original"]["losses"], found["medlora"]["losses"], strict=True), 1):
        print(f"{i:4d} {a:10.4f} {b:10.4f} {b / a - 1:11.2%}")
    rates = {side: speed(result) for side, result in found.items()}
    print(f"tokens/s: original {rates['original']:.0f}, medlora {rates['medlora']:.0f}, "
          f"{rates['medlora'] / rates['original']:.1f} times as fast")  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(found | {"tokens_per_second": rates}, indent=2) + "\n")


def _run(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--steps", str(arguments.steps)]
    command += ["--threads", str(arguments.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
