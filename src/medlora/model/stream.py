"""Load a base straight into NF4 on its device, and keep the quantised weights for the next time.

The model is laid out without memory (on torch's meta device). Its safetensors are then read tensor by tensor
through one pinned buffer, copied to the device and quantised there by bitsandbytes: the host never holds more than
that buffer, the device never a second tensor in 16 bits.

The result goes to MEDLORA_HOME/quantised in bitsandbytes' own serialised form, which Transformers loads too, under
a name that tells bases, dtypes and quantisations apart. The next run reads a quarter of the bytes and
quantises nothing; it can do so in a thread (`read_ahead`) before Transformers, whose import takes longer, is there.
What is unusual about a base raises `Unusual`, and the caller loads it through Transformers.
"""

# torch leaves split untyped
# mypy: allow-untyped-calls
import copy
import hashlib
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from medlora.assets import home
from medlora.errors import ModelError
from medlora.model.base import FAMILIES, Resolved, _shards, check_safetensors, fingerprint, load_config
from medlora.privacy import is_offline

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8, "I64": torch.int64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**26  # bytes that the host holds of a tensor
AHEAD: dict[tuple[Path, torch.device], Future[dict[str, Tensor]]] = {}
"""What `read_ahead` reads, and nothing else; by the cached folder and the device."""
READ = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]


class Unusual(Exception):
    """This base is not laid out as expected; the message says how."""


def load_nf4(resolved: Resolved, quantization: Any, dtype: torch.dtype, on: torch.device) -> Any:
    """The base as `from_pretrained` with this `BitsAndBytesConfig` gives it, weight by weight the same.

    Raises:
        Unusual: an architecture, a file layout or a weight that this loader does not know.
    """
    base = _local(resolved, fetch=not is_offline())
    folder, config = Path(base.path), load_config(base)
    if config.model_type not in FAMILIES or getattr(config, "quantization_config", None):
        raise Unusual(f"{config.model_type} is not a plain base of the LLaMA family")
    cached = _cached(base, quantization.bnb_4bit_use_double_quant, dtype)
    if _is_whole(cached):
        model = _skeleton(config, quantization, dtype, on)
        _read_quantised(model, cached, on)
        return _finish(model, folder, on)
    model = _skeleton(config, quantization, dtype, on)
    _read_plain(model, folder, dtype, on)
    model = _finish(model, folder, on)
    _save(model, cached)
    return model


def read_ahead(resolved: Resolved, double_quant: bool, dtype: torch.dtype, on: torch.device) -> Callable[[], None]:
    """Begin to read the base that an earlier start quantised onto its device, for `load_nf4` to find it there. What is
    returned ends that, and forgets what was read but not asked for."""
    stop = Event()

    def end() -> None:
        stop.set()
        AHEAD.clear()

    try:
        cached = _cached(_local(resolved, fetch=False), double_quant, dtype)
    except Unusual:
        return end
    if _is_whole(cached):
        pool = ThreadPoolExecutor(1, "read-ahead")
        AHEAD[cached, on] = pool.submit(_held, cached, on, stop)
        pool.shutdown(wait=False)
    return end


def _held(cached: Path, on: torch.device, stop: Event | None = None) -> dict[str, Tensor]:
    """{name: tensor on the device}; some of them, once `stop` is set."""
    held = {}
    for shard in _shards(cached):
        for name, tensor in _tensors(shard, None, on):
            held[name] = tensor
            if stop and stop.is_set():
                return held
    return held


def _local(resolved: Resolved, *, fetch: bool) -> Resolved:
    """The base in its folder."""
    if resolved.gguf_file:
        raise Unusual("it is a GGUF file")
    if resolved.is_local:
        return resolved
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            resolved.path, revision=resolved.revision, allow_patterns=READ, local_files_only=not fetch
        )
        return Resolved(folder, None, None, resolved.trust_remote_code)
    except OSError as error:  # Transformers will say it better
        raise Unusual(f"the hub did not give it ({type(error).__name__})") from None


def _cached(base: Resolved, double_quant: bool, dtype: torch.dtype) -> Path:
    settings = [fingerprint(base), f"nf4, double {double_quant}", str(dtype), version("bitsandbytes")]
    return home() / "quantised" / hashlib.sha256("\n".join(settings).encode()).hexdigest()[:32]


