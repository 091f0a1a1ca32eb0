"""Command line: a thin table from command to function. Heavy imports stand inside the commands."""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medlora import __version__
from medlora.errors import MedloraError, RecipeError, RunError
from medlora.privacy import quiet

if TYPE_CHECKING:
    from medlora.generate.answer import Assistant, Messages
    from medlora.generate.sampling import Sampling

Command = Callable[..., Any]


def main() -> None:
    """Entry point: one sentence and an exit code for every error that a user can cause."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("stopped", 130)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MedloraError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        _fail(f"{error.filename or 'cannot write'}: {error.strerror}; free space or write elsewhere", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _offline(command: Command) -> Command:
    def turn(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
        quiet(offline=value)
        return value

    return click.option(
        "--offline",
        is_flag=True,
        expose_value=False,
        callback=turn,
        help="Open no network connection at all.",
    )(command)


def _sampling(command: Command) -> Command:
    for option in (
        click.option("--seed", type=int, help="Same seed, same answer."),
        click.option("--max-new-tokens", type=click.IntRange(1), help="Longest answer, in tokens.  [default: 300]"),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from this share only."),
        click.option("--temperature", type=click.FloatRange(0), help="0 is greedy.  [default: 0]"),
        click.option("--base", "base", metavar="MODEL", help="Base model: embedded, a hub id, a folder or a .gguf."),
        click.option(
            "--adapter",
            type=click.Path(path_type=Path),
            help="Run or adapter folder.  [default: newest in runs/]",
        ),
        click.option("--no-notice", is_flag=True, help="Leave out the line that an answer is not medical advice."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Fine-tune LLaMA-family models on medical text with LoRA over a 4-bit base, and ask them questions.

    \b
    medlora train demo                      train on the embedded data (a few minutes on a CPU)
    medlora ask "What is gout?" --compare   the untuned and the tuned answer
    medlora doctor                          what this machine can train
    """


@cli.command()
@click.argument("recipe", required=False)
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Override a field of the recipe."
)
@click.option("--output", type=click.Path(path_type=Path), help="Run folder.  [default: runs/NAME]")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with an interrupted run.")
@click.option("--preview", is_flag=True, help="Show one row token by token, with what is trained, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's manifest as JSON.")
@_offline
def train(
    recipe: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: Path | None,
    preview: bool,
    as_json: bool,
) -> None:
    """Train an adapter from RECIPE, a YAML file or the name of a shipped recipe (see `medlora recipes list`).

    \b
    medlora train demo
    medlora train my.yaml --set training.max_steps=50 --set lora.r=16
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

    from medlora.train import run

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    result = run.resume(resume, say) if resume else run.train(loaded, output, say)  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(result.manifest, indent=2, ensure_ascii=False))
    else:
        _report(result.folder, result.manifest)
    if not result.finished:
        _fail(
            f"stopped at step {result.manifest['steps']}; go on with: medlora train --resume {result.folder}",
            130,
        )


def _preview(recipe: Any) -> None:
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


@cli.command()
@click.argument("question")
@click.option("--compare", is_flag=True, help="Show the untuned and the tuned answer.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@_sampling
@_offline
def ask(question: str, compare: bool, as_json: bool, **options: Any) -> None:
    """Ask a tuned model one QUESTION; the answer streams as it is written."""
    assistant, settings = _assistant(options)
    sides = [False, True] if compare and assistant.has_adapter else [assistant.has_adapter]
    if compare and not assistant.has_adapter:
        raise RunError("--compare needs an adapter; train one, or give --adapter")
    if as_json:
        answers = {("tuned" if side else "untuned"): assistant.ask(question, settings, tuned=side) for side in sides}
        found = {
            side: {
                "answer": a.text,
                "tokens": a.tokens,
                "seconds": round(a.seconds, 3),
                "finished": a.finished,
            }
            for side, a in answers.items()
        }
        click.echo(json.dumps({"question": question, **found}, ensure_ascii=False))
        return
    for side in sides:
        if compare:
            click.secho("tuned:" if side else "untuned:", bold=True)
        _stream(assistant, [("user", question)], settings, tuned=side)
    _notice(options)


@cli.command()
@_sampling
@_offline
def chat(**options: Any) -> None:
    """Talk with a tuned model; it remembers the conversation.

    \b
    /reset  forget the conversation     /base  switch between the tuned and the untuned model
    /exit   leave (also Ctrl-D)
    """
    assistant, settings = _assistant(options)
    tuned, history = assistant.has_adapter, list[tuple[str, str]]()
    click.echo("Ask away. /reset forgets, /base switches tuned and untuned, /exit leaves.")
    _notice(options)
    while True:
        try:
            said = click.prompt("you", prompt_suffix="> ").strip()
        except click.exceptions.Abort:
            click.echo()
            return
        if said == "/exit":
            return
        if said == "/reset":
            history.clear()
            click.echo("(forgotten)")
        elif said == "/base":
            tuned = not tuned and assistant.has_adapter
            click.echo(f"({'tuned' if tuned else 'untuned'} model answers)")
        elif said.startswith("/"):
            click.echo(f"(no command {said}; there are /reset, /base and /exit)")
        else:
            history.append(("user", said))
            history.append(("assistant", _stream(assistant, history, settings, tuned=tuned)))


def _assistant(options: dict[str, Any]) -> "tuple[Assistant, Sampling]":
    from medlora.recipe import Base

    adapter = options["adapter"] or (None if options["base"] else _newest_run())
    from medlora.generate.answer import Assistant
    from medlora.generate.sampling import Sampling
    from medlora.model.adapter import find_adapter

    base = Base(model=options["base"]) if options["base"] else None
    assistant = Assistant.load(find_adapter(adapter) if adapter else None, base)
    names = ("temperature", "top_p", "max_new_tokens", "seed")
    return assistant, Sampling().override(**{name: options[name] for name in names})


def _newest_run() -> Path | None:
    found = sorted(Path("runs").glob("*/adapter/adapter_config.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        click.echo("(no run in runs/ yet: the untuned embedded base answers)", err=True)
        return None
    click.echo(f"(adapter: {found[-1].parents[1]})", err=True)
    return found[-1].parents[1]


def _stream(assistant: "Assistant", messages: "Messages", settings: "Sampling", *, tuned: bool) -> str:
    said = ""
    for piece in assistant.stream(messages, settings, tuned=tuned):
        click.echo(piece, nl=False)
        said += piece
    click.echo()
    return said.strip()


def _notice(options: dict[str, Any]) -> None:
    from medlora.generate.answer import NOTICE

    if not options["no_notice"]:
        click.secho(NOTICE, dim=True)


@cli.group()
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


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_offline
def doctor(as_json: bool) -> None:
    """Versions, device, memory, and which model sizes this machine can train."""
    from medlora import doctor as examination

    report = examination.examine()
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(examination.describe(report)))
