"""The gated activation of LLaMA's feed-forward layer, forward and backward.

    y = silu(g) u = g s u,  s = sigmoid(g)        Shazeer 2020 (GLU variants, arXiv 2002.05202)
    du = dy g s        dg = dy u s (1 + g (1 - s))

Elementwise, hence bandwidth: two reads and one write forward, three and two backward. silu(g) is recomputed
and never stored. Rows may be strided, so gate and up may be the two halves of one [T, 2F] projection, and the
gradients may go into given buffers, gate's and up's own included: every element is read before it is written.

Shapes: T tokens, F intermediate.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import ceil_div, jit, same_layout, tl, use_triton

BLOCK = 1024  # elements a program: 8 a thread, one 16-byte access in bf16


@jit
def _forward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    gate_row: int,
    up_row: int,
    y_row: int,
    F: int,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    g = tl.load(gate + row * gate_row + col, inside).to(tl.float32)
    u = tl.load(up + row * up_row + col, inside).to(tl.float32)
    tl.store(y + row * y_row + col, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), inside)


@jit
def _backward_kernel(
    dy: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    dy_row: int,
    gate_row: int,
    up_row: int,
    dgate_row: int,
    dup_row: int,
    F: int,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    d = tl.load(dy + row * dy_row + col, inside).to(tl.float32)
    g = tl.load(gate + row * gate_row + col, inside).to(tl.float32)
    u = tl.load(up + row * up_row + col, inside).to(tl.float32)
    s = tl.sigmoid(g)
    dg = d * u * s * (1 + g * (1 - s))
    tl.store(dgate + row * dgate_row + col, dg.to(dgate.dtype.element_ty), inside)
    tl.store(dup + row * dup_row + col, (d * g * s).to(dup.dtype.element_ty), inside)


def _forward(gate: Tensor, up: Tensor, y: Tensor | None = None) -> Tensor:
    T, F = gate.shape
    y = gate.new_empty(T, F) if y is None else y
    _forward_kernel[(T, ceil_div(F, BLOCK))](
        gate, up, y, gate.stride(0), up.stride(0), y.stride(0), F, BLOCK=BLOCK, num_warps=4
    )
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_backward(dy if dy.stride(-1) == 1 else dy.contiguous(), gate, up)


def swiglu(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, computed in fp32.

    Args:
        gate, up: [T, F] of one dtype, rows dense, row stride free.
        out: as gate, which it may be, or up; there is no gradient then.

    Raises:
        ValueError: gate, up and out differ in shape, dtype or device, or their rows are not dense.
    """
    same_layout(gate, up, gate if out is None else out)
    if not use_triton(gate):
        y = reference.swiglu(gate, up)
        return y if out is None else out.copy_(y)
    if out is not None:
        return _forward(gate, up, out)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        made: Tensor = _SwiGLU.apply(gate, up)
        return made
    return _forward(gate, up)  # autograd's bookkeeping would cost the host more than the launch


@torch.no_grad()
def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None = None, dup: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` in gate and up, written into `dgate` and `dup` where given.

    Args:
        grad: [T, F], as gate.
        dgate, dup: buffers as gate; they may be gate, up or grad themselves, which are then overwritten.

    Raises:
        ValueError: tensors that differ in shape, dtype or device, or rows that are not dense.
    """
    T, F = gate.shape
    dgate = gate.new_empty(T, F) if dgate is None else dgate
    dup = up.new_empty(T, F) if dup is None else dup
    tensors = (grad, gate, up, dgate, dup)
    same_layout(*tensors)
    if not use_triton(gate):
        to_gate, to_up = reference.swiglu_backward(grad, gate, up)
        return dgate.copy_(to_gate), dup.copy_(to_up)
    rows = (t.stride(0) for t in tensors)
    _backward_kernel[(T, ceil_div(F, BLOCK))](*tensors, *rows, F, BLOCK=BLOCK, num_warps=4)
    return dgate, dup
