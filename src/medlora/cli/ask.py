"""medlora ask and medlora chat."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medlora.cli.imports import importing, without_gc
from medlora.cli.options import Command, offline
from medlora.errors import RunError

if TYPE_CHECKING:
    from medlora.generate.answer import Assistant, Messages
    from medlora.generate.sampling import Sampling


def model_options(command: Command) -> Command:
    """Which model answers."""
    for option in (
        click.option(
            "--template", type=click.Choice(["llama2"]), help="Chat template where the model brings none of its own."
        ),
        click.option("--base", "base", metavar="MODEL", help="Base model: embedded, a hub id, a folder or a .gguf."),
        click.option(
            "--adapter",
            type=click.Path(path_type=Path),
            help="Run or adapter folder.  [default: newest in runs/]",
        ),
    ):
        command = option(command)
    return command


def _sampling(command: Command) -> Command:
    for option in (
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
        click.option("--regex", metavar="PATTERN", help="The answer matches this regular expression."),
        click.option(
            "--json-schema",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="The answer is JSON that the schema in this file allows.",
        ),
        click.option("--seed", type=int, help="Same seed, same answer."),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(0, min_open=True),
            help="Above 1: tokens seen become less likely.  [default: 1]",
        ),
        click.option(
            "--min-p", type=click.FloatRange(0, 1), help="Leave out what is less likely than this share of the top."
        ),
        click.option("--top-k", type=click.IntRange(1), help="Sample from this many tokens only."),
        click.option("--max-new-tokens", type=click.IntRange(1), help="Longest answer, in tokens.  [default: 300]"),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from this share only."),
        click.option("--temperature", type=click.FloatRange(0), help="0 is greedy.  [default: 0]"),
        model_options,
        click.option("--no-notice", is_flag=True, help="Leave out the line that an answer is not medical advice."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("question")
@click.option("--compare", is_flag=True, help="Show the untuned and the tuned answer.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@_sampling
@offline
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


@click.command()
@_sampling
@offline
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
    assistant, _ = load_assistant(options["adapter"], options["base"], options["template"])
    from medlora.generate.sampling import Sampling

    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed", "regex", "stop")
    schema = options["json_schema"] and options["json_schema"].read_text(encoding="utf-8")
    return assistant, Sampling().override(json_schema=schema, **{name: options[name] for name in names})


def load_assistant(given: Path | None, model: str | None, template: str | None) -> "tuple[Assistant, str]":
    """What answers, and what to call it: a run or adapter folder, else a base, else the newest run.

    Raises:
        ModelError, AssetError, RecipeError: as `Assistant.load`.
    """
    with without_gc():
        from medlora.model.adapter import base_of, find_adapter
        from medlora.recipe import Base, Prompt

    given = given or (None if model else _newest_run())
    adapter = find_adapter(given) if given else None
    base = Base(model=model) if model else base_of(adapter)
    with importing(base):
        from medlora.generate.answer import Assistant

    prompt = Prompt(template=template) if template else None  # type: ignore[arg-type]
    assistant = Assistant.load(adapter, base, prompt)
    if assistant.slow:
        click.echo(f"(decoding through Transformers, which is slower: {assistant.slow})", err=True)
    named = adapter.parent if adapter and adapter.name == "adapter" else adapter or Path(base.model)
    return assistant, named.resolve().name


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
