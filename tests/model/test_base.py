"""What a base folder must be, checked before any weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medlora.errors import ModelError
from medlora.model.base import fingerprint, load_config, load_tokenizer, resolve
from medlora.recipe import Base


@pytest.fixture
def copy(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "base"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def cut(folder: Path) -> None:
    shards(folder)[0].write_bytes(shards(folder)[0].read_bytes()[:-100])


def garble(folder: Path) -> None:
    shards(folder)[0].write_bytes(b"\xff" * 64)


def pickled(folder: Path) -> None:
    for file in [*shards(folder), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "m.M"}}))


def no_weights(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").unlink()


@pytest.mark.parametrize(
    ("harm", "parts"),
    [
        (cut, ["cut short", "bytes"]),
        (garble, ["not a readable safetensors"]),
        (pickled, ["pickle", "safetensors"]),
        (no_weights, ["no weights"]),
        (remote_code, ["Python code of its own", "base.trust_remote_code=true"]),
        (lambda f: shards(f)[0].unlink(), ["is missing (1 of"]),
        (lambda f: (f / "config.json").unlink(), ["no config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["not valid JSON"]),
    ],
)
def test_a_harmed_folder_is_refused_in_one_sentence(copy: Path, harm: Callable[[Path], None], parts: list[str]) -> None:
    resolve(Base(model=str(copy)))  # whole, it is fine
    harm(copy)
    with pytest.raises(ModelError) as error:
        resolve(Base(model=str(copy)))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("./nowhere", "no such folder or file"),
        ("embeded", "did you mean `embedded`"),
        ("missing.gguf", "no such file"),
    ],
)
def test_places_that_do_not_exist(model: str, part: str) -> None:
    with pytest.raises(ModelError, match=part):
        resolve(Base(model=model))


def test_a_file_that_only_looks_like_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nope" * 9)
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(Base(model=str(tmp_path / "x.gguf")))


def test_an_unknown_hub_id_offline_is_one_sentence() -> None:
    resolved = resolve(Base(model="nobody/no-such-base"))
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError, match="nobody/no-such-base: not a folder here") as error:
            load(resolved)
        assert "\n" not in str(error.value)


def test_the_fingerprint_tells_bases_of_one_shape_apart(llama_folder: Path, copy: Path) -> None:
    original = fingerprint(resolve(Base(model=str(llama_folder))))
    assert fingerprint(resolve(Base(model=str(copy)))) == original
    shard = shards(copy)[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    assert fingerprint(resolve(Base(model=str(copy)))) != original