def _skeleton(config: Any, quantization: Any, dtype: torch.dtype, on: torch.device) -> Any:
    """The model on the meta device, its linear modules but the head in 4 bits; its rotary tables on the device."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": on})
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    # on the CPU first, as Transformers does: a GPU's powers differ in the last bit
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(on)
    return model


def _read_plain(model: Any, folder: Path, dtype: torch.dtype, on: torch.device) -> None:
    shards = _shards(folder)
    wanted = _wanted(model)
    found = {name for shard in shards for name in _header(shard)[0]}
    missing, extra = wanted - found, {name for name in found - set(model.state_dict()) if not name.endswith("inv_freq")}
    if missing or extra:
        raise Unusual(f"its weights are named otherwise ({min(missing | extra)})")
    for shard in shards:
        for name, tensor in _tensors(shard, wanted, on):
            _set(model, name, tensor.to(dtype))


def _wanted(model: Any) -> set[str]:
    """Names of the weights that files hold."""
    return {name for name, _ in model.named_parameters()} - _tied(model)


def _tied(model: Any) -> set[str]:
    return {"lm_head.weight"} if model.config.tie_word_embeddings else set()


def _set(model: Any, name: str, tensor: Tensor) -> None:
    """Put a weight in its place, quantised where the module is in 4 bits."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters[leaf]
    if old.shape != tensor.shape:
        raise Unusual(f"{name} is {tuple(tensor.shape)}, not {tuple(old.shape)}")
    if type(old) is nn.Parameter:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    elif tensor.device.type == "cpu" and tensor.shape[1] % old.blocksize:
        raise Unusual(f"bitsandbytes 0.50 misreads rows of {tensor.shape[1]} on some CPUs")
    else:
        module._parameters[leaf] = type(old)(tensor, requires_grad=False, **vars(old)).to(tensor.device)


def _read_quantised(model: Any, folder: Path, on: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    ahead = AHEAD.pop((folder, on), None)
    held = ahead.result() if ahead else _held(folder, on)
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = held.pop(f"{path}.weight")
            stats = {name: held.pop(name) for name in list(held) if name.startswith(f"{path}.weight.")}
            module.weight = Params4bit.from_prequantized(weight, stats, device=on, module=module)
    for name in _wanted(model) & set(held):
        _set(model, name, held[name])


def _finish(model: Any, folder: Path, on: torch.device) -> Any:
    from transformers import GenerationConfig

    model.tie_weights()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise Unusual(f"{left[0]} is in no file")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.config.name_or_path = model.name_or_path = str(folder)
    model.hf_device_map = {"": on if on.index is None else on.index}
    return model.eval()


def _save(model: Any, cached: Path) -> None:
    """One rename publishes the cache; a disk that cannot take it costs the next run its speed and nothing else."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=cached.parent) as work:
            made = Path(work) / "model"
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(made)
            model.generation_config.save_pretrained(made)
            tied, state = _tied(model), model.state_dict()
            _write(made / "model.safetensors", {name: state[name] for name in state if name not in tied})
            shutil.rmtree(cached, ignore_errors=True)
            made.replace(cached)
    except OSError as error:
        sys.stderr.write(f"the quantised base is not kept for the next run: {cached.parent}: {error.strerror}\n")


def _is_whole(cached: Path) -> bool:
    """Whether the cache is there and no file of it is cut short."""
    try:
        for shard in _shards(cached):
            check_safetensors(shard)
    except (ModelError, OSError):
        return False
    return True


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """({name: its dtype, shape and place}, first byte of the data) of a safetensors file."""
    with file.open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _tensors(file: Path, wanted: set[str] | None, on: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the device) in the order of the file."""
    header, begin = _header(file)
    entries = [(*entry["data_offsets"], name, entry) for name, entry in header.items()]
    unknown = {entry["dtype"] for *_, entry in entries} - DTYPES.keys()
    if unknown:
        raise Unusual(f"{file.name} holds {min(unknown)}")
    buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=on.type == "cuda")
    with file.open("rb") as handle:
        for start, end, name, entry in sorted(entries, key=lambda e: e[0]):
            if wanted is None or name in wanted:
                handle.seek(begin + start)
                data = torch.empty(end - start, dtype=torch.uint8, device=on)
                for piece in data.split(PIECE):
                    read = buffer[: len(piece)]
                    handle.readinto(read.numpy().data)
                    piece.copy_(read)
                yield name, data.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file; its library would hold the largest tensor twice."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, ordered = 0, sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    for name, tensor in ordered:
        place = [end, end + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            for piece in tensor.contiguous().view(-1).view(torch.uint8).split(PIECE):
                handle.write(piece.cpu().numpy().data)
