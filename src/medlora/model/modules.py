"""What the fused layers read off the linear modules of Transformers, PEFT and bitsandbytes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medlora.kernels.nf4 import DoubleQuant


class Unfusable(Exception):
    """The fused path does not know this model; the message says why."""


class Adapter(NamedTuple):
    """What a PEFT layer adds: scaling * dropout(x) a' b'."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


def adapter_of(module: Any) -> Adapter | None:
    """The active adapter of a PEFT LoRA layer.

    Raises:
        Unfusable: more than one, or a kind with other mathematics.
    """
    if not hasattr(module, "base_layer"):
        return None
    if not hasattr(module, "lora_A"):
        raise Unfusable(f"{type(module).__name__} is not LoRA")
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not active:
        return None
    name = active[0]
    if len(active) > 1:
        raise Unfusable("several adapters are active")
    if name in module.lora_variant or module.lora_bias.get(name):
        raise Unfusable("the adapter is a variant of LoRA (DoRA, biases, ...)")
    drop = module.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) else 0.0
    return Adapter(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], p)


def quantisation_of(base: Any, dtype: torch.dtype) -> tuple[DoubleQuant | None] | None:
    """None for a plain weight; for NF4 a 1-tuple of its second quantisation, if it has one.

    Raises:
        Unfusable: a weight that is trained or stored otherwise.
    """
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    if weight.requires_grad:
        raise Unfusable("base weights are trained")
    if state is None:
        if type(base) is not nn.Linear or weight.dtype != dtype:
            raise Unfusable(f"{type(base).__name__} in {weight.dtype} is neither NF4 nor a plain {dtype} weight")
        return None
    if weight.dtype != torch.uint8 or base.in_features * base.out_features % 64:
        raise Unfusable("4-bit codes stored otherwise than as bytes in whole blocks")
    try:
        return (DoubleQuant.of(state),)
    except ValueError as error:
        raise Unfusable(str(error)) from None
