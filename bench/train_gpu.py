"""Training on a GPU: medlora beside TRL, TRL with Liger kernels, and Unsloth where it is installed, in one call.

    python bench/train_gpu.py --data train.jsonl.gz --tokenizer FOLDER [--shape NAME] [--out result.json]
    python bench/train_gpu.py --data train.jsonl.gz --model FOLDER ...
    python bench/train_gpu.py ... --memory      the memory plan's predictions beside measured peaks
    python bench/train_gpu.py ... --card 8      as if the card had 8 GiB, and peers as for L
    python bench/train_gpu.py ... --gpus 2      each step shared among so many, by TRL's sides as torchrun has it
    python bench/train_gpu.py --tiny            a rehearsal on a CPU; also with --memory or --gpus

Without --model the base has Llama-2-7B's exact shape, or that of --shape, and random weights (`bases.py`). All
sides take an NF4 base and LoRA r 64 in bfloat16 and the same rows in the same order; each runs in a process of
its own, one after the other, and all its settings there. `--data` holds a question and an answer a line.

    A  8 rows of 2048 tokens, text run together, all linear modules, no dropout
    P  the same text by medlora's packing: whole documents, so many a step that few have more tokens than A's,
       attention inside each; peers, whose packing without a flash-attention package mixes them, train A's rows
    F  as A, the frozen products in FP8 (medlora alone)
    B  as A, activations recomputed
    L  as A, in as little memory as 14,000 tokens/s allow
    C  batch 2, accumulation 2, questions with their answers, dropout 0.1, q and v
    D  the same, all linear modules
    Q  as C, in as little memory as 8,000 tokens/s allow

Reported are medians over synchronised optimizer steps, the first third left out, of real (not padding)
tokens a second and seconds, then tokens a second of all steps, compilation and capture among them, with the
peak of allocated memory, and of what torch had reserved for it, the mean power of those steps by the GPU's own
counter of energy, and the mean loss; in --out also each step, and how often torch had to give memory back to go on.
C, D and Q train the original script's 100 steps, whatever `--steps` says: whether medlora replays them as CUDA
graphs hangs on how many there are.
"""

import argparse
import gc
import gzip
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bases import add_shape, build_base

from medlora.errors import ModelError

SIDES = ("medlora", "trl", "liger", "unsloth")
NEEDS = {"liger": "liger_kernel", "unsloth": "unsloth"}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL = 2048
SCRIPT = 100  # steps of the original script
MEETINGS = count()
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    batch: int
    accumulation: int = 1
    targets: tuple[str, ...] = tuple(ALL)
    dropout: float = 0.0
    recompute: bool = False
    full_rows: bool = False
    """Every row of exactly `FULL` tokens, text run together."""
    documents: bool = False
    """medlora packs documents instead."""
    fp8: bool = False
    memory: float | None = None
    """GiB that medlora plans for; peers then recompute, and all take double quantisation and 8-bit moments."""


SETTINGS = {
    "A": Setting(batch=8, full_rows=True),
    "P": Setting(batch=8, full_rows=True, documents=True),
    "F": Setting(batch=8, full_rows=True, fp8=True),
    "B": Setting(batch=8, full_rows=True, recompute=True),
    "L": Setting(batch=8, full_rows=True, memory=8.5),
    "C": Setting(batch=2, accumulation=2, dropout=0.1, targets=("q_proj", "v_proj")),
    "D": Setting(batch=2, accumulation=2, dropout=0.1),
    "Q": Setting(batch=2, accumulation=2, dropout=0.1, targets=("q_proj", "v_proj"), memory=4.4),
}
# (rows, recompute, keep, optimizer) of setting A whose peaks --memory measures
PLANS: tuple[tuple[int, Any, bool, Any], ...] = (
    (1, "none", True, "adamw_torch_fused"), (1, "none", False, "adamw_torch_fused"),
    (1, "selective", False, "adamw_torch_fused"), (1, "full", False, "adamw_torch_fused"),
    (1, "offload", False, "adamw_torch_fused"), (2, "none", False, "adamw_torch_fused"),
    (2, "selective", True, "adamw_torch_fused"), (2, "offload", False, "adamw_8bit"),
    (4, "full", False, "adamw_8bit"), (8, "none", False, "paged_adamw_8bit"),
)  # fmt: skip


