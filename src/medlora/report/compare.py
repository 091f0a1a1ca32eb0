"""Several runs side by side: what each was, and on the items that they share, whether the later is better."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medlora.errors import RunError
from medlora.evaluate.metrics import METRICS, correct, measure
from medlora.evaluate.summary import Side, shared_ids, show, words
from medlora.report.run import evaluation_of
from medlora.train import manifest as manifests

FACTS = ("loss_before", "loss_after", "steps", "tokens_per_second", "training_seconds", "peak_memory_bytes")


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Tuned sides of two or more runs, each against the first, paired on the items that both have.

    Returns:
        {"runs": {name: facts}, "tests", "tasks": {task: {"kind", "against": {name: {"items", "metrics"}}}}}. A task
        that only one of a pair has, or that was measured otherwise, is under "left_out" with the reason.

    Raises:
        RunError: fewer than two runs, a run given twice, or one that was never evaluated.
    """
    names = _names(folders)
    evaluated = {name: evaluation_of(folder) for name, folder in zip(names, folders, strict=True)}
    tasks: dict[str, Any] = {}
    left_out: list[str] = []
    first = names[0]
    for name in names[1:]:
        for task in evaluated[first] | evaluated[name]:
            sides = {run: evaluated[run].get(task, {}).get("tuned") for run in (first, name)}
            found = _paired(task, sides)
            if isinstance(found, str):
                left_out.append(f"{task}: {found}")
            else:
                kind = next(iter(evaluated[first][task].values())).header["kind"]
                tasks.setdefault(task, {"kind": kind, "against": {}})["against"][name] = found
    entries = [(t["kind"], pair["metrics"]) for t in tasks.values() for pair in t["against"].values()]
    runs = {name: _facts(folder) for name, folder in zip(names, folders, strict=True)}
    return {"runs": runs, "tests": correct(entries), "tasks": tasks, "left_out": left_out}


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names where those differ, else their paths."""
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise RunError("a run is given twice; `medlora compare` takes different runs")
    if len(whole) < 2:
        raise RunError("`medlora compare` takes at least two runs")
    short = [folder.name for folder in whole]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _paired(task: str, sides: dict[str, Side | None]) -> dict[str, Any] | str:
    """The comparison, or why there is none."""
    missing = [name for name, side in sides.items() if side is None]
    if missing:
        return f"no tuned answers of {missing[0]}"
    held = {name: side for name, side in sides.items() if side is not None}
    one, two = (side.header.get("settings") for side in held.values())
    if one != two:
        return f"measured differently in {' and '.join(held)}"
    ids = shared_ids(held.values())
    if not ids:
        return f"no item in common between {' and '.join(held)}"
    kind = next(iter(held.values())).header["kind"]
    chosen = {name: [side.items[i] for i in ids] for name, side in held.items()}
    return {"items": len(ids), "metrics": measure(kind, chosen)}


def _facts(folder: Path) -> dict[str, Any]:
    manifest = manifests.read(folder)
    held = {f"loss_{side}": manifest.get(side, {}).get("loss") for side in ("before", "after")}
    return held | {name: manifest.get(name) for name in FACTS if name not in held}


def describe(compared: dict[str, Any]) -> list[str]:
    """The comparison as lines for a terminal."""
    runs = compared["runs"]
    lines = [f"{'':<24}" + "".join(f"{name:<26}" for name in runs)]
    for fact in FACTS:
        cells = ["-" if run[fact] is None else f"{run[fact]:,.3f}".rstrip("0").rstrip(".") for run in runs.values()]
        lines.append(f"{fact.replace('_', ' '):<24}" + "".join(f"{cell:<26}" for cell in cells).rstrip())
    first = next(iter(runs))
    for task, found in compared["tasks"].items():
        for name, pair in found["against"].items():
            lines += ["", f"{task} ({pair['items']:,} items), {name} against {first}"]
            lines += [_line(metric.label, pair["metrics"][metric.name], metric.digits, (first, name))
                      for metric in METRICS[found["kind"]] if metric.name in pair["metrics"]]  # fmt: skip
    lines += ["", *(f"not compared: {reason}" for reason in compared["left_out"])]
    lines.append(f"[95 % intervals]; verdicts at 5 % after Holm's correction over {compared['tests']} tests")
    return lines


def _line(label: str, entry: dict[str, Any], digits: int, names: tuple[str, str]) -> str:
    cells = [show(entry[name], digits) for name in names]
    cells.append(show(entry["difference"], digits, sign=True))
    return (f"  {label:<30}" + "".join(f"{cell:<26}" for cell in cells) + words(entry)).rstrip()
