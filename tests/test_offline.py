"""`--offline` opens no socket: with every connection forbidden, training and asking still work."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medlora.generate.answer import Assistant
from medlora.generate.sampling import Sampling
from medlora.privacy import quiet
from medlora.train import run


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to connect or to look up a name is written down and refused."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(arguments)
        raise OSError("sockets are forbidden in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


def test_training_saving_and_asking_open_no_socket(
    toy: Callable[..., Any], tmp_path: Path, no_sockets: list[Any]
) -> None:
    quiet(offline=True)
    recipe = toy("training.max_steps=2", "training.save_steps=1", "training.tensorboard=true")
    folder = run.train(recipe, tmp_path / "run", lambda line: None).folder
    assert Assistant.load(folder / "adapter").ask("hi", Sampling(max_new_tokens=2)).tokens <= 2
    with pytest.raises(OSError, match="forbidden"):  # the guard itself works
        socket.create_connection(("127.0.0.1", 9))
    assert no_sockets == [(("127.0.0.1", 9),)]


def test_telemetry_is_off() -> None:
    from huggingface_hub import constants

    quiet()
    assert constants.HF_HUB_DISABLE_TELEMETRY
