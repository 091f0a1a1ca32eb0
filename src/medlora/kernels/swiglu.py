"""The gated activation of LLaMA's feed-forward layer, forward and backward.

    y = silu(g) u = g s u,  s = sigmoid(g)        Shazeer 2020 (GLU variants, arXiv 2002.05202)
    du = dy g s        dg = dy u s (1 + g (1 - s))

Elementwise, hence bandwidth: two reads and one write forward, three and two backward. silu(g) is recomputed
and never stored. Rows may be strided, so gate and up may be the two halves of one [T, 2F] projection, and the
gradients may go into given buffers, gate's and up's own included: every element is read before it is written.

Where LoRA's products with dy's rank-R gradient and with dg and du ask for the same tiles, one kernel makes all of
them: T rows in a few shares, each adding up its products on the tensor cores while the tiles pass.

Shapes: T tokens, F intermediate, R and Q ranks.
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
RANKS = (16, 32, 64)  # that the tensor cores take and registers hold
SHARES = 6  # of the rows, for each block of columns: four programs a multiprocessor at 11,008 columns
PROGRAMS = 256  # at least, if there are rows for so many: narrow models have few columns


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
def _gradients(d: tl.tensor, g: tl.tensor, u: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(dg, du, y), in fp32 as they come."""
    s = tl.sigmoid(g)
    return d * u * s * (1 + g * (1 - s)), d * g * s, g * s * u