def texts(data: Path | None) -> Iterator[str]:
    if data is None:
        yield from (f"What is case {i}? " + "It is a disease of the blood. " * (3 + 7 * i % 40) for i in range(400))
        return
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield f"{record['question']}\n{record['answer']}"


def examples(setting: Setting, data: Path | None, tokenizer: Any, wanted: int, full: int) -> list[Any]:
    """Rows whose every token but the first is trained."""
    from medlora.data.prompts import IGNORE, Example

    rows: list[list[int]] = []
    held: list[int] = []
    for text in texts(data):
        ids = [*tokenizer(text).input_ids[: full // 2], tokenizer.eos_token_id]
        if not setting.full_rows:
            rows.append(ids)
        else:
            held += ids
            while len(held) >= full:
                rows.append(held[:full])
                held = held[full:]
        if len(rows) >= wanted:
            break
    return [Example("", ids, [IGNORE, *ids[1:]]) for ids in rows[:wanted]]


def packed(setting: Setting, data: Path | None, tokenizer: Any, full: int, steps: int) -> Setting:
    """Of whole documents, so many a step that their average is 0.85 of the setting's tokens."""
    setting = replace(setting, full_rows=False)
    some = examples(setting, data, tokenizer, 5 * setting.batch * steps, full)
    each = statistics.mean(len(row.input_ids) for row in some)
    return replace(setting, batch=round(0.85 * setting.batch * full / each))


def our_recipe(setting: Setting, rows: list[Any], steps: int, *more: str) -> Any:
    from medlora.recipe import load_recipe

    return load_recipe("demo", [
        f"lora.target_modules={json.dumps(list(setting.targets))}", "lora.r=64", "lora.lora_alpha=16",
        f"lora.lora_dropout={setting.dropout}", f"data.max_length={max(len(row.input_ids) for row in rows)}",
        f"training.per_device_train_batch_size={setting.batch}", f"training.max_steps={steps}",
        f"training.gradient_accumulation_steps={setting.accumulation}", "training.warmup_steps=0",
        f"training.gradient_checkpointing={'true' if setting.recompute else 'auto'}", "training.logging_steps=1",
        f"training.fp8={str(setting.fp8).lower()}", "training.learning_rate=1e-4",
        f"training.max_memory={setting.memory or 'null'}", f"base.double_quant={str(bool(setting.memory)).lower()}",
        f"training.optim={'auto' if setting.memory else 'adamw_torch_fused'}", *more,
    ])  # fmt: skip


def our_engine(model: Any, recipe: Any, rows: list[Any], gpus: int) -> Any:
    """The engine; on a CPU that of a GPU, so that a rehearsal runs what is measured."""
    from medlora.model.plan import Shape, Work, plans
    from medlora.train.trainer import Engine, choose_engine

    if torch.cuda.is_available():
        return choose_engine(model, recipe, rows, gpus)
    found = plans(Shape.of(model.config), Work.of(recipe, rows, gpus))
    return Engine(True, "a rehearsal", tuple(found), recipe.training.fp8, 10**12)


def ours(
    model: Any, tokenizer: Any, rows: list[Any], setting: Setting, steps: int, folder: Path, team: Any = None
) -> Any:
    from medlora.model.adapter import add_lora
    from medlora.train.trainer import make_trainer

    recipe = our_recipe(setting, rows, steps)
    model = add_lora(model, recipe.lora, 42).train()
    engine = our_engine(model, recipe, rows, team.size if team else 1)
    print(engine.why, engine.plan.describe(engine.capacity) if engine.plan else "", file=sys.stderr)
    return make_trainer(recipe, model, tokenizer, rows, engine, folder, [], team)


def theirs(
    model: Any, tokenizer: Any, rows: list[Any], setting: Setting, steps: int, folder: Path, side: str, gpus: int
) -> Any:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from medlora.data.build import to_dataset

    recompute = setting.recompute or setting.memory is not None
    lora = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=setting.dropout, target_modules=list(setting.targets),
        use_rslora=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    arguments = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=setting.batch // gpus, max_steps=steps,
        gradient_accumulation_steps=setting.accumulation, gradient_checkpointing=recompute and side != "unsloth",
        gradient_checkpointing_kwargs={"use_reentrant": False}, learning_rate=1e-4, logging_steps=1, seed=42,
        bf16=True, use_cpu=not torch.cuda.is_available(), use_liger_kernel=side == "liger", report_to=[],
        disable_tqdm=True, save_strategy="no", max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        optim="adamw_8bit" if setting.memory else "adamw_torch_fused", lr_scheduler_type="cosine",
    )  # fmt: skip
    tokenizer.pad_token = tokenizer.eos_token
    if side == "unsloth":
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(
            model, r=64, lora_alpha=16, lora_dropout=setting.dropout, target_modules=list(setting.targets),
            use_rslora=True, use_gradient_checkpointing="unsloth" if recompute else False, random_state=42,
        )  # fmt: skip
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=to_dataset(rows),
        processing_class=tokenizer,
        peft_config=None if side == "unsloth" else lora,
    )


