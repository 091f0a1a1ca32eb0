"""Everything a run folder says about itself, read once into plain objects; what is not there stays None."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora.errors import RunError
from medlora.evaluate import summary
from medlora.evaluate.calibration import Calibration, calibrate
from medlora.evaluate.summary import SIDES, Side
from medlora.evaluate.tasks.base import spread
from medlora.train import manifest as manifests

SHOWN, WORST = 20, 10
Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """One question with its reference and both answers."""

    prompt: str
    reference: str | None
    untuned: Item | None
    tuned: Item | None


@dataclass(frozen=True, slots=True)
class RunData:
    folder: Path
    manifest: dict[str, Any]
    recipe: str
    history: list[dict[str, Any]]
    """The logged steps."""
    summary: dict[str, Any] | None
    pairs: list[Pair]
    """Up to twenty, spread evenly over the answered questions."""
    worst: list[Pair]
    """The ten tuned answers with the lowest ROUGE-L."""
    calibrations: list[Calibration]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def read_run(folder: Path) -> RunData:
    """Read a run, its evaluation summarised anew where it has one.

    Raises:
        RunError: no run here. DataError: damaged evaluation files.
    """
    manifest = manifests.read(folder)
    evaluated = folder / summary.FOLDER
    found = summary.summarize(evaluated) if list(evaluated.glob("*.jsonl")) else None
    tasks = summary.read(evaluated) if found else {}
    answered = [pair for sides in tasks.values() if _kind(sides) == "answer" for pair in _pairs(sides)]
    recipe = folder / "recipe.yaml"
    return RunData(
        folder,
        manifest,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        manifests.history(folder),
        found,
        spread(answered, SHOWN) or _told(manifest),
        _worst(answered),
        calibrate(tasks),
    )


def _kind(sides: dict[str, Side]) -> str:
    return str(next(iter(sides.values())).header["kind"])


def _pairs(sides: dict[str, Side]) -> list[Pair]:
    items = {name: side.items for name, side in sides.items()}
    first = next(iter(items.values()))
    return [
        Pair(
            item.get("question") or item["prompt"],
            item.get("reference"),
            *(items.get(name, {}).get(key) for name in SIDES),
        )
        for key, item in first.items()
    ]


def _worst(pairs: list[Pair]) -> list[Pair]:
    scored = [pair for pair in pairs if pair.tuned and pair.tuned.get("rougeL") is not None]
    return sorted(scored, key=lambda pair: float((pair.tuned or {})["rougeL"]))[:WORST]


def _told(manifest: dict[str, Any]) -> list[Pair]:
    """The recipe's own prompts, which have no reference."""
    sides = [{a["prompt"]: a for a in manifest.get(side, {}).get("answers", [])} for side in ("before", "after")]
    return [Pair(prompt, None, *(side.get(prompt) for side in sides)) for prompt in sides[0] | sides[1]]


def evaluation_of(folder: Path) -> dict[str, dict[str, Side]]:
    """The stored items of a run's evaluation.

    Raises:
        RunError: no run here, or it was never evaluated.
    """
    manifests.read(folder)
    if not (folder / summary.FOLDER).is_dir():
        raise RunError(f"{folder}: not evaluated yet; run `medlora evaluate {folder}`")
    return summary.read(folder / summary.FOLDER)


def evaluation_settings(found: RunData) -> str:
    """How every task was measured, as JSON."""
    tasks = (found.summary or {}).get("tasks", {})
    return json.dumps({name: task["settings"] for name, task in tasks.items()}, indent=1, ensure_ascii=False)