@jit
def _backward_kernel(
    dy: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    y: tl.tensor,
    dy_row: int,
    gate_row: int,
    up_row: int,
    dgate_row: int,
    dup_row: int,
    y_row: int,
    F: int,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < F
    d = tl.load(dy + row * dy_row + col, inside).to(tl.float32)
    g = tl.load(gate + row * gate_row + col, inside).to(tl.float32)
    u = tl.load(up + row * up_row + col, inside).to(tl.float32)
    dg, du, value = _gradients(d, g, u)
    tl.store(dgate + row * dgate_row + col, dg.to(dgate.dtype.element_ty), inside)
    tl.store(dup + row * dup_row + col, du.to(dup.dtype.element_ty), inside)
    if AGAIN:
        tl.store(y + row * y_row + col, value.to(y.dtype.element_ty), inside)


@jit
def _adapted_kernel(
    dy: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    dh: tl.tensor,
    h: tl.tensor,
    da: tl.tensor,
    db: tl.tensor,
    dy_row: int,
    x_row: int,
    dh_row: int,
    h_row: int,
    T: int,
    F: int,
    share: int,
    R: tl.constexpr,
    Q: tl.constexpr,
    FEEDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Columns of one share of the rows: gate and up become dg and du; dh' y and, if FEEDS, h_g' dg and h_u' du."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    rank, below = tl.arange(0, R), tl.arange(0, Q)
    sum_a = tl.zeros((R, COLUMNS), tl.float32)
    if FEEDS:
        sum_g = tl.zeros((Q, COLUMNS), tl.float32)
        sum_u = tl.zeros((Q, COLUMNS), tl.float32)
    for start in tl.range(part * share, (part + 1) * share, ROWS, num_stages=2):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < T) & (col < F)[None, :]
        g_at, u_at = gate + row * x_row + col[None, :], up + row * x_row + col[None, :]
        d = tl.load(dy + row * dy_row + col[None, :], inside, other=0.0).to(tl.float32)
        g = tl.load(g_at, inside, other=0.0).to(tl.float32)
        u = tl.load(u_at, inside, other=0.0).to(tl.float32)
        dg, du, y = _gradients(d, g, u)
        dg, du, y = dg.to(gate.dtype.element_ty), du.to(gate.dtype.element_ty), y.to(gate.dtype.element_ty)
        tl.store(g_at, dg, inside)
        tl.store(u_at, du, inside)
        d_rank = tl.load(dh + row * dh_row + rank[None, :], row < T, other=0.0)
        sum_a = tl.dot(tl.trans(d_rank), y, sum_a, input_precision="ieee")
        if FEEDS:
            h_at = h + row * h_row + below[None, :]
            h_g, h_u = tl.load(h_at, row < T, other=0.0), tl.load(h_at + Q, row < T, other=0.0)
            sum_g = tl.dot(tl.trans(h_g), dg, sum_g, input_precision="ieee")
            sum_u = tl.dot(tl.trans(h_u), du, sum_u, input_precision="ieee")
    inside = (col < F)[None, :]
    tl.store(da + (part * R + rank[:, None]) * F + col[None, :], sum_a, inside)
    if FEEDS:
        b_at = db + (part * 2 * F + col[None, :]) * Q + below[:, None]
        tl.store(b_at, sum_g, inside)
        tl.store(b_at + F * Q, sum_u, inside)


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
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` in gate and up, written into `dgate` and `dup` where given.

    Args:
        grad: [T, F], as gate.
        dgate, dup: buffers as gate; they may be gate, up or grad themselves, which are then overwritten.
        y: a buffer for the value of `swiglu`, where it is asked for; likewise.

    Raises:
        ValueError: tensors that differ in shape, dtype or device, or rows that are not dense.
    """
    T, F = gate.shape
    dgate = gate.new_empty(T, F) if dgate is None else dgate
    dup = up.new_empty(T, F) if dup is None else dup
    tensors = (grad, gate, up, dgate, dup, grad if y is None else y)
    same_layout(*tensors)
    if not use_triton(gate):
        to_gate, to_up = reference.swiglu_backward(grad, gate, up)
        if y is not None:
            y.copy_(reference.swiglu(gate, up))
        return dgate.copy_(to_gate), dup.copy_(to_up)
    rows = (t.stride(0) for t in tensors)
    _backward_kernel[(T, ceil_div(F, BLOCK))](*tensors, *rows, F, AGAIN=y is not None, BLOCK=BLOCK, num_warps=4)
    return dgate, dup


@torch.no_grad()
def swiglu_adapted_backward(
    grad: Tensor, gate: Tensor, up: Tensor, dh: Tensor, h: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """gate and up become their gradients, dg and du; (dh' y [R, F], (dg' h_g, du' h_u) [2, F, Q]), both float32.

    With y the value of `swiglu` and dh the gradient of its product with LoRA's A this is A's gradient, and with h
    what gate's and up's B were multiplied by, theirs.

    Args:
        grad: [T, F], as gate, of which up is the other half in one buffer.
        dh: [T, R], as gate; R is one of `RANKS`.
        h: [T, 2 Q], h_g beside h_u; likewise.

    Raises:
        ValueError: tensors that do not fit.
    """
    (T, F), R, Q = gate.shape, dh.shape[1], 0 if h is None else h.shape[1] // 2
    same_layout(grad, gate, up)
    if R not in RANKS or (h is not None and Q not in RANKS) or gate.stride() != up.stride():
        raise ValueError(f"expected ranks of {RANKS} and halves of one buffer, got {R}, {Q} and {gate.stride()}")
    if not use_triton(gate):
        da = dh.float().t() @ reference.swiglu(gate, up).float()
        for half, to in zip((gate, up), reference.swiglu_backward(grad, gate, up), strict=True):
            half.copy_(to)
        if h is None:
            return da, None
        h_g, h_u = h.float().chunk(2, 1)
        return da, torch.stack([gate.float().t() @ h_g, up.float().t() @ h_u])
    rows, columns = (64, 128) if gate.element_size() == 2 else (32, 64)  # what shared memory holds
    blocks = ceil_div(F, columns)
    share = ceil_div(ceil_div(T, max(SHARES, ceil_div(PROGRAMS, blocks))), rows) * rows
    parts = ceil_div(T, share)
    da = torch.empty(parts, R, F, dtype=torch.float32, device=gate.device)
    db = None if h is None else torch.empty(parts, 2, F, Q, dtype=torch.float32, device=gate.device)
    _adapted_kernel[(blocks, parts)](
        grad, gate, up, dh, dh if h is None else h, da, da if db is None else db,
        grad.stride(0), gate.stride(0), dh.stride(0), 0 if h is None else h.stride(0), T, F, share,
        R=R, Q=Q or R, FEEDS=h is not None, ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return da.sum(0), None if db is None else db.sum(0)
