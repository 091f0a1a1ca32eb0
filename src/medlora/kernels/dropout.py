"""Inverted dropout whose mask is a function of (seed, element index) and is never stored.

    y_i = [draw_i >= p] x_i / (1 - p)        draw_i from Philox 4x32-7, Salmon et al. 2011 (Random123)

A stored mask costs a byte an element and a second pass; a counter-based generator gives the same bits again
from the seed, in the backward pass and on any device. One Philox call yields four 32-bit words: they are
split into eight 16-bit draws, so that a thread makes one call for the eight bf16 elements of one 16-byte
access, and the arithmetic stays below the cost of the memory traffic. A 16-bit draw rounds p to a multiple of
2^-16, an error below 1e-5.

Which word serves which element (0, 2, 1, 3, low half first) is what two `tl.join` give without moving data
between threads; `reference.dropout_mask` is the same function in integer PyTorch, and the CPU's
implementation.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import ceil_div, jit, tl, use_triton

GROUPS = 256  # Philox calls a program: 2048 elements


@partial(jit, do_not_specialize=["offset"])  # or every kind of offset would compile its own kernel
def _dropout_kernel(
    x: tl.tensor,
    y: tl.tensor,
    n: int,
    width: int,
    x_row: int,
    threshold: int,
    scale: float,
    seed: tl.tensor,  # int64 [1]
    offset: int,
    GROUPS: tl.constexpr,
) -> None:
    """y = mask * x * scale over elements [pid * 8 GROUPS, (pid + 1) * 8 GROUPS); rows of x, if there are several, are
    of `width` elements, a multiple of 8, and begin every `x_row`, likewise."""
    pid = tl.program_id(0)
    group = pid * GROUPS + tl.arange(0, GROUPS)
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed) + offset, group, 7)
    words = tl.reshape(tl.join(tl.join(r0, r1), tl.join(r2, r3)), (GROUPS, 4))
    draws = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (GROUPS, 8)).to(tl.int32)
    first = group.to(tl.int64) * 8
    source = tl.multiple_of(first // width * x_row + first % width, 8)
    each = tl.arange(0, 8)[None, :]
    at = first[:, None] + each
    inside = at < n
    value = tl.where(draws >= threshold, tl.load(x + source[:, None] + each, inside).to(tl.float32) * scale, 0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


def _launch(x: Tensor, y: Tensor, p: float, seed: Tensor, offset: int) -> None:
    n = x.numel()
    width, row = (n, n) if x.is_contiguous() else (x.shape[1], x.stride(0))
    _dropout_kernel[(ceil_div(n, GROUPS * 8),)](
        x, y, n, width, row, round(p * 65536), 1 / (1 - p), seed, offset, GROUPS=GROUPS, num_warps=4
    )


def _readable(x: Tensor) -> Tensor:
    """x, or a dense copy where the kernel does not read its rows as they lie."""
    apart = x.dim() == 2 and x.stride(1) == 1 and not (x.shape[1] % 8 or x.stride(0) % 8)
    return x if apart else x.contiguous()


def _check(p: float, seed: int | Tensor) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        raise ValueError(f"dropout seed must be in [0, 2**63), got {seed}")


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
        ctx.how = p, seed, offset
        y = x.new_empty(x.shape)
        _launch(x, y, *ctx.how)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return dropout(grad, *ctx.how), None, None, None


def dropout(x: Tensor, p: float, seed: int | Tensor, offset: int = 0) -> Tensor:
    """mask(seed) * x / (1 - p), differentiable; applied to a gradient it is its own backward pass.

    Args:
        x: any shape, fp32, bf16 or fp16; elements are numbered in row-major order. The result is dense.
        p: probability of a zero, in [0, 1).
        seed: in [0, 2**63), or int64 [1] on x's device, so that a CUDA graph can read another at each replay; one seed,
            one mask, on every device. p = 0 returns x itself.
        offset: added to the seed.

    Raises:
        ValueError: p or seed outside its range.
    """
    _check(p, seed)
    if p == 0:
        return x
    if not use_triton(x):
        return reference.dropout(x, p, int(seed) + offset)
    x = _readable(x)
    seed = torch.tensor([seed], device=x.device) if isinstance(seed, int) else seed
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _Dropout.apply(x, p, seed, offset)
        return y
    y = x.new_empty(x.shape)  # autograd's bookkeeping would cost the host more than the launch
    _launch(x, y, p, seed, offset)
    return y
