"""Load a base in 4-bit NF4 (Dettmers et al. 2023, arXiv:2305.14314).

On a GPU bitsandbytes keeps the 4-bit codes, read straight onto the card by `stream`, and every product dequantises
them. On a CPU memory is not the bottleneck and the dequantisation is: what `stream` reads is dequantised once. Both
hold the same values, and leave the codes for the next start.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from medlora.errors import ModelError
from medlora.model import stream
from medlora.model.base import Resolved, _unloadable, load_config, resolve
from medlora.model.stream import Unusual, load_nf4
from medlora.recipe import Base

NF4_BLOCK = 64


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(base: Base, on: torch.device) -> torch.dtype:
    """The dtype that products run in: bfloat16 where the device has it."""
    if base.compute_dtype != "auto":
        dtype: torch.dtype = getattr(torch, base.compute_dtype)
        return dtype
    if on.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def read_ahead(base: Base) -> Callable[[], None]:
    """Begin, in a thread, to read onto the GPU what an earlier start kept of this base: `load_model` then finds it
    there. For callers who have yet to import Transformers, which takes seconds. What is returned ends that.

    Raises:
        ModelError, AssetError: as `resolve`.
    """
    resolved, on = resolve(base), device()
    if base.quantization != "nf4" or on.type != "cuda":  # on a CPU dequantising takes most of the time
        return lambda: None
    return stream.read_ahead(resolved, base.double_quant, compute_dtype(base, on), on)


def load_model(resolved: Resolved, base: Base, on: torch.device | None = None) -> Any:
    """The base as a `PreTrainedModel`, frozen, its cache off.

    Raises:
        ModelError: the weights cannot be read, or the device's memory does not hold them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    on = on or device()
    dtype = compute_dtype(base, on)
    kwargs = resolved.kwargs() | {"dtype": "auto", "attn_implementation": "sdpa"}
    if resolved.gguf_file:
        from transformers import GgufConfig

        kwargs |= {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype}
    elif not resolved.is_local:
        kwargs["use_safetensors"] = True  # never a pickle
    streams = base.quantization == "nf4" and not resolved.gguf_file
    four_bit_on_gpu = streams and on.type == "cuda"
    if streams:
        try:
            return _frozen(_streamed(resolved, base, dtype, on))
        except Unusual as reason:
            if four_bit_on_gpu:
                sys.stderr.write(f"{resolved.path}: loaded through Transformers, since {reason}\n")
        except torch.OutOfMemoryError:
            raise _too_large(resolved, on) from None
    if four_bit_on_gpu:
        kwargs |= {
            "quantization_config": _bitsandbytes(base, dtype),
            "device_map": {"": on.index or 0},
            "dtype": dtype,
        }
    try:
        model = AutoModelForCausalLM.from_pretrained(resolved.path, **kwargs)
        if not four_bit_on_gpu:
            model = _place(model, base, on, dtype)
    except torch.OutOfMemoryError:
        raise _too_large(resolved, on) from None
    except Exception as error:
        raise _unloadable(resolved, "weights", error) from None
    return _frozen(model)


def _streamed(resolved: Resolved, base: Base, dtype: torch.dtype, on: torch.device) -> Any:
    if on.type == "cuda":
        return load_nf4(resolved, _bitsandbytes(base, dtype), dtype, on)
    stored = load_config(resolved).dtype  # rounded as its files have them
    if not isinstance(stored, torch.dtype):
        raise Unusual("its configuration names no dtype")
    model = load_nf4(resolved, _bitsandbytes(base, stored), stored, on).dequantize(stored)
    del model.is_loaded_in_4bit, model.hf_device_map  # which trainers ask for
    return model.to(dtype)


def _frozen(model: Any) -> Any:
    model.config.use_cache = False
    return model.requires_grad_(False)


def _too_large(resolved: Resolved, on: torch.device) -> ModelError:
    return ModelError(f"{resolved.path}: too large for the memory of {on}; see `medlora doctor`")


def _bitsandbytes(base: Base, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=base.double_quant,
    )


def _place(model: nn.Module, base: Base, on: torch.device, dtype: torch.dtype) -> nn.Module:
    if base.quantization == "nf4":
        round_to_nf4(model, base.double_quant)
    return model.to(device=on, dtype=dtype)


@torch.no_grad()
def round_to_nf4(model: nn.Module, double_quant: bool = False) -> None:
    """Replace each linear weight but the output head's by its NF4 rounding, in place.

    The values are those that bitsandbytes' `Linear4bit` computes with: blocks of 64, absmax in float32.
    """
    from bitsandbytes import functional as bnb

    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weight = module.weight.data
            codes, state = bnb.quantize_4bit(  # flat: bitsandbytes 0.50 misreads rows that are no multiple of a block
                weight.flatten(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=double_quant
            )
            module.weight.data = bnb.dequantize_4bit(codes, state).view(weight.shape)
