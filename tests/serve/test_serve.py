"""Answers over HTTP: those of `Assistant`, whoever else asks; what is refused; who goes away; the page."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import tuned_toy

from medlora.errors import ModelError, RunError
from medlora.generate.answer import Assistant
from medlora.generate.request import Token
from medlora.generate.sampling import Sampling
from medlora.serve import app as module
from medlora.serve.app import LONGEST, Server
from medlora.serve.worker import Worker

HOSTS = frozenset({"127.0.0.1", "localhost"})


class Client:
    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port

    def get(self, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        """(status, text); `body` as JSON or as it is."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        told = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, told)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def chat(self, question: str, **fields: object) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": question}], **fields}
        status, text = self.get("/v1/chat/completions", body)
        assert status == 200, text
        found: dict[str, Any] = json.loads(text)
        return found

    def stream(self, question: str, **fields: object) -> list[dict[str, Any]]:
        body = {"messages": [{"role": "user", "content": question}], "stream": True, **fields}
        *events, done = self.get("/v1/chat/completions", body)[1].strip().split("\n\n")
        assert done == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


def serving(server: Server) -> Iterator[Client]:
    listening = socket.create_server(("127.0.0.1", 0))
    host = uvicorn.Server(uvicorn.Config(server.app(), log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=host.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Client(server, listening.getsockname()[1])
    host.should_exit = True
    thread.join()
    server.worker.stop()
    assert not server.worker.is_alive()


@pytest.fixture(scope="module")
def client(llama_folder: Path) -> Iterator[Client]:
    yield from serving(Server(tuned_toy(llama_folder, 0.3), "toy", HOSTS))


@pytest.fixture(scope="module")
def alone(llama_folder: Path) -> Assistant:
    """The same model, for nobody else."""
    return tuned_toy(llama_folder, 0.3)


@pytest.mark.parametrize("tuned", [True, False])
def test_an_answer_is_that_of_the_assistant(client: Client, alone: Assistant, tuned: bool) -> None:
    for settings in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 4, "top_p": 0.9, "repetition_penalty": 1.1}):
        expected = alone.ask("What is gout?", Sampling(max_new_tokens=20).override(**settings), tuned=tuned)
        model = "toy" if tuned else "untuned"
        found = client.chat("What is gout?", model=model, max_tokens=20, **settings)
        assert found["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
        assert found["choices"][0]["finish_reason"] == ("stop" if expected.finished else "length")
        assert found["usage"]["completion_tokens"] == expected.tokens and found["model"] == model
        pieces = client.stream(
            "What is gout?", model=model, max_tokens=20, stream_options={"include_usage": True}, **settings
        )
        *said, usage = pieces
        assert "".join(p["choices"][0]["delta"]["content"] for p in said).strip() == expected.text
        assert said[0]["choices"][0]["delta"]["role"] == "assistant"
        assert [p["choices"][0]["finish_reason"] for p in said[:-1]] == [None] * (len(said) - 1)
        assert usage["choices"] == [] and usage["usage"] == found["usage"]


def test_many_at_once_each_get_what_they_get_alone(client: Client, alone: Assistant) -> None:
    def settings(i: int) -> dict[str, Any]:
        return {"temperature": 0.9, "seed": i, "max_tokens": 8 + i % 5}

    def expected(i: int) -> str:
        told = settings(i)
        return alone.ask(
            f"Question {i}?", Sampling(temperature=0.9, seed=i, max_new_tokens=told["max_tokens"]), tuned=i % 3 > 0
        ).text

    with ThreadPoolExecutor(24) as pool:
        found = list(
            pool.map(
                lambda i: client.chat(f"Question {i}?", model=("toy" if i % 3 else "untuned"), **settings(i)), range(24)
            )
        )
    assert [each["choices"][0]["message"]["content"] for each in found] == [expected(i) for i in range(24)]


def test_a_conversation_stop_strings_and_log_probabilities(client: Client, alone: Assistant) -> None:
    talk = [("user", "What is gout?"), ("assistant", "A disease."), ("user", "Of what?")]
    body = {
        "messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in talk],
        "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2, "user": "somebody",
    }  # fmt: skip
    status, text = client.get("/v1/chat/completions", body)
    answer = alone.answer(talk, Sampling(max_new_tokens=12, logprobs=2))
    found = json.loads(text)["choices"][0]
    assert status == 200 and found["message"]["content"] == answer.text
    for told, token in zip(found["logprobs"]["content"], answer.logprobs, strict=True):
        assert told["logprob"] == pytest.approx(token.logprob, abs=1e-4)
        assert told["token"] == alone.tokenizer.decode([token.id]) and len(told["top_logprobs"]) == 2
    stop = answer.text[3:6]
    for said in (
        client.chat("Of what?", max_tokens=30, stop=stop)["choices"][0]["message"]["content"],
        "".join(p["choices"][0]["delta"]["content"] for p in client.stream("Of what?", max_tokens=30, stop=[stop])),
    ):
        assert stop not in said


def test_an_answer_keeps_a_schema(client: Client) -> None:
    pytest.importorskip("llguidance", reason="constrained answers need it")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    found = client.chat("What is gout?", max_tokens=40, response_format=form)
    assert json.loads(found["choices"][0]["message"]["content"])["a"] in ("x", "y")


@pytest.mark.parametrize(
    ("status", "said", "body"),
    [
        (400, "messages: Field required", {}),
        (400, "tools: Extra inputs", {"messages": [{"role": "user", "content": "x"}], "tools": []}),
        (400, "n: Input should be 1", {"messages": [{"role": "user", "content": "x"}], "n": 2}),
        (400, "messages.0.role", {"messages": [{"role": "tool", "content": "x"}]}),
        (400, "there is toy, untuned", {"messages": [{"role": "user", "content": "x"}], "model": "gpt"}),
        (400, "shorten", {"messages": [{"role": "user", "content": "gout " * 400}]}),
        (400, "chat template", {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}),
        (400, "Invalid JSON", b"{"),
        (413, "bytes", b"[" * (LONGEST + 1)),
    ],
)
def test_what_cannot_be_answered_is_said(client: Client, status: int, said: str, body: object) -> None:
    found, text = client.get("/v1/chat/completions", body)
    assert found == status and said in json.loads(text)["error"]["message"]


def test_other_places_cannot_have_a_browser_ask(client: Client) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert client.get("/v1/chat/completions", body, Host="evil.example")[0] == 403
    assert client.get("/", Host="evil.example:8000")[0] == 403
    assert client.get("/v1/chat/completions", body, Content_Type="text/plain")[0] == 415
    assert client.get("/v1/chat/completions", body, Host=f"localhost:{client.port}")[0] == 200
    assert client.get("/nothing")[0] == 404 and client.get("/v1/chat/completions")[0] == 405


def test_a_key_is_asked_for_where_there_is_one(llama_folder: Path) -> None:
    for client in serving(Server(tuned_toy(llama_folder, 0.3), "toy", None, "sesam ö")):
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        for key in ("", "Bearer wrong", "sesam"):
            assert client.get("/v1/chat/completions", body, Authorization=key)[0] == 401
            assert client.get("/v1/models", Authorization=key)[0] == 401
        client.server.key = "sesam"
        assert client.get("/v1/chat/completions", body, Authorization="Bearer sesam")[0] == 200
        assert client.get("/", Host="clinic.example")[0] == client.get("/health")[0] == 200


def test_who_goes_away_is_decoded_for_no_longer(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, steps = client.server.worker, []
    deliver = worker._deliver

    def slow(token: Token) -> None:
        time.sleep(0.05)
        steps.append(token)
        deliver(token)

    monkeypatch.setattr(worker, "_deliver", slow)
    body = json.dumps(
        {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 200, "temperature": 1}
    )
    with socket.create_connection(("127.0.0.1", client.port)) as asking:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        asking.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert b"200 OK" in asking.recv(64)
    ends = time.monotonic() + 20
    while worker._tickets and time.monotonic() < ends:
        time.sleep(0.05)
    assert not worker._tickets and len(steps) < 190
    assert client.chat("What is gout?", max_tokens=2)["usage"]["completion_tokens"] <= 2


def test_more_than_can_wait_hear_so_and_a_failure_ends_nobody_else(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    monkeypatch.setattr(client.server.worker, "most", 0)
    status, text = client.get("/v1/chat/completions", body)
    assert status == 503 and "ask again later" in text
    monkeypatch.undo()
    engine: Any = client.server.worker.engine
    step = engine.step

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("private text")

    monkeypatch.setattr(engine.decoder, "logits", broken)
    status, text = client.get("/v1/chat/completions", body)
    assert status == 400 and "decoding failed; ask again" in text and "private" not in text
    monkeypatch.undo()
    assert engine.step is step and client.get("/v1/chat/completions", body)[0] == 200


@pytest.mark.parametrize("slow", [False, True])
def test_a_server_that_stops_ends_what_is_under_way(llama_folder: Path, slow: bool) -> None:
    assistant = tuned_toy(llama_folder, 0.3)
    if slow:
        assistant.__dict__["engine"] = "not of the family"
    worker = Worker(assistant)
    worker.start()
    deliver = worker._deliver
    worker._deliver = lambda token: (time.sleep(0.1), deliver(token))  # type: ignore[assignment,func-returns-value]
    asked = assistant.request([("user", "x")], Sampling(max_new_tokens=200, temperature=1.0, seed=2), True)
    tickets = [worker.ask(asked) for _ in range(1 if not slow else 2)]
    next(iter(tickets[0]))
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 5
    for ticket in tickets:
        with pytest.raises(ModelError, match="the server stops"):
            list(ticket)
    with pytest.raises(ModelError, match="the server stops"):
        worker.ask(asked)


def test_a_model_that_only_transformers_decodes_answers_in_turn(llama_folder: Path, alone: Assistant) -> None:
    assistant = tuned_toy(llama_folder, 0.3)
    assistant.__dict__["engine"] = "not of the family"
    for client in serving(Server(assistant, "toy", HOSTS)):
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(client.chat, f"Question {i}?", max_tokens=6) for i in range(3)]
            found = [each.result() for each in asked]
        expected = [alone.ask(f"Question {i}?", Sampling(max_new_tokens=6)).text for i in range(3)]
        assert [each["choices"][0]["message"]["content"] for each in found] == expected


def test_the_page_loads_nothing_from_elsewhere(client: Client) -> None:
    status, page = client.get("/")
    shown = re.search(r'id="shown">(.*?)</script>', page)
    assert status == 200 and shown and json.loads(shown[1])["models"] == ["toy", "untuned"]
    assert "Not medical advice" in page and not re.search(r"(?:src|href)=|https?://|@import|url\(", page)
    assert client.get("/health") == (200, '{"status":"ok"}')


def test_the_command_serves_until_it_is_told_to_end(llama_folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "medlora",
        "serve",
        "--base",
        str(llama_folder),
        "--template",
        "llama2",
        "--offline",
    ]
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        told = re.fullmatch(r"(\S+): http://127\.0\.0\.1:(\d+)  \(Ctrl-C ends it\)\n", line)
        assert told and told[1] == llama_folder.name
        with urllib.request.urlopen(f"http://127.0.0.1:{told[2]}/v1/models") as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == [llama_folder.name]
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()
    refused = subprocess.run([*command, "--host", "0.0.0.0"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and "give --api-key too" in refused.stderr


def test_a_port_that_is_taken(client: Client) -> None:
    with pytest.raises(RunError, match=rf"127\.0\.0\.1:{client.port} cannot be taken: .*; choose another --port"):
        module.run(client.server, "127.0.0.1", client.port, print)
