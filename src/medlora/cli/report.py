"""medlora report and medlora compare."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html: one file to read, print or send, with every figure and its limits.

    \b
    medlora evaluate runs/demo && medlora report runs/demo
    """
    from medlora.report.page import write_report

    click.echo(f"Report: {write_report(run)}")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Set evaluated RUNS side by side, each against the first, with paired statistics.

    \b
    medlora compare runs/medquad runs/medquad-2
    """
    from medlora.report.compare import compare as compare_runs
    from medlora.report.compare import describe

    compared = compare_runs(runs)
    click.echo(json.dumps(compared, indent=2) if as_json else "\n".join(describe(compared)))
