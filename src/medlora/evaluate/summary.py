"""From the stored items of an evaluation to scores, differences and verdicts.

`evaluation/summary.json` holds

    {"medlora", "confidence", "resamples", "tests",
     "tasks": {task: {"kind", "settings", "general", "items": {side: count}, "metrics", "clean"?, "groups"}},
     "membership": {"auc", "trained", "held_out"} or None}

`metrics` is {metric: {"untuned", "tuned", "difference": {"value", "low", "high"}, "p", "p_holm", "items",
"items_needed", "verdict"}}; a task measured on one side only has that side's interval alone. `clean` holds the same
without the items that share an 8-word sequence with the training text, in a Holm family of its own, and `groups` the
first metric by each group of items, without verdicts: too many of those would be chance.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora import __version__
from medlora.errors import DataError, RunError
from medlora.evaluate.membership import membership
from medlora.evaluate.metrics import CLUSTER, METRICS, Entry, Item, correct, measure, metric
from medlora.evaluate.statistics import CONFIDENCE, LEAST_UNITS, RESAMPLES
from medlora.evaluate.tasks.memorisation import CONTROL, TRAINED

FOLDER, NAME, OVERLAP = "evaluation", "summary.json", "overlap.json"
SIDES = ("untuned", "tuned")
GENERAL = "general"
"""Tasks whose names begin so are not medical: they show what the tuning cost elsewhere."""
FORGETTING = "the tuned model is worse at general text: part of what it knew was lost; weigh that against the gain"


@dataclass(frozen=True, slots=True)
class Side:
    """One model's stored items of one task, by id."""

    header: dict[str, Any]
    items: dict[str, Item]


def read(folder: Path) -> dict[str, dict[str, Side]]:
    """{task: {side: Side}} of an evaluation folder; a side without items is left out.

    Raises:
        RunError: nothing was evaluated here.
        DataError: a damaged file, or two sides that were measured differently.
    """
    tasks: dict[str, dict[str, Side]] = {}
    names = sorted({file.stem.rpartition(".")[0] for file in folder.glob("*.*.jsonl")})
    for task, side in [(task, side) for task in names for side in SIDES]:  # untuned always stands first
        file = folder / f"{task}.{side}.jsonl"
        found = _read_side(file) if file.is_file() else None
        if found and found.items:
            tasks.setdefault(task, {})[side] = found
    if not tasks:
        raise RunError(f"{folder}: nothing was evaluated here; run `medlora evaluate {folder.parent}`")
    for task, sides in tasks.items():
        if len({json.dumps(side.header.get("settings"), sort_keys=True) for side in sides.values()}) > 1:
            raise DataError(f"{folder}: {task}: its two sides have different settings; remove both and evaluate again")
    return tasks


