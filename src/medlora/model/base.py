"""Find a base model and check it before any weight is read: every refusal here costs milliseconds."""

import difflib
import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora import assets
from medlora.data.prompts import Tokenizer
from medlora.errors import ModelError
from medlora.privacy import is_offline
from medlora.recipe import EMBEDDED, Base

FAMILIES = ("llama", "mistral", "qwen2")
"""Model types of the LLaMA family, whose layers medlora computes itself: Qwen2's and 2.5's have biases besides."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Arguments that every `from_pretrained` of this base takes."""

    path: str
    """A folder, or a hub id."""
    gguf_file: str | None
    revision: str | None
    trust_remote_code: bool

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_dir()

    @property
    def files(self) -> list[Path]:
        """Of its weights, in order; none where it has yet to be fetched."""
        folder = Path(self.path)
        return [folder / self.gguf_file] if self.gguf_file else sorted(folder.glob("*.safetensors"))

    def kwargs(self) -> dict[str, Any]:
        given: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        given["local_files_only"] = self.is_local or is_offline()
        if self.gguf_file:
            given["gguf_file"] = self.gguf_file
        if self.revision and not self.is_local:
            given["revision"] = self.revision
        return given


def resolve(base: Base) -> Resolved:
    """The embedded base (fetched on first use), a .gguf file, a checked folder, or a hub id.

    Raises:
        ModelError: no such place; a folder without configuration or with missing, damaged or pickled weights; or
            code that needs `trust_remote_code`.
        AssetError: the embedded base cannot be fetched.
    """
    if base.model == EMBEDDED:
        return Resolved(str(assets.embedded_base()), None, None, False)
    place = Path(base.model).expanduser()
    if place.suffix == ".gguf":
        if not place.is_file():
            raise ModelError(f"{base.model}: no such file")
        if place.open("rb").read(4) != b"GGUF":
            raise ModelError(f"{base.model}: not a GGUF file; its first bytes are not `GGUF`")
        return Resolved(str(place.parent), place.name, None, False)
    if place.is_dir():
        _check_folder(place, base.trust_remote_code)
        return Resolved(str(place), None, None, base.trust_remote_code)
    if base.model.count("/") != 1 or base.model.startswith((".", "/", "~")):
        close = difflib.get_close_matches(base.model, [EMBEDDED], n=1)
        hint = (
            f"did you mean `{close[0]}`?" if close else "base.model is `embedded`, a folder, a .gguf file or a hub id"
        )
        raise ModelError(f"{base.model}: no such folder or file; {hint}")
    return Resolved(base.model, None, base.revision, base.trust_remote_code)


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    config_file = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not config_file.is_file():
        raise ModelError(f"{folder}: this is an adapter, not a base; pass it as --adapter")
    if not config_file.is_file():
        raise ModelError(f"{folder}: no config.json; a base folder holds config.json and *.safetensors")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ModelError(f"{config_file}: not valid JSON; copy the base again") from None
    if "auto_map" in config and not trust_remote_code:
        raise ModelError(
            f"{folder}: this base runs Python code of its own; read that code, then set base.trust_remote_code=true"
        )
    for shard in _shards(folder):
        check_safetensors(shard)


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ModelError(
                f"{folder}: {missing[0]} is missing ({len(missing)} of {len(names)} shards); copy it again"
            )
        return sorted(folder / name for name in names)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        if pickles:
            raise ModelError(
                f"{folder}: only pickle weights ({pickles[0].name}), which can run code when loaded; "
                "convert them to safetensors (https://huggingface.co/spaces/safetensors/convert)"
            )
        raise ModelError(f"{folder}: no weights; a base folder holds *.safetensors")
    return shards


def check_safetensors(file: Path) -> None:
    """Compare the length that the header promises with the file's."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (header_size,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(min(header_size, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        promised = 8 + header_size + max(ends, default=0)
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, MemoryError):
        raise ModelError(f"{file}: not a readable safetensors file, or cut short; copy it again") from None
    if promised != size:
        raise ModelError(
            f"{file}: {size:,} bytes, but its header promises {promised:,}; it is cut short, copy it again"
        )


def fingerprint(base: Resolved) -> str:
    """sha256 over the size and the first and last MiB of every weight file: tells bases of one shape apart, quickly.

    A hub id is known by its name and revision.
    """
    digest = hashlib.sha256()
    if not base.is_local:
        digest.update(f"{base.path}@{base.revision}".encode())
        return digest.hexdigest()
    for file in base.files:
        size = file.stat().st_size
        with file.open("rb") as handle:
            digest.update(str(size).encode() + handle.read(2**20))
            handle.seek(max(size - 2**20, 0))
            digest.update(handle.read())
    return digest.hexdigest()


def load_tokenizer(base: Resolved, folder: str | Path | None = None) -> Tokenizer:
    """The base's tokenizer, or the one saved in an adapter `folder`.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        if folder:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(base.path, **base.kwargs())
    except Exception as error:  # the hub client, tokenizers and sentencepiece share no base class
        raise _unloadable(base, "tokenizer", error) from None


def load_config(base: Resolved) -> Any:
    """The base's `PretrainedConfig`. Raises ModelError as `load_tokenizer`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base.path, **base.kwargs())
    except Exception as error:
        raise _unloadable(base, "configuration", error) from None


def _unloadable(base: Resolved, part: str, error: Exception) -> ModelError:
    if base.is_local:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return ModelError(f"{base.path}: its {part} cannot be read: {reason[0]}")
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{base.path}: this base runs Python code of its own; read that code, then set base.trust_remote_code=true"
        )
    if is_offline():
        return ModelError(f"{base.path}: not a folder here and not in the hub cache, and --offline forbids fetching it")
    return ModelError(
        f"{base.path}: not a folder here, and the hub did not give it ({type(error).__name__}); "
        "check the name, the network and, for a gated model, `hf auth login`"
    )
