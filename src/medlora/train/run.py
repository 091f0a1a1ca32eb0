"""A run from recipe to saved adapter. Everything that can be refused is refused before the model loads."""

import math
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from medlora.data.build import Corpus, build
from medlora.data.prompts import Tokenizer, prepare_tokenizer
from medlora.errors import RecipeError, RunError
from medlora.evaluate.loss import HeldOut, held_out_loss
from medlora.generate.answer import Assistant
from medlora.generate.sampling import Sampling
from medlora.model.adapter import add_lora, save_adapter
from medlora.model.base import Resolved, load_config, load_tokenizer, resolve
from medlora.model.load import load_model
from medlora.progress import bar
from medlora.recipe import Recipe, load_recipe
from medlora.train import manifest as manifests
from medlora.train.callbacks import Interrupt, Validation, Watch, tensorboard
from medlora.train.energy import Meter
from medlora.train.parallel import Team, beside, enough
from medlora.train.trainer import PackedTrainer, choose_engine, make_trainer, running, takes_whole_steps

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that has passed every check that needs no weights."""

    recipe: Recipe
    base: Resolved
    tokenizer: Tokenizer
    corpus: Corpus


@dataclass(frozen=True, slots=True)
class Result:
    folder: Path
    finished: bool
    manifest: dict[str, Any]


def prepare(recipe: Recipe) -> Prepared:
    """Resolve the base, read and encode the data.

    Raises:
        RecipeError, DataError, ModelError, AssetError: whatever is wrong, before any weight is loaded.
    """
    if recipe.training.fp8 and not torch.cuda.is_available():
        raise RecipeError("training.fp8: needs a GPU of compute capability 8.9 or higher; set training.fp8: false")
    base = resolve(recipe.base)
    context = getattr(load_config(base), "max_position_embeddings", None)
    if context and recipe.data.max_length > context:
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is more than the base's context of {context} tokens"
        )
    tokenizer = prepare_tokenizer(load_tokenizer(base), recipe.prompt)
    corpus = build(recipe, tokenizer)
    if recipe.training.eval_steps and not corpus.valid:
        raise RecipeError("training.eval_steps: no rows are held out; set data.valid_fraction or data.valid_path")
    return Prepared(recipe.over(len(corpus.train)), base, tokenizer, corpus)


def train(recipe: Recipe, output: Path | None = None, say: Say = print, gpus: int = 1) -> Result:
    """Run a recipe in a new folder.

    Args:
        gpus: how many share every step, the first of those that are visible.

    Raises:
        RunError: `output` holds files, or so many GPUs cannot be used. Others as `prepare`.
    """
    enough(recipe, gpus)
    prepared = prepare(recipe)
    folder = manifests.new_folder(recipe.name, output)
    (folder / "recipe.yaml").write_text(prepared.recipe.to_yaml(), encoding="utf-8")
    corpus = prepared.corpus
    record = {
        "status": "running",
        "name": recipe.name,
        "started": manifests.now(),
        "versions": manifests.versions(),
        "base": {"model": recipe.base.model, "path": prepared.base.path},
        "data": {
            "path": recipe.data.path,
            "sha256": corpus.fingerprint,
            "train_rows": len(corpus.train),
            "train_tokens": corpus.train_tokens,
            "valid_rows": len(corpus.valid),
            "bad_rows": [f"{raw.where}: {raw.why}" for raw in corpus.bad],
            "long_rows": corpus.long,
            "identifiers": _identifiers(corpus) if recipe.data.on_identifiers != "ignore" else {},
        },
        "seed": recipe.training.seed,
    }
    manifests.write(folder, record)
    return _run(prepared, folder, record, None, say, gpus)


def _identifiers(corpus: Corpus) -> dict[str, int]:
    return {"rows": len(corpus.identifiers.rows), "dropped": corpus.drops, **corpus.identifiers.kinds}


def resume(folder: Path, say: Say = print, gpus: int = 1) -> Result:
    """Go on with an interrupted run from its last checkpoint, on as many GPUs as before or not.

    Raises:
        RunError: no run here, a finished one, no checkpoint, or data that has changed since; or as `train`.
    """
    record = manifests.read(folder)
    if record["status"] == "finished":
        raise RunError(f"{folder}: this run is finished; start a new one with `medlora train RECIPE`")
    checkpoint = _last_checkpoint(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    enough(recipe, gpus)
    prepared = prepare(recipe)
    if prepared.corpus.fingerprint != record["data"]["sha256"]:
        raise RunError(f"{folder}: the data has changed since this run began; restore it, or start a new run")
    say(f"Going on from {checkpoint}")
    return _run(prepared, folder, record | {"status": "running"}, checkpoint, say, gpus)


def _last_checkpoint(folder: Path) -> Path:
    found = sorted(folder.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    whole = [c for c in found if (c / "trainer_state.json").is_file() and (c / "optimizer.pt").is_file()]
    if not whole:
        raise RunError(f"{folder}: no checkpoint to go on from; start again with `medlora train RECIPE`")
    return whole[-1]


def _run(
    prepared: Prepared, folder: Path, record: dict[str, Any], checkpoint: Path | None, say: Say, gpus: int
) -> Result:
    recipe, corpus = prepared.recipe, prepared.corpus
    for line in corpus.summary():
        say(line)
    training = recipe.training
    epochs = training.max_steps / training.steps_an_epoch(len(corpus.train))
    say(f"{training.max_steps:,} steps of {training.samples} rows, {epochs:.3g} epochs")
    model = add_lora(load_model(prepared.base, recipe.base), recipe.lora, recipe.training.seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if record.setdefault("trainable_parameters", trainable) != trainable:
        raise RunError(f"{folder}: the adapter had {record['trainable_parameters']:,} weights, now {trainable:,}")
    engine = choose_engine(model, recipe, corpus.train, gpus)
    if gpus > 1 and not takes_whole_steps(engine, model.device):
        raise RunError(f"--gpus {gpus}: one GPU trains this, by the engine {engine.why}; leave --gpus out")
    device = f"{gpus} x {_device_name()}" if gpus > 1 else _device_name()
    say(f"{trainable:,} trainable weights on {device}; engine {engine.why}")
    if engine.plan:
        say(f"Plan{', each GPU' * (gpus > 1)}: {engine.plan.describe(engine.capacity)}")
    record |= {"device": device, "engine": engine.why}

    optim = engine.plan.optim if engine.plan else recipe.training.optim
    others = beside(folder, gpus, corpus.fingerprint, optim, checkpoint) if gpus > 1 else nullcontext()
    assistant = Assistant(model, prepared.tokenizer)
    with others as team:
        if recipe.evaluation.before_and_after and "before" not in record:
            record["before"] = _measure(recipe, corpus, assistant, "before", tuned=False)
            assistant.release()
        finished = _optimise(prepared, model, engine, folder, record, checkpoint, team)
    record["loss_history"] = manifests.history(folder)
    held_out = _held_out(record["loss_history"])
    if training.load_best_model_at_end and held_out:
        record["best_step"] = min(held_out, key=held_out.__getitem__)
        say(f"Kept the adapter of step {record['best_step']}, held-out loss {held_out[record['best_step']]:.4f}")
    save_adapter(model, prepared.tokenizer, folder / "adapter", prepared.base, recipe.base)
    if finished and recipe.evaluation.before_and_after:
        record["after"] = _measure(recipe, corpus, assistant, "after", tuned=True)
    record |= {"status": "finished" if finished else "interrupted", "ended": manifests.now()}
    held = {side: record[side]["loss"] for side in ("before", "after") if "loss" in record.get(side, {})}
    if record["loss_history"]:
        manifests.plot_loss(folder, held)
    manifests.write(folder, record)
    if finished and not recipe.training.save_steps:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Result(folder, finished, record)


def _optimise(
    prepared: Prepared,
    model: Any,
    engine: Any,
    folder: Path,
    record: dict[str, Any],
    checkpoint: Path | None,
    team: Team | None,
) -> bool:
    """Train to the last step, or to Ctrl-C. True when the last step was reached."""
    recipe = prepared.recipe
    model.train()
    started = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with Interrupt() as interrupt, bar("Training", recipe.training.max_steps) as progress:
        watch = Watch(progress, folder / "metrics.jsonl")
        trainer = make_trainer(
            recipe,
            model,
            prepared.tokenizer,
            prepared.corpus.train,
            engine,
            folder / "checkpoints",
            [interrupt, watch],  # whose clock stops to save
            team,
        )
        if recipe.training.eval_steps:
            trainer.add_callback(_validation(prepared, trainer, watch, folder))
        if recipe.training.tensorboard:
            trainer.add_callback(tensorboard(folder / "tensorboard"))
        _count_tokens(trainer, watch)
        with team.group() if team else nullcontext(), running(trainer), Meter(team.size if team else 1) as meter:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.eval()
    record["training_seconds"] = round(record.get("training_seconds", 0) + time.monotonic() - started, 1)
    record["trained_tokens"] = record.get("trained_tokens", 0) + watch.tokens
    record["tokens_per_second"] = round(watch.tokens_per_second, 1)
    record["steps"] = trainer.state.global_step
    record["peak_memory_bytes"] = _peak_memory()
    if meter.joules is not None and (checkpoint is None or "energy_joules" in record):
        record["energy_joules"] = round(record.get("energy_joules", 0) + meter.joules, 1)
    if isinstance(trainer, PackedTrainer) and trainer.plan:
        record["plan"] = asdict(trainer.plan)
    return bool(trainer.state.global_step >= recipe.training.max_steps)


def _validation(prepared: Prepared, trainer: Any, watch: Watch, folder: Path) -> Validation:
    training, rows, routed = prepared.recipe.training, prepared.corpus.valid, isinstance(trainer, PackedTrainer)
    best = folder / "checkpoints" / "best.safetensors" if training.load_best_model_at_end else None
    before = manifests.history(folder) if best and best.is_file() else []

    def measure() -> float:
        return held_out_loss(trainer.model, rows, None, routed=routed).loss

    lowest = min(_held_out(before).values(), default=math.inf)
    return Validation(measure, watch, training.eval_steps or 1, best, lowest)


def _held_out(history: list[dict[str, Any]]) -> dict[int, float]:
    """{step: the held-out loss after it}."""
    return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}


def _count_tokens(trainer: Any, watch: Watch) -> None:
    """Count real tokens as they are trained; the loader runs ahead, so not there."""
    step = trainer.training_step

    def counting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        real = inputs["input_ids"] if isinstance(trainer, PackedTrainer) else inputs["attention_mask"]
        watch.count(real.numel() if isinstance(trainer, PackedTrainer) else int(real.sum()))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = counting


def _measure(recipe: Recipe, corpus: Corpus, assistant: Assistant, side: str, *, tuned: bool) -> dict[str, Any]:
    """Held-out loss and the answers to the recipe's prompts. Before training the adapter is the identity."""
    measured: dict[str, Any] = {}
    if corpus.valid:
        held: HeldOut = held_out_loss(assistant.model, corpus.valid, f"Held-out loss, {side}")
        measured |= {
            "loss": held.loss,
            "perplexity": held.perplexity,
            "tokens": held.tokens,
            "rows": held.rows,
        }
    settings = Sampling.from_recipe(recipe.generation).override(seed=recipe.training.seed)
    assistant.model.eval()
    prompts = recipe.generation.prompts
    with bar(f"Answers, {side}", len(prompts)) as progress:
        answers = assistant.answer_many([[("user", prompt)] for prompt in prompts], settings, tuned=tuned)
        measured["answers"] = [
            {"prompt": prompt, "answer": answer.text, "finished": answer.finished}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        if answers:
            rate = sum(answer.tokens for answer in answers) / max(answer.seconds for answer in answers)
            progress.advance(len(answers), f"{rate:.0f} tokens/s")
    return measured


def _peak_memory() -> int:
    """Bytes: what tensors took on the GPU, or what the process took on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
