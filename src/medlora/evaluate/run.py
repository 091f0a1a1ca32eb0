"""Evaluate a run: every task, untuned and tuned, from one loaded base, into the run's `evaluation/` folder."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from medlora import __version__
from medlora.data.build import read_records
from medlora.errors import DataError
from medlora.evaluate.calibration import calibrate
from medlora.evaluate.overlap import N, overlap
from medlora.evaluate.score import score_task
from medlora.evaluate.store import Store
from medlora.evaluate.summary import FOLDER, OVERLAP, SIDES, read
from medlora.evaluate.tasks import HELD, NAMES, OWN, load_task
from medlora.evaluate.tasks.base import Choice, Passage, Task
from medlora.generate.answer import Assistant
from medlora.model.adapter import find_adapter
from medlora.recipe import Recipe, load_recipe
from medlora.train import manifest as manifests

Say = Callable[[str], None]


def evaluate(
    run: Path,
    tasks: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
    *,
    few_shot: int = 0,
    limit: int | None = None,
    letters: bool = False,
    say: Say = print,
) -> Path:
    """Score the named tasks; without names the run's own (`tasks.OWN`) and those that `sources` gives data for.

    Everything about the data is checked before the model loads. Items that an earlier call scored are kept.

    Args:
        sources: {task: file, folder or hub id}; a task without one takes the run's rows or its published hub data set.
        few_shot: answered examples before each multiple-choice question.
        limit: the first so many items of each task.
        letters: score multiple choice by a generated letter as well, zero-shot, as task NAME_letters.

    Returns:
        The folder with the item lines, RUN/evaluation.

    Raises:
        RunError, ModelError: no run or no adapter here. DataError: as `load_task`, or stored items of other settings.
    """
    record, adapter = manifests.read(run), find_adapter(run)
    recipe, sources = load_recipe(run / "recipe.yaml"), dict(sources or {})
    loaded = _load(recipe, tasks, sources, few_shot, limit)
    loaded += [_lettered(task) for task in loaded if task.kind == "choice" and letters]
    folder = run / FOLDER
    for line in _describe(loaded):
        say(line)
    _write_overlap(folder, recipe, loaded)
    assistant = Assistant.load(adapter)
    sha = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    for task in loaded:
        for side in SIDES:
            header = {
                "task": task.name, "side": side, "kind": task.kind, "settings": task.settings,
                "medlora": __version__, "model": record["base"]["model"],
                "adapter_sha256": sha if side == "tuned" else None,
            }  # fmt: skip
            with Store(folder, header) as store:
                score_task(assistant, recipe, task, store, tuned=side == "tuned")
    return folder


def _load(
    recipe: Recipe, names: Sequence[str], sources: dict[str, str], few_shot: int, limit: int | None
) -> list[Task]:
    for name in sources:
        if name not in NAMES:
            raise DataError(f"--data {name}=...: no such task; there are {', '.join(NAMES)}")
        if names and name not in names:
            raise DataError(f"--data {name}=...: {name} is not among --tasks {','.join(names)}; add it there")
    if names:
        return [load_task(name, recipe, sources.get(name), few_shot, limit) for name in dict.fromkeys(names)]
    own = [name for name in OWN if not (name in HELD and _nothing_held(recipe, sources))]
    return [load_task(n, recipe, sources.get(n), few_shot, limit) for n in dict.fromkeys([*own, *sources])]


def _nothing_held(recipe: Recipe, sources: dict[str, str]) -> bool:
    given = {"heldout", "answers"} & sources.keys()
    return not given and not recipe.data.valid_path and recipe.data.valid_fraction == 0


def _lettered(task: Task) -> Task:
    return replace(task, name=f"{task.name}_letters", kind="letter", settings=task.settings | {"few_shot": 0})


def _describe(tasks: Sequence[Task]) -> list[str]:
    lines = []
    for task in tasks:
        note = f"; {task.settings['notes']}" if task.settings.get("notes") else ""
        lines.append(f"{task.name}: {len(task.items):,} items from {task.settings['source']}{note}")
    return lines


def _write_overlap(folder: Path, recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Replace overlap.json, keeping what it says about other tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / OVERLAP
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tasks = [task for task in tasks if task.kind != "memory"]  # of which half is training text
    texts = {f"{task.name}\0{item.id}": _text(item) for task in tasks for item in task.items}
    train = read_records(recipe).train
    shares = overlap(texts, (record.content for record in train), N)
    for task in tasks:
        known[task.name] = {item.id: shares[f"{task.name}\0{item.id}"] for item in task.items}
    part = folder / f".{OVERLAP}.part"
    part.write_text(json.dumps(known, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)


def _text(item: Choice | Passage) -> str:
    """The item's own text, without examples and fixed phrases."""
    return item.text if isinstance(item, Passage) else "\n".join([item.question, *item.texts])


def calibration(folder: Path) -> dict[str, dict[str, Any]]:
    """{multiple-choice task: {side: {"ece", "reliability", "accuracy_at_coverage", "confident_errors"}}}."""
    found: dict[str, dict[str, Any]] = {}
    for one in calibrate(read(folder)):
        found.setdefault(one.task, {})[one.side] = {
            "ece": one.error,
            "reliability": [asdict(each) for each in one.bins],
            "accuracy_at_coverage": one.coverage,
            "confident_errors": [item["id"] for item in one.confident_errors],
        }
    return found
