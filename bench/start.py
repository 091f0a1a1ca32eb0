"""From the command to the first optimizer step: medlora beside TRL + PEFT + bitsandbytes, in one call.

    python bench/start.py [--model FOLDER] [--repeats 3] [--out result.json]

Each start is a process of its own and trains one step of the original script's recipe (LoRA r 64 on q and v, dropout
0.1, batch 2, accumulation 2) on the embedded data, over the embedded base or that of --model. Shown are the seconds
since the process was started until all is imported, until the base is on its device in NF4, and until the step is done.
medlora's first start finds no quantised base; the others do and, on a GPU, read it while they import.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

STAGES = ("imported", "loaded", "first step")


def ours(model: str, folder: Path, _: str) -> list[float]:
    import click
    from cpu_training import SETTINGS

    from medlora.cli.imports import importing
    from medlora.privacy import quiet
    from medlora.recipe import load_recipe

    quiet(offline=True)
    more = [f"base.model={model}", "prompt.template=llama2", "training.max_steps=1"]
    recipe = load_recipe("demo", [*SETTINGS, *more])
    with click.Context(click.Command("train")).scope(cleanup=False), importing(recipe.base):
        from medlora.train import run
    stages = [time.time()]

    prepared = run.prepare(recipe)
    rows = prepared.corpus.train
    base = run.load_model(prepared.base, recipe.base)
    stages.append(now())
    tuned = run.add_lora(base, recipe.lora, recipe.training.seed).train()
    engine = run.choose_engine(tuned, recipe, rows)
    trainer = run.make_trainer(recipe, tuned, prepared.tokenizer, rows, engine, folder, [])
    with run.running(trainer):
        trainer.train()
    return [*stages, now()]


def theirs(model: str, folder: Path, dtype: str) -> list[float]:
    """Without a word of medlora, whose imports would count."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    stages = [time.time()]
    on_gpu, kind = torch.cuda.is_available(), getattr(torch, dtype)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=kind)
    base = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=kind, device_map={"": 0 if on_gpu else "cpu"}
    )
    base.config.use_cache = False
    stages.append(now())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    data = Path(__file__).parent.parent / "src/medlora/data/terms/medical_terms.jsonl"
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
            gradient_checkpointing=True, use_cpu=not on_gpu, bf16=dtype == "bfloat16", report_to=[],
            save_strategy="no", disable_tqdm=True, max_length=1024,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.1),
    ).train()  # fmt: skip
    return [*stages, now()]


SIDES = {"medlora": ours, "trl": theirs}


def now() -> float:
    """The time when the device is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def started(side: str, model: str, dtype: str, home: str) -> list[float]:
    """Seconds until each of STAGES."""
    command = [sys.executable, __file__, "--side", side, "--model", model, "--dtype", dtype]
    began = time.time()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"MEDLORA_HOME": home, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{side}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return [stage - began for stage in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded", help="a base's folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        with TemporaryDirectory() as folder:
            print(json.dumps(SIDES[arguments.side](arguments.model, Path(folder), arguments.dtype)))
        return

    from medlora import assets
    from medlora.model.base import resolve
    from medlora.model.load import compute_dtype, device
    from medlora.recipe import Base

    base = Base(model=arguments.model)
    path, dtype = resolve(base).path, str(compute_dtype(base, device())).removeprefix("torch.")
    with TemporaryDirectory() as home:
        for kept in ("models", "downloads"):  # the embedded base itself is no matter of a start
            (Path(home) / kept).symlink_to(assets.home() / kept)
        found = {
            side: [started(side, arguments.model if side == "medlora" else path, dtype, home)
                   for _ in range(arguments.repeats)]
            for side in SIDES
        }  # fmt: skip
    print(f"{'seconds until':18}" + "".join(f"{stage:>12}" for stage in STAGES))
    for side, starts in found.items():
        for number, stages in enumerate(starts, 1):
            print(f"{side} {number:<{17 - len(side)}}" + "".join(f"{seconds:12.1f}" for seconds in stages))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
