"""medlora serve."""

from importlib.util import find_spec
from pathlib import Path

import click

from medlora.cli.ask import load_assistant, model_options
from medlora.cli.options import offline
from medlora.errors import RecipeError

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})


@click.command()
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 is any free one.")
@click.option("--api-key", envvar="MEDLORA_API_KEY", help="What clients must send; also as MEDLORA_API_KEY.")
@offline
def serve(
    adapter: Path | None, base: str | None, template: str | None, host: str, port: int, api_key: str | None
) -> None:
    """Answer over HTTP: a page that compares untuned and tuned, and OpenAI's chat completions.

    \b
    medlora serve --adapter runs/demo       then open http://127.0.0.1:8000
    POST /v1/chat/completions, GET /v1/models

    Only this machine can reach it; elsewhere it needs --host and --api-key, and a proxy for TLS. Nothing that is asked
    or answered is written anywhere.
    """
    missing = [name for name in ("starlette", "uvicorn") if not find_spec(name)]
    if missing:
        raise RecipeError(f"{missing[0]} is not installed; run: pip install 'medlora[serve]'")
    if host not in LOCAL and not api_key:
        raise RecipeError(f"--host {host} lets other machines ask; give --api-key too, which they must send")
    assistant, name = load_assistant(adapter, base, template)
    from medlora.serve.app import Server, run

    server = Server(assistant, name, LOCAL if host in LOCAL else None, api_key)
    run(server, host, port, lambda line: click.echo(f"{', '.join(server.models)}: {line}"))