class Clock:
    """Seconds, real tokens and joules of each optimizer step, the device idle at both ends."""

    def __init__(self, trainer: Any, profile: bool) -> None:
        from transformers import TrainerCallback

        from medlora.train import energy

        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.joules: list[float] = []
        used = energy.gpu() if torch.cuda.is_available() else None
        clock, step = self, trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            clock.tokens[-1] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            return step(model, inputs, *rest, **named)

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                clock.tokens.append(0)
                if profile and state.global_step == state.max_steps - 1:
                    clock.profiler.start()
                synchronize()
                clock.before, clock.began = used() if used else 0.0, time.perf_counter()

            def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                synchronize()
                clock.seconds.append(time.perf_counter() - clock.began)
                clock.joules.append(used() - clock.before if used else 0.0)
                if profile and state.global_step == state.max_steps:
                    clock.profiler.stop()
                    table = clock.profiler.key_averages().table("self_device_time_total", 28, max_name_column_width=70)
                    print(table, file=sys.stderr)

        trainer.training_step = counted
        trainer.add_callback(Callback())
        if profile:
            self.profiler = torch.profiler.profile()


def peak(*, reserved: bool = False) -> int:
    """Bytes given out, without what CUDA graphs hold between captures, or `reserved` with that and with what lies
    unused; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()


def fresh() -> None:
    gc.collect()  # trainers hold themselves, and with them adapters and moments
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()


def small_card(size: float) -> float:
    """Hold torch to `size` GiB, as if no more were free; what of that medlora plans for."""
    from medlora.model.plan import capacity_of
    from medlora.recipe import Recipe

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(size * GIB / torch.cuda.get_device_properties(0).total_memory)
    return capacity_of(Recipe(), int(size * GIB)) / GIB


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(side: str, setting: Setting, model: Any, tokenizer: Any, arguments: Any) -> dict[str, Any]:
    """Train, and take the adapter off again."""
    from contextlib import nullcontext

    from medlora.train.trainer import running

    full = 64 if arguments.tiny else FULL
    steps = arguments.steps if setting.full_rows or arguments.tiny else SCRIPT
    warm_up = steps // 3
    if setting.documents and side == "medlora":
        setting = packed(setting, arguments.data, tokenizer, full, steps)
    wanted = setting.batch * setting.accumulation * steps
    rows = examples(setting, arguments.data, tokenizer, wanted, full)
    fresh()
    with TemporaryDirectory() as folder:
        common = (model, tokenizer, rows, setting, steps, Path(folder))
        team = team_of(arguments) if side == "medlora" and arguments.gpus > 1 else None
        trainer = ours(*common, team) if side == "medlora" else theirs(*common, side, arguments.gpus)
        clock = Clock(trainer, arguments.profile)
        with team.group() if team else nullcontext(), running(trainer) if side == "medlora" else nullcontext():
            trainer.train()
    if side != "medlora" and arguments.gpus > 1:  # each saw its own rows
        every = torch.tensor(clock.tokens, device=trainer.args.device)
        torch.distributed.all_reduce(every)
        clock.tokens = every.tolist()
    if side != "unsloth":
        model.gradient_checkpointing_disable()
        trainer.model.unload()
        model.requires_grad_(False)
    rates = [count / seconds for count, seconds in zip(clock.tokens, clock.seconds, strict=True)][warm_up:]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "all_steps": sum(clock.tokens) / sum(clock.seconds),
        "step_seconds": statistics.median(clock.seconds[warm_up:]),
        "step_tokens": statistics.median(clock.tokens[warm_up:]),
        "peak_gib": peak() / GIB,
        "reserved_gib": peak(reserved=True) / GIB,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"] if torch.cuda.is_available() else 0,
        "watts": sum(clock.joules[warm_up:]) / sum(clock.seconds[warm_up:]),
        "loss": statistics.mean(losses),
        "steps": list(zip(clock.tokens, clock.seconds, strict=True)),
    }


def team_of(arguments: Any) -> Any:
    from medlora.train.parallel import Team

    return Team(arguments.rank, arguments.gpus, arguments.meeting / str(next(MEETINGS)))


def measure_memory(model: Any, tokenizer: Any, arguments: Any) -> dict[str, Any]:
    """Two steps of setting A by each of PLANS; {what: predicted and measured GiB}."""
    from medlora.model.adapter import add_lora
    from medlora.model.plan import Shape, Work, predict
    from medlora.train.trainer import Engine, make_trainer, running

    setting, full = SETTINGS["A"], 64 if arguments.tiny else FULL
    rows = examples(setting, arguments.data, tokenizer, 2 * setting.batch, full)
    found: dict[str, Any] = {}
    for cut, recompute, keep, optim in PLANS:
        fresh()
        optim = optim if torch.cuda.is_available() else "adamw_torch_fused"
        recipe = our_recipe(setting, rows, 2, f"training.optim={optim}")
        adapted = add_lora(model, recipe.lora, 42).train()
        plan = predict(Shape.of(model.config), Work.of(recipe, rows), cut, recompute, keep, optim)
        began = time.perf_counter()
        with TemporaryDirectory() as folder:
            trainer = make_trainer(recipe, adapted, tokenizer, rows, Engine(True, "", (plan,)), Path(folder), [])
            with running(trainer):
                trainer.train()
        adapted.unload()
        model.requires_grad_(False)
        key = f"{cut} rows, {recompute}, {'kept' if keep else 'not kept'}, {optim}"
        found[key] = {"predicted": plan.peak_bytes / GIB, "measured": peak() / GIB}
        print(key, found[key], f"{time.perf_counter() - began:.1f} s", file=sys.stderr)
        del trainer, adapted
    return found


def load(side: str, path: Path, *, double: bool) -> Any:
    from medlora.model.base import resolve
    from medlora.model.load import load_model
    from medlora.recipe import Base

    if side == "unsloth":
        from unsloth import FastLanguageModel

        return FastLanguageModel.from_pretrained(
            str(path), max_seq_length=FULL, dtype=torch.bfloat16, load_in_4bit=True
        )[0]
    base = Base(model=str(path), double_quant=double)
    return load_model(resolve(base), base)


def run_side(arguments: Any) -> dict[str, Any]:
    """All settings of one side in this process; a setting that fails is reported and left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    results: dict[str, Any] = {}
    model, loaded = None, None
    memory = small_card(arguments.card) if arguments.card else None
    for name in arguments.settings:
        setting = replace(SETTINGS[name], memory=memory) if arguments.card else SETTINGS[name]
        if setting.fp8 and arguments.side != "medlora":
            continue
        double = setting.memory is not None
        if loaded is None or loaded != double or arguments.side == "unsloth":
            model = None
            fresh()
            began = time.perf_counter()
            model, loaded = load(arguments.side, arguments.model, double=double), double
            synchronize()
            host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"loaded in {time.perf_counter() - began:.1f} s, host peak {host:.1f} GiB", file=sys.stderr)
        if arguments.memory:
            return measure_memory(model, tokenizer, arguments)
        try:
            results[name] = measure(arguments.side, setting, model, tokenizer, arguments)
        except (torch.OutOfMemoryError, ModelError):
            results[name] = {"error": "out of memory"}
        print(name, {what: found for what, found in results[name].items() if what != "steps"}, file=sys.stderr)
    return results


