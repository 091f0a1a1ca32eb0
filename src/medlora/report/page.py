"""RUN/report.html: one file that needs nothing else, for a screen, a phone or paper."""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from medlora import __version__
from medlora.evaluate.metrics import METRICS, metric
from medlora.evaluate.summary import SIDES, forgotten, part_of, show, told, words
from medlora.report.figures import figures
from medlora.report.run import Pair, RunData, evaluation_settings, read_run

NAME = "report.html"
KINDS = {"better": "better", "worse": "worse"}


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    untuned: str
    tuned: str
    difference: str
    verdict: str
    kind: str
    """better, worse or none: how the verdict is coloured."""


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    items: int
    part: str
    """As `summary.part_of`."""
    rows: list[Row]
    overlapping: int | None
    """Items that share a sequence of words with the training text; None: not looked for."""
    clean: list[Row]
    """The rows without those."""


@dataclass(frozen=True, slots=True)
class Group:
    """A task's first metric by topic, question type or subject."""

    title: str
    metric: str
    rows: list[tuple[str, int, list[str]]]
    """(value, items, [untuned, tuned, difference])."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A pair of answers as marked text."""

    prompt: str
    reference: list[tuple[str, str]] | None
    answers: dict[str, list[tuple[str, str]]]
    notes: dict[str, str]


def write_report(folder: Path) -> Path:
    """Write the report of a run, and its figures to RUN/figures.

    Raises:
        RunError: no run here. DataError: damaged evaluation files.
    """
    run = read_run(folder)
    page, part = folder / NAME, folder / f".{NAME}.part"
    part.write_text(render(run), encoding="utf-8")
    part.replace(page)
    return page


def render(run: RunData) -> str:
    """The page. Everything that a model or a data set wrote is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("medlora.report") / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        run=run,
        manifest=run.manifest,
        sides=SIDES,
        tasks=[_task(name, task) for name, task in (run.summary or {"tasks": {}})["tasks"].items()],
        groups=[g for name, task in (run.summary or {"tasks": {}})["tasks"].items() for g in _groups(name, task)],
        tests=(run.summary or {}).get("tests", 0),
        verdicts=sentences(run),
        forgotten=forgotten(run.summary) if run.summary else [],
        membership=told(run.summary["membership"]) if run.summary and run.summary["membership"] else "",
        figures={figure.name: figure for figure in figures(run)},
        facts=facts(run.manifest),
        data=_data(run.manifest["data"]),
        shown=[_shown(pair) for pair in run.pairs],
        worst=[_shown(pair) for pair in run.worst],
        settings=evaluation_settings(run),
        version=__version__,
    )


def sentences(run: RunData) -> list[tuple[str, str]]:
    """(kind, sentence) of each task's first metric: what the numbers allow one to say."""
    said = []
    for name, task in (run.summary or {"tasks": {}})["tasks"].items():
        first: list[tuple[str, Any]] = list(task["metrics"].items())[:1]
        for label, entry in first if first and "verdict" in first[0][1] else []:
            found = metric(task["kind"], label)
            values = [f"{entry[side]['value']:.{found.digits}f}" for side in SIDES]
            gap = show(entry["difference"], found.digits, sign=True)
            text = f"{found.label} {values[0]} untuned, {values[1]} tuned, difference {gap}: {words(entry)}."
            said.append((KINDS.get(entry["verdict"], "none"), f"{name} ({entry['items']:,} items): {text}"))
    return said


def _task(name: str, task: dict[str, Any]) -> Task:
    clean = task.get("clean", {}).get("metrics", {})
    return Task(
        name,
        min(task["items"].values()),
        part_of(task),
        _rows(task["kind"], task["metrics"]),
        task.get("overlapping"),
        _rows(task["kind"], clean),
    )


def _groups(name: str, task: dict[str, Any]) -> list[Group]:
    first = METRICS[task["kind"]][0]
    found = []
    for key, values in task["groups"].items():
        rows = [(value, entry["items"], _cells(entry, first.digits)) for value, entry in values.items()]
        found.append(Group(f"{name} by {key}", first.label, rows))
    return found


