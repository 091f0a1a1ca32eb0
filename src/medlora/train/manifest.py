"""The run folder and its manifest: what was trained on what, by which versions, how long, with which losses.

recipe.yaml   the resolved recipe       metrics.jsonl  one line a logged step
manifest.json this file                 loss.png       the loss curve
adapter/      PEFT's files, tokenizer, template        checkpoints/  to resume from, while unfinished
"""

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from medlora.errors import RunError

PACKAGES = (
    "medlora",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "triton",
)
NAME = "manifest.json"
BLUE, ORANGE = "#3b7dd8", "#d9730d"


def versions() -> dict[str, str | None]:
    """Installed version of each package that matters to a run; None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def new_folder(name: str, output: Path | None) -> Path:
    """An empty run folder: `output`, or runs/NAME, runs/NAME-2, ... A folder that holds a run is never reused.

    Raises:
        RunError: `output` holds something, or cannot be made.
    """
    if output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: already holds files; choose another --output, or go on with --resume {output}")
    numbered = (Path("runs") / (f"{name}-{number}" if number > 1 else name) for number in count(1))
    for folder in [output] if output else numbered:
        try:
            folder.mkdir(parents=True, exist_ok=output is not None)
            break
        except OSError as error:
            if output is None and isinstance(error, FileExistsError):  # taken, by a run that starts just now perhaps
                continue
            raise RunError(f"{folder}: cannot be made: {error.strerror}; choose another --output") from None
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run. Raises RunError where there is none."""
    file = folder / NAME
    if not file.is_file():
        raise RunError(f"{folder}: no {NAME}, so this is not a run of medlora")
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return manifest


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step, so that a crash leaves the old or the new one."""
    part = folder / f".{NAME}.part"
    part.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / NAME)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of metrics.jsonl, in order, each with all that was logged of it; of what was logged twice (a
    resumed run) the last."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    steps: dict[int, dict[str, Any]] = {}
    for entry in map(json.loads, lines):
        steps.setdefault(entry["step"], {}).update(entry)
    return [steps[step] for step in sorted(steps)]


def draw_loss(axes: Any, entries: list[dict[str, Any]], held_out: dict[str, float]) -> None:
    """Training loss by step, and held-out loss where it was measured, with that before and after as level lines, onto
    matplotlib axes."""
    for name, colour, label in (("loss", BLUE, "training"), ("eval_loss", ORANGE, "held out")):
        known = [(e["step"], e[name]) for e in entries if name in e]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker="o", ms=3, label=label)
    for (name, loss), style in zip(held_out.items(), ("--", "-"), strict=False):
        axes.axhline(loss, color=ORANGE, linestyle=style, label=f"held out, {name}: {loss:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))  # above, where no curve runs


def plot_loss(folder: Path, held_out: dict[str, float]) -> None:
    """`draw_loss` as loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    draw_loss(axes, history(folder), held_out)
    figure.savefig(folder / "loss.png", dpi=130)
    plt.close(figure)
