"""medlora evaluate."""

import json
from pathlib import Path
from typing import Any

import click

from medlora.cli.imports import importing
from medlora.cli.options import offline
from medlora.errors import DataError


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--tasks", metavar="A,B", default="", help="Tasks to score.  [default: those that need no other data]")
@click.option("--data", "data", multiple=True, metavar="TASK=PATH", help="File, folder or hub id of a task.")
@click.option("--few-shot", type=click.IntRange(0), default=0, help="Answered examples before a question.")
@click.option("--limit", type=click.IntRange(1), help="The first so many items of each task.")
@click.option("--letters", is_flag=True, help="Also score multiple choice by a generated letter.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@offline
def evaluate(
    run: Path, tasks: str, data: tuple[str, ...], few_shot: int, limit: int | None, letters: bool, as_json: bool
) -> None:
    """Is RUN better than its base? Scores both on the same items, and says what the difference is worth.

    \b
    medlora evaluate runs/demo
    medlora evaluate runs/medquad --data pubmedqa=ori_pqal.json --data mmlu=mmlu/data
    tasks: heldout, answers, memorisation, memorisation_control, general_text, general_questions (no data needed);
           pubmedqa, medqa, medmcqa, mmlu (from the hub, or --data), choices (your own JSON lines)

    Item by item results lie in RUN/evaluation; an interrupted evaluation goes on where it stopped.
    """
    with importing():
        from medlora.evaluate import run as runs
        from medlora.evaluate.summary import describe, summarize

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    sources = dict(_source(text) for text in data)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    folder = runs.evaluate(run, names, sources, few_shot=few_shot, limit=limit, letters=letters, say=say)
    summary = summarize(folder)
    calibration = runs.calibration(folder)
    if as_json:
        click.echo(json.dumps(summary | {"calibration": calibration}, indent=2, ensure_ascii=False))
        return
    for line in ["", *describe(summary), *_calibration_lines(calibration)]:
        click.echo(line)
    click.echo(f"Items, prompts and scores in {folder}")


def _source(text: str) -> tuple[str, str]:
    task, equals, path = text.partition("=")
    if not equals or not task or not path:
        raise DataError(f"--data {text}: write it as TASK=PATH")
    return task, path


def _calibration_lines(found: dict[str, Any]) -> list[str]:
    lines = ["", "Calibration (expected calibration error; wrong answers of 80 % confidence or more)"] if found else []
    for task, sides in found.items():
        said = ", ".join(f"{side} {c['ece']:.3f} ({len(c['confident_errors'])} errors)" for side, c in sides.items())
        lines.append(f"  {task}: {said}")
    return lines