def _rows(kind: str, entries: dict[str, Any]) -> list[Row]:
    rows = []
    for name, entry in entries.items():
        found = metric(kind, name)
        coloured = KINDS.get(entry.get("verdict", ""), "none")
        untuned, tuned, difference = _cells(entry, found.digits)
        rows.append(Row(found.label, untuned, tuned, difference, words(entry), coloured))
    return rows


def _cells(entry: dict[str, Any], digits: int) -> list[str]:
    """Untuned, tuned, difference."""
    sides = [show(entry.get(side), digits) for side in SIDES]
    return [*sides, show(entry.get("difference"), digits, sign=True)]


def facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of how the run went; what the device did not report is said to be unknown."""
    peak, joules = manifest.get("peak_memory_bytes"), manifest.get("energy_joules")
    unknown, best = "not reported by this device", manifest.get("best_step")
    return [
        ("Status", manifest["status"]),
        ("Started, ended", f"{manifest.get('started', '-')}, {manifest.get('ended', '-')}"),
        ("Device", manifest.get("device", "-")),
        ("Engine", manifest.get("engine", "-")),
        ("Steps", f"{manifest.get('steps', 0):,}" + (f", best at {best:,}" if best else "")),
        ("Training time", f"{manifest.get('training_seconds', 0):,.0f} s"),
        ("Tokens trained", f"{manifest.get('trained_tokens', 0):,}"),
        ("Speed", f"{manifest.get('tokens_per_second', 0):,.0f} tokens/s"),
        ("Trainable weights", f"{manifest.get('trainable_parameters', 0):,}"),
        ("Peak memory", f"{peak / 2**30:.2f} GiB" if peak else unknown),
        ("Energy", f"{joules / 3600:,.1f} Wh" if joules else unknown),
        ("Seed", str(manifest.get("seed", "-"))),
    ]


def _data(data: dict[str, Any]) -> list[tuple[str, str]]:
    bad, telling = data.get("bad_rows", []), data.get("identifiers", {})
    return [
        ("Source", data["path"]),
        ("Rows trained on", f"{data['train_rows']:,} ({data['train_tokens']:,} tokens)"),
        ("Rows held out", f"{data['valid_rows']:,}"),
        ("Left out as unreadable", f"{len(bad):,}" + (f": {'; '.join(bad[:3])}" if bad else "")),
        ("Longer than allowed, treated as the recipe says", f"{data['long_rows']:,}"),
        ("Rows that look as if they held identifiers", _telling(**telling) if telling else "not searched"),
        ("Fingerprint (sha256)", data["sha256"]),
    ]


def _telling(rows: int, dropped: bool, **kinds: int) -> str:
    named = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())
    return f"{rows:,}" + (f" ({named})" if named else "") + (", left out" if rows and dropped else "")


def _shown(pair: Pair) -> Shown:
    tuned = (pair.tuned or {}).get("claims") or {}
    answers, notes = {}, {}
    for side, item in zip(SIDES, (pair.untuned, pair.tuned), strict=True):
        if item:
            answers[side] = mark(item["answer"], (item.get("claims") or {}).get("extra", []), "extra")
            notes[side] = _note(item)
    reference = None if pair.reference is None else mark(pair.reference, tuned.get("missing", []), "missing")
    return Shown(pair.prompt, reference, answers, notes)


def _note(item: dict[str, Any]) -> str:
    parts = [] if item.get("finished", True) else ["cut at the length limit"]
    parts += [f"ROUGE-L {item['rougeL']:.2f}"] if item.get("rougeL") is not None else []
    recall = (item.get("claims") or {}).get("recall")
    parts += [f"{recall:.0%} of the reference's claims"] if recall is not None else []
    return ", ".join(parts)


def mark(text: str, claims: list[str], kind: str) -> list[tuple[str, str]]:
    """`text` in pieces, each with `kind` where it is one of the claims and "" elsewhere."""
    if not claims:
        return [(text, "")]
    found = "|".join(re.escape(claim) for claim in sorted(claims, key=len, reverse=True))
    pieces = re.split(rf"(?<!\w)({found})(?!\w)", text, flags=re.IGNORECASE)
    return [(piece, kind if place % 2 else "") for place, piece in enumerate(pieces) if piece]
