"""medlora export."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from medlora.cli.imports import importing
from medlora.cli.options import offline


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32", "q8_0"]),
    default="auto",
    help="Of the weights; auto: as the base's files; q8_0: 8 bits, GGUF alone.",
)
@click.option("--onto-nf4", is_flag=True, help="Merge into the base as it was rounded for training.")
@click.option("--no-check", is_flag=True, help="Do not measure what was written on held-out rows.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written and measured as JSON.")
@offline
def export(run: Path, output: Path, dtype: str, onto_nf4: bool, no_check: bool, as_json: bool) -> None:
    """Merge the adapter of RUN into its base and write OUTPUT: a .gguf file, or a folder for Transformers and vLLM.

    \b
    medlora export runs/demo demo-merged
    medlora export runs/demo demo.gguf --dtype q8_0

    Held-out rows are measured by the adapter and by what was written; a merged model that is worse is not kept.
    """
    with importing():
        from medlora.export import run as runs

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    found = runs.export(run, output, dtype, onto_nf4=onto_nf4, check=not no_check, say=say)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2, default=str))
    elif found.check:
        before, after = found.check.adapter, found.check.exported
        click.echo(
            f"Held out ({before.rows} rows, {before.tokens:,} tokens): loss {before.loss:.4f} by the adapter, "
            f"{after.loss:.4f} by {output}"
        )
    else:
        click.echo(f"Not measured: {found.unchecked}")
    say(f"Written: {output} ({found.dtype})")
