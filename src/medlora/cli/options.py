"""What several commands share: options, and the one way to end with an error."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from medlora.privacy import quiet

Command = Callable[..., Any]


def fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def offline(command: Command) -> Command:
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