def _read_side(file: Path) -> Side | None:
    """The last line may have been cut by an interruption; any other bad line is refused."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines]
        items = {item["id"]: item for item in rows[1:]}
        if rows and rows[0]["kind"] not in METRICS:
            raise DataError(f"{file}: line 1: kind {rows[0]['kind']!r} is none of {', '.join(METRICS)}")
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file}: not the item lines of an evaluation; remove it and evaluate again") from None
    if len(items) < len(rows) - 1:
        raise DataError(f"{file}: {len(rows) - 1 - len(items)} item ids stand twice; remove it and evaluate again")
    return Side(rows[0], items) if rows else None


def summarize(folder: Path) -> dict[str, Any]:
    """Score everything in an evaluation folder, and write summary.json there in one step.

    Raises:
        RunError, DataError: as `read`.
    """
    overlap_file = folder / OVERLAP
    overlap = json.loads(overlap_file.read_text(encoding="utf-8")) if overlap_file.is_file() else {}
    found = read(folder)
    tasks = {task: _task(task, sides, overlap.get(task)) for task, sides in found.items()}
    tests = correct([(task["kind"], task["metrics"]) for task in tasks.values()])
    correct([(task["kind"], task["clean"]["metrics"]) for task in tasks.values() if "clean" in task])
    head = {"medlora": __version__, "confidence": CONFIDENCE, "resamples": RESAMPLES, "tests": tests}
    summary = {**head, "tasks": tasks, "membership": _membership(found)}
    part = folder / f".{NAME}.part"
    part.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / NAME)
    return summary


def _task(name: str, sides: dict[str, Side], overlap: dict[str, float] | None) -> dict[str, Any]:
    header = next(iter(sides.values())).header
    ids = shared_ids(sides.values())
    task: dict[str, Any] = {
        "kind": header["kind"],
        "settings": header.get("settings", {}),
        "general": name.startswith(GENERAL),
        "items": {side: len(found.items) for side, found in sides.items()},
        "metrics": measure(header["kind"], _pick(sides, ids)),
        "groups": _groups(header["kind"], sides, ids),
    }
    if overlap is None:
        return task
    clean = [i for i in ids if not overlap.get(i)]
    task["overlapping"] = len(ids) - len(clean)
    if clean and len(clean) < len(ids):
        task["clean"] = {"items": len(clean), "metrics": measure(header["kind"], _pick(sides, clean))}
    return task


def _membership(found: dict[str, dict[str, Side]]) -> dict[str, Any] | None:
    """Where both sides of trained and of held-out rows were measured."""
    rows = [{side: held.items for side, held in found.get(task, {}).items()} for task in (TRAINED, CONTROL)]
    return membership(*rows) if all(each.keys() == set(SIDES) for each in rows) else None


def shared_ids(sides: Iterable[Side]) -> list[str]:
    """Ids that every side has, in the order of the first."""
    first, *others = sides
    return [i for i in first.items if all(i in other.items for other in others)]


def _pick(sides: dict[str, Side], ids: list[str]) -> dict[str, list[Item]]:
    return {name: [side.items[i] for i in ids] for name, side in sides.items() if ids}


def _groups(kind: str, sides: dict[str, Side], ids: list[str]) -> dict[str, dict[str, Entry]]:
    """{group key: {value: the first metric}} for values with enough items for an interval, most items first."""
    items = next(iter(sides.values())).items
    members: dict[str, dict[str, list[str]]] = {}
    for i in ids:
        for key, value in items[i].get("group", {}).items():
            members.setdefault(key, {}).setdefault(value, []).append(i)
    first = METRICS[kind][0].name
    found: dict[str, dict[str, Entry]] = {}
    for key, values in members.items():
        for value, chosen in sorted(values.items(), key=lambda pair: -len(pair[1])):
            entries = measure(kind, _pick(sides, chosen), clustered=key != CLUSTER)
            if len(chosen) >= LEAST_UNITS and first in entries:
                found.setdefault(key, {})[value] = entries[first]
    return found


def show(interval: dict[str, float | None] | None, digits: int, *, sign: bool = False) -> str:
    """`0.552 [0.508, 0.595]`; a dash where there is no value."""
    if interval is None:
        return "-"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    if interval["low"] is None:
        return f"{form.format(interval['value'])} [too few]"
    return f"{form} [{form}, {form}]".format(interval["value"], interval["low"], interval["high"])


def describe(summary: dict[str, Any]) -> list[str]:
    """The table for a terminal: medical tasks first, then what the tuning cost elsewhere, and what it gives away."""
    lines: list[str] = []
    for title, part in (("Medical", "medical"), ("Forgetting: general items", GENERAL), ("Memorisation", "memory")):
        tasks = {name: task for name, task in summary["tasks"].items() if part_of(task) == part}
        if tasks:
            heads = ("untuned", "tuned", "difference")
            lines += ["", f"{title:<32}" + "".join(f"{head:<26}" for head in heads) + "verdict"]
        for name, task in tasks.items():
            lines += _describe_task(name, task)
    lines += [f"  {told(summary['membership'])}"] if summary["membership"] else []
    lines += [f"warning: {name}: {FORGETTING}" for name in forgotten(summary)]
    lines += ["", f"[95 % intervals]; verdicts at 5 % after Holm's correction over {summary['tests']} tests"]
    return lines[1:]


def part_of(task: dict[str, Any]) -> str:
    """medical, general or memory: the part of a report that a task belongs to."""
    return "memory" if task["kind"] == "memory" else GENERAL if task["general"] else "medical"


def told(membership: dict[str, Any]) -> str:
    """What membership says, as a sentence."""
    return (
        f"trained rows told from held-out ones by how much their loss fell: AUC {show(membership['auc'], 3)} "
        f"(0.5 is a guess, 1 every time; {membership['trained']} and {membership['held_out']} rows)"
    )


def forgotten(summary: dict[str, Any]) -> list[str]:
    """General tasks with a metric that is worse after tuning."""
    tasks = summary["tasks"].items()
    return [n for n, t in tasks if t["general"] and any(e.get("verdict") == "worse" for e in t["metrics"].values())]


def _describe_task(name: str, task: dict[str, Any]) -> list[str]:
    items = min(task["items"].values())
    lines = [f"{name} ({items:,} items)", *_rows(task["kind"], task["metrics"])]
    if "clean" in task:
        lines.append(f"  without {task['overlapping']:,} items that share 8 words in a row with the training text:")
        lines += _rows(task["kind"], task["clean"]["metrics"])
    elif task.get("overlapping"):
        lines.append("  every item shares 8 words in a row with the training text")
    return lines


def _rows(kind: str, entries: dict[str, Entry]) -> list[str]:
    rows = []
    for name, entry in entries.items():
        found = metric(kind, name)
        cells = [show(entry.get(side), found.digits) for side in SIDES]
        cells.append(show(entry.get("difference"), found.digits, sign=True))
        rows.append((f"  {found.label:<30}" + "".join(f"{cell:<26}" for cell in cells) + words(entry)).rstrip())
    return rows


def words(entry: Entry) -> str:
    """The verdict; where no difference is shown, also the items that would show one as large as this."""
    said = str(entry.get("verdict", ""))
    measured = (entry.get("difference") or {"low": None})["low"] is not None
    needed = entry.get("items_needed") if measured else None
    return f"{said} (about {needed:,} items would)" if said.startswith("no") and needed else said