def take_place(side: str) -> int:
    """This process's rank, on a GPU of its own. Transformers follows torchrun's variables; medlora has its own way."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if side == "medlora":
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[rank]
    elif torch.cuda.is_available():
        torch.cuda.set_device(rank)
    return rank


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="jsonl.gz with question and answer")
    parser.add_argument("--model", type=Path, help="a base's folder, tokenizer included")
    parser.add_argument("--tokenizer", type=Path, help="where no --model is given")
    add_shape(parser)
    parser.add_argument("--settings", default="APFBLCDQ")
    parser.add_argument("--memory", action="store_true", help="predicted and measured peaks of setting A")
    parser.add_argument("--card", type=float, help="GiB: as if the card had no more")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", action="store_true", help="print the kernels of the last step")
    parser.add_argument("--gpus", type=int, default=1, help="that share each step")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        from medlora.privacy import quiet

        quiet(compiler=True)
        arguments.rank = take_place(arguments.side)
        if arguments.side == "unsloth":
            import unsloth  # noqa: F401  before transformers, which it rewrites
        found = run_side(arguments)
        if arguments.rank == 0:
            print(json.dumps(found))
        return
    with TemporaryDirectory(dir=_fast_folder()) as folder:
        if not arguments.model:
            build_base(Path(folder), arguments.shape, arguments.tokenizer, tiny=arguments.tiny)
        sides = [side for side in arguments.sides.split(",") if side not in NEEDS or find_spec(NEEDS[side])]
        sides = ["medlora"] if arguments.memory else sides
        found = {side: _run(side, arguments.model or Path(folder), arguments) for side in sides}
    report_memory(found["medlora"]) if arguments.memory else report(found)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def _fast_folder() -> str | None:
    """Where 14 GB are soonest written and read again."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 32e9 else None


