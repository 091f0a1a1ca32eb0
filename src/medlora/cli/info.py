"""medlora recipes and medlora doctor."""

import json

import click

from medlora.cli.imports import without_gc
from medlora.cli.options import offline
from medlora.errors import RecipeError


@click.group()
def recipes() -> None:
    """The recipes that come with medlora."""


@recipes.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipes_list(as_json: bool) -> None:
    """Name and purpose of each shipped recipe."""
    from medlora.recipe import load_recipe, shipped_recipes

    found = {file.stem: load_recipe(file).description for file in shipped_recipes()}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name, description in found.items():
        click.echo(f"{name:<18} {description}")


@recipes.command("show")
@click.argument("recipe")
@click.option("--resolved", is_flag=True, help="Write out every field, defaults too.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Override a field.")
@click.option("--json", "as_json", is_flag=True, help="Print the resolved recipe as JSON.")
def recipes_show(recipe: str, resolved: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print RECIPE as it is written, or resolved."""
    from medlora.recipe import find_recipe, load_recipe

    loaded = load_recipe(recipe, overrides)
    if as_json:
        click.echo(loaded.model_dump_json(indent=2))
    elif resolved or overrides:
        click.echo(loaded.to_yaml(), nl=False)
    else:
        click.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@click.command()
@click.option("--recipe", help="Print how this recipe would run here: its plan and predicted peak of memory.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Override a field of it.")
@click.option("--gpus", type=click.IntRange(1), metavar="N", help="As if N GPUs shared each of its steps.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@offline
def doctor(recipe: str | None, overrides: tuple[str, ...], gpus: int | None, as_json: bool) -> None:
    """Versions, device, memory, and which model sizes this machine can train."""
    with without_gc():
        from medlora import doctor as examination
        from medlora.recipe import load_recipe

    if not recipe and (overrides or gpus):
        raise RecipeError(f"{'--set' if overrides else '--gpus'} is about a recipe; give it with --recipe")
    if recipe:
        planned = examination.plan(load_recipe(recipe, overrides), gpus or 1)
        click.echo(json.dumps(planned, indent=2) if as_json else f"Plan: {planned['line']}")
        return
    report = examination.examine()
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(examination.describe(report)))
