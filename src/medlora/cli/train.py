"""medlora train."""

import json
from pathlib import Path
from typing import Any

import click

from medlora.cli.imports import importing
from medlora.cli.options import fail, offline
from medlora.errors import RecipeError, RunError


@click.command()
@click.argument("recipe", required=False)
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Override a field of the recipe."
)
@click.option("--output", type=click.Path(path_type=Path), help="Run folder.  [default: runs/NAME]")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with an interrupted run.")
@click.option("--gpus", type=click.IntRange(1), default=1, metavar="N", help="Share each step among N GPUs.")
@click.option("--preview", is_flag=True, help="Show one row token by token, with what is trained, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's manifest as JSON.")
@offline
def train(
    recipe: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: Path | None,
    gpus: int,
    preview: bool,
    as_json: bool,
) -> None:
    """Train an adapter from RECIPE, a YAML file or the name of a shipped recipe (see `medlora recipes list`).

    \b
    medlora train demo
    medlora train my.yaml --set training.max_steps=50 --set lora.r=16
    medlora train my.yaml --gpus 2
    medlora train --resume runs/demo
    """
    from medlora.recipe import load_recipe

    if bool(recipe) == bool(resume):
        raise RecipeError("give a RECIPE, or --resume RUN; `medlora recipes list` shows the shipped recipes")
    if resume and (overrides or output):
        raise RunError("--resume goes on with the run as it is; --set and --output are for a new run")
    if preview:
        _preview(load_recipe(recipe or "", overrides))
        return
    loaded = None if resume else load_recipe(recipe or "", overrides)

    with importing(loaded.base if loaded else None):
        from medlora.report.page import write_report
        from medlora.train import run

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    result = run.resume(resume, say, gpus) if resume else run.train(loaded, output, say, gpus)  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(result.manifest, indent=2, ensure_ascii=False))
    else:
        _report(result.folder, result.manifest)
    say(f"Report: {write_report(result.folder)}")
    if not result.finished:
        fail(
            f"stopped at step {result.manifest['steps']}; go on with: medlora train --resume {result.folder}",
            130,
        )


@click.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("rank", type=int)
@click.argument("gpus", type=int)
@click.argument("meeting", type=click.Path(path_type=Path))
@click.argument("fingerprint")
@click.argument("optim")
@click.argument("checkpoint")
@offline
def follow(folder: Path, **rest: Any) -> None:
    """What `train --gpus` starts beside itself."""
    from medlora.recipe import load_recipe

    with importing(load_recipe(folder / "recipe.yaml").base):
        from medlora.train import parallel

    parallel.belong()
    parallel.follow(folder, **rest)


def _preview(recipe: Any) -> None:
    with importing():
        from medlora.data.build import preview
        from medlora.train.run import prepare

    prepared = prepare(recipe)
    example = prepared.corpus.train[0]
    click.echo(f"{example.where}: {len(example.input_ids)} tokens, {example.trained} with loss (marked |)")
    for piece, trained in preview(example, prepared.tokenizer):
        click.echo(f"{'|' if trained else ' '} {piece}")
    for line in prepared.corpus.summary():
        click.echo(line)


def _report(folder: Path, manifest: dict[str, Any]) -> None:
    before, after = manifest.get("before", {}), manifest.get("after", {})
    for old, new in zip(before.get("answers", []), after.get("answers", []), strict=False):
        click.secho(f"\n{old['prompt']}", bold=True)
        click.echo(f"\nuntuned: {old['answer']}\n\ntuned:   {new['answer']}")
    if "loss" in before and "loss" in after:
        click.echo(f"\nHeld out ({after['rows']} rows, {after['tokens']:,} tokens)   loss   perplexity")
        for side, held in (("untuned", before), ("tuned", after)):
            click.echo(f"  {side:<36} {held['loss']:6.3f} {held['perplexity']:9.2f}")
    if "tokens_per_second" in manifest:
        speed, seconds = manifest["tokens_per_second"], manifest["training_seconds"]
        click.echo(f"\nTrained {manifest['trained_tokens']:,} tokens in {seconds:.0f} s ({speed:,.0f} tokens/s)")
    click.echo(f"Saved in {folder}: adapter/, recipe.yaml, manifest.json, metrics.jsonl, loss.png")
