"""HTTP over a loaded model: OpenAI's chat completions, and a page to ask and compare.

    POST /v1/chat/completions    GET /v1/models    GET /health    GET /

What is asked and answered is written nowhere. The page loads nothing from elsewhere. Requests must name this machine as
their host, so that no web page elsewhere can have a browser ask (DNS rebinding), and carry JSON, which a foreign form
cannot send.
"""

import hmac
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from importlib.resources import files
from typing import Any

from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from medlora.errors import MedloraError, ModelError, RunError
from medlora.generate.answer import NOTICE, Assistant
from medlora.serve.protocol import Chat, Reply
from medlora.serve.worker import Busy, Ticket, Worker

UNTUNED = "untuned"
LONGEST = 2**20  # bytes of a request
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Server:
    """The routes over one loaded model.

    Args:
        name: what the tuned model, or the base without an adapter, is called.
        hosts: names by which requests may address this machine; None for any.
        key: what clients must send as `Authorization: Bearer KEY`.
    """

    def __init__(self, assistant: Assistant, name: str, hosts: frozenset[str] | None, key: str | None = None) -> None:
        self.assistant, self.hosts, self.key = assistant, hosts, key
        self.models = {name: True, UNTUNED: False} if assistant.has_adapter else {name: False}
        self._lock = threading.Lock()
        self.worker = Worker(assistant)
        self.worker.start()

    def app(self) -> Callable[..., Awaitable[None]]:
        asked = {"/": self.page, "/health": self.health, "/v1/models": self.list_models}
        routes = [Route(path, self._guarded(endpoint)) for path, endpoint in asked.items()]
        routes.append(Route("/v1/chat/completions", self._guarded(self.complete), methods=["POST"]))
        return Starlette(routes=routes)

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            if self.hosts is not None and (request.url.hostname or "") not in self.hosts:
                return _error(403, f"this server is not {request.url.hostname}; see --host")
            sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            asks = request.url.path.startswith("/v1")
            if self.key and asks and not hmac.compare_digest(sent, self.key.encode()):
                return _error(401, "send the server's key as `Authorization: Bearer KEY`")
            return await endpoint(request)

        return guarded

    async def page(self, request: Request) -> Response:
        text = (files("medlora.serve") / "page.html").read_text(encoding="utf-8")
        shown = {"models": list(self.models), "notice": NOTICE, "key": bool(self.key)}
        page = text.replace("{{ shown }}", json.dumps(shown).replace("<", "\\u003c"))
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})

    async def health(self, request: Request) -> Response:
        alive = self.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def list_models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model", "owned_by": "medlora"} for name in self.models]
        return JSONResponse({"object": "list", "data": models})

    async def complete(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _error(415, "send JSON, as Content-Type: application/json")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LONGEST:
                return _error(413, f"a request may have {LONGEST:,} bytes")
        try:
            chat = Chat.model_validate_json(body)
            ticket, reply = await run_in_threadpool(self._ask, chat)
            if chat.stream:
                return StreamingResponse(_events(ticket, reply, chat), media_type="text/event-stream")
            return JSONResponse(await run_in_threadpool(_whole, ticket, reply))
        except ValidationError as error:
            first = error.errors()[0]
            return _error(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        except Busy as error:
            return _error(503, str(error), {"Retry-After": "1"})
        except MedloraError as error:
            return _error(400, str(error))

    def _ask(self, chat: Chat) -> tuple[Ticket, Reply]:
        name = chat.model or next(iter(self.models))
        if name not in self.models:
            raise ModelError(f"no model {name!r} here; there is {', '.join(self.models)}")
        try:
            with self._lock:  # tokenizers are not made for threads
                asked = self.assistant.request(chat.conversation(), chat.settings(), self.models[name])
        except TemplateError as error:
            raise ModelError(f"messages: the model's chat template does not take them: {error.message}") from None
        return self.worker.ask(asked), Reply(name, len(asked.request.ids), self.assistant.tokenizer)


def _whole(ticket: Ticket, reply: Reply) -> dict[str, Any]:
    tokens, pieces = zip(*ticket, strict=True)
    return reply.whole(tokens, "".join(pieces))


def _events(ticket: Ticket, reply: Reply, chat: Chat) -> Iterator[str]:
    """Server-sent events; a client that goes away ends its request."""
    count, begun = 0, False
    try:
        for token, text in ticket:
            count += 1
            if text or token.last or token.logprob is not None:
                yield _event(reply.piece(token, text, first=not begun))
                begun = True
        if chat.stream_options.include_usage:
            yield _event(reply.end(count))
        yield "data: [DONE]\n\n"
    except MedloraError as error:
        yield _event({"error": {"message": str(error), "type": type(error).__name__}})
    finally:
        ticket.leave()


def _event(said: dict[str, Any]) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False)}\n\n"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status, headers)


def run(server: Server, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until the process is told to end.

    Raises:
        RunError: the address cannot be taken.
    """
    import uvicorn

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RunError(f"{host}:{port} cannot be taken: {error.strerror}; choose another --port or --host") from None
    say(f"http://{host}:{listening.getsockname()[1]}  (Ctrl-C ends it)")
    settings = uvicorn.Config(
        server.app(), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    try:
        with suppress(KeyboardInterrupt):  # as uvicorn has it again once all is closed
            uvicorn.Server(settings).run(sockets=[listening])
    finally:
        server.worker.stop()