def report(found: dict[str, dict[str, Any]]) -> None:
    columns = f"{'tokens/s':>10}{'all steps':>11}{'s/step':>9}{'tokens/step':>13}{'GiB':>7}{'reserved':>10}"
    print(f"{'':3}{'side':10}{columns}{'W':>6}{'loss':>9}")
    for name in SETTINGS:
        for side, results in found.items():
            row = results.get(name)
            if row and "error" in row:
                print(f"{name:3}{side:10}{row['error']:>20}")
            elif row:
                print(f"{name:3}{side:10}{row['tokens_per_second']:10.0f}{row['all_steps']:11.0f}"
                      f"{row['step_seconds']:9.4f}{row['step_tokens']:13.0f}{row['peak_gib']:7.1f}"
                      f"{row['reserved_gib']:10.1f}{row['watts']:6.0f}{row['loss']:9.4f}")  # fmt: skip


def report_memory(found: dict[str, Any]) -> None:
    print(f"{'setting A by':48}{'predicted':>11}{'measured':>10}{'off by':>8}")
    for what, row in found.items():
        if "error" in row:
            print(f"{what:48}{row['error']:>21}")
            continue
        off = f"{row['predicted'] / row['measured'] - 1:8.1%}" if row["measured"] else "  no GPU"
        print(f"{what:48}{row['predicted']:11.2f}{row['measured']:10.2f}{off}")


def _run(side: str, model: Path, arguments: Any) -> dict[str, Any]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(arguments.gpus)] if arguments.gpus > 1 else []
    command = [sys.executable, *torchrun, __file__, "--side", side, "--model", str(model)]
    command += ["--settings", arguments.settings, "--gpus", str(arguments.gpus)]
    flags = {"--tiny": arguments.tiny, "--profile": arguments.profile, "--memory": arguments.memory}
    command += ["--steps", str(arguments.steps), *(["--data", str(arguments.data)] if arguments.data else [])]
    command += [flag for flag, on in flags.items() if on]
    command += ["--card", str(arguments.card)] if arguments.card else []
    with TemporaryDirectory() as meeting:
        done = subprocess.run([*command, "--meeting", meeting], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {name: {"error": f"exit status {done.returncode}"} for name in arguments.settings}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
