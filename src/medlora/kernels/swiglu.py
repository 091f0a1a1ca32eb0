"""The gated activation of LLaMA's feed-forward layer, forward and backward.

    y = silu(g) u = g s u,  s = sigmoid(g)        Shazeer 2020 (GLU variants, arXiv 2002.05202)
    du = dy g s        dg = dy u s (1 + g (1 - s))

Elementwise, hence bandwidth: two reads and one write forward, three and two backward. silu(g) is recomputed
and never stored. Rows may be strided, so gate and up may be the two halves of one [T, 2F] projection, and the
gradients may go into given buffers, gate's and up's own included: every element is read before it is written.

Where LoRA's products with dy's rank-R gradient and with dg and du ask for the same tiles, one kernel makes all of
them: T rows in a few shares, each adding up its products on the tensor cores while the tiles pass. And where gate
and up, or dy, still lack LoRA's term h b' or dh a, it is added there, rather than by a pass of its own or by products
made wider for it.

Shapes: T tokens, F intermediate, R and Q ranks.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import TensorDescriptor, ceil_div, jit, same_layout, tl, use_triton
from .reference import Pair

BLOCK = 1024  # elements a program: 8 a thread, one 16-byte access in bf16
RANKS = (16, 32, 64)  # that the tensor cores take and registers hold
MULTIPLE = 16  # bytes, by which descriptors count
ROWS = 32  # of a tile backward, so that a multiprocessor holds the registers of two programs and more
FORWARD = {2: (64, 8), 4: (32, 4)}  # rows of a tile and warps forward, by the bytes of an element
FORWARD_PROGRAMS = 2048  # which fill an H100 some three times
BACKWARD_AT_ONCE = 264  # programs, on an H100
MOST_SHARES = 16
SUMS = 0.009  # of the time that BACKWARD_AT_ONCE programs take for T rows, that a share's sums do where T equals F


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
    silu, ds = g * s, d * s
    return ds * u * (1 + (g - silu)), ds * g, silu * u


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
def _adapted_forward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    h: tl.tensor,
    b: tl.tensor,
    y: tl.tensor,
    x_row: int,
    h_row: int,
    b_half: int,
    b_row: int,
    y_row: int,
    T: int,
    F: int,
    share: int,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Columns of one share of the rows: y of gate + h_g b_g' and up + h_u b_u'."""
    first, part = tl.program_id(0) * COLUMNS, tl.program_id(1)
    col, rank = (first + tl.arange(0, COLUMNS))[None, :], tl.arange(0, Q)[None, :]
    b_g, b_u = _both(b, b_half, b_row, first, F, Q, COLUMNS)
    for start in tl.range(part * share, (part + 1) * share, ROWS, num_stages=3):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside, h_at = (row < T) & (col < F), h + row * h_row + rank
        g = tl.load(gate + row * x_row + col, inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * x_row + col, inside, other=0.0).to(tl.float32)
        h_g, h_u = tl.load(h_at, row < T, other=0.0), tl.load(h_at + Q, row < T, other=0.0)
        g = tl.dot(h_g, b_g.T, g, input_precision="ieee")
        u = tl.dot(h_u, b_u.T, u, input_precision="ieee")
        tl.store(y + row * y_row + col, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), inside)


@jit
def _adapted_backward_kernel(
    dy: tl.tensor_descriptor,
    x: tl.tensor_descriptor,
    dh: tl.tensor_descriptor,
    h: tl.tensor_descriptor,
    a: tl.tensor,
    b: tl.tensor,
    da: tl.tensor,
    db: tl.tensor,
    a_row: int,
    b_half: int,
    b_row: int,
    F: int,
    share: int,
    R: tl.constexpr,
    Q: tl.constexpr,
    ABOVE: tl.constexpr,
    BELOW: tl.constexpr,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Columns of one share of the rows: gate and up become dg and du, and, if AGAIN, dy becomes y. If ABOVE, dy + dh a
    stands for dy, and dh' y is made; if BELOW, gate + h_g b_g' and up + h_u b_u' for gate and up, and dg' h_g and
    du' h_u are. Tiles lie across, columns first, so that what a product gives is what the next one reads."""
    first, part = tl.program_id(0) * COLUMNS, tl.program_id(1)
    col, over, under = (first + tl.arange(0, COLUMNS))[:, None], tl.arange(0, R)[None, :], tl.arange(0, Q)[None, :]
    if ABOVE:
        a_tile = tl.load(a + over * a_row + col, col < F, other=0.0)
        sum_a = tl.zeros((COLUMNS, R), tl.float32)
    if BELOW:
        b_g, b_u = _both(b, b_half, b_row, first, F, Q, COLUMNS)
        sum_g = tl.zeros((COLUMNS, Q), tl.float32)
        sum_u = tl.zeros((COLUMNS, Q), tl.float32)
    for row in tl.range(part * share, (part + 1) * share, ROWS, num_stages=3):
        d = dy.load([row, first]).T.to(tl.float32)
        g = x.load([row, 0, first]).reshape(ROWS, COLUMNS).T.to(tl.float32)
        u = x.load([row, 1, first]).reshape(ROWS, COLUMNS).T.to(tl.float32)
        if ABOVE:
            d_rank = dh.load([row, 0])
            d = tl.dot(a_tile, d_rank.T, d, input_precision="ieee")
        if BELOW:
            h_g, h_u = h.load([row, 0, 0]).reshape(ROWS, Q), h.load([row, 1, 0]).reshape(ROWS, Q)
            g = tl.dot(b_g, h_g.T, g, input_precision="ieee")
            u = tl.dot(b_u, h_u.T, u, input_precision="ieee")
        dg, du, value = _gradients(d, g, u)
        dg, du, value = dg.to(x.dtype), du.to(x.dtype), value.to(x.dtype)
        x.store([row, 0, first], dg.T.reshape(ROWS, 1, COLUMNS))
        x.store([row, 1, first], du.T.reshape(ROWS, 1, COLUMNS))
        if AGAIN:
            dy.store([row, first], value.T)
        if ABOVE:
            sum_a = tl.dot(value, d_rank, sum_a, input_precision="ieee")
        if BELOW:
            sum_g = tl.dot(dg, h_g, sum_g, input_precision="ieee")
            sum_u = tl.dot(du, h_u, sum_u, input_precision="ieee")
    if ABOVE:
        tl.store(da + (part * R + over) * F + col, sum_a, col < F)
    if BELOW:
        db_at = db + (part * 2 * F + col) * Q + under
        tl.store(db_at, sum_g, col < F)
        tl.store(db_at + F * Q, sum_u, col < F)


@jit
def _both(
    b: tl.tensor, half: int, row: int, first: int, F: int, Q: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Tiles [COLUMNS, Q] of b_g and b_u."""
    col = (first + tl.arange(0, COLUMNS))[:, None]
    at = b + col * row + tl.arange(0, Q)[None, :]
    return tl.load(at, col < F, other=0.0), tl.load(at + half, col < F, other=0.0)


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
def swiglu_adapted(gate: Tensor, up: Tensor, h: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate + h_g b_g') * (up + h_u b_u'), computed in fp32: `swiglu` of products that lack LoRA's term.

    Args:
        gate, up: [T, F], the halves of one buffer; their rows, y's, dh's and h's lie multiples of 16 bytes apart.
        h: [T, 2 Q], h_g beside h_u; Q is one of `RANKS`.
        b: [2, F, Q], b_g and b_u, rows dense.
        out: [T, F], as gate.

    Raises:
        ValueError: tensors that do not fit.
    """
    y = gate.new_empty(gate.shape) if out is None else out
    _check(gate, up, y, None, (h, b))
    if not use_triton(gate):
        return y.copy_(reference.swiglu(*reference.adapted(gate, up, h, b)))
    (T, F), Q, columns, (rows, warps) = gate.shape, b.shape[2], 64, FORWARD[gate.element_size()]
    blocks = ceil_div(F, columns)
    parts, share = _shares(T, max(1, FORWARD_PROGRAMS // blocks), rows)
    _adapted_forward_kernel[(blocks, parts)](
        gate, up, h, b, y, gate.stride(0), h.stride(0), b.stride(0), b.stride(1), y.stride(0), T, F, share,
        Q=Q, ROWS=rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return y


@torch.no_grad()
def swiglu_adapted_backward(
    grad: Tensor, gate: Tensor, up: Tensor, above: Pair | None, below: Pair | None, *, value: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """`swiglu_backward` in place, gate and up becoming dg and du, with what LoRA asks of the same tiles.

    Args:
        grad: [T, F], as gate and up, which are as of `swiglu_adapted`.
        above: (dh [T, R], a [R, F]) of the module that reads y: grad lacks dh a. R is one of `RANKS`.
        below: (h, b) of those that make gate and up, as of `swiglu_adapted`: they lack h b'.
        value: grad becomes y.

    Returns:
        (a's gradient dh' y [R, F], b's gradients dg' h_g and du' h_u [2, F, Q]), float32, None without above or below.

    Raises:
        ValueError: tensors that do not fit.
    """
    if above is None and below is None:
        swiglu_backward(grad, gate, up, gate, up, grad if value else None)
        return None, None
    _check(gate, up, grad, above, below)
    if not use_triton(gate):
        dg, du, y, da, db = reference.swiglu_adapted_backward(grad, gate, up, above, below)
        for into, found in ((gate, dg), (up, du), *([(grad, y)] if value else ())):
            into.copy_(found)
        return da, db
    (T, F), columns = gate.shape, 128 // gate.element_size()  # as shared memory holds
    (dh, a), (h, b) = above or (grad, grad), below or (gate, grad[None])
    R, Q = len(a) if above else b.shape[2], b.shape[2] if below else len(a)
    blocks = ceil_div(F, columns)
    parts, share = _shares(T, _evenest(T, F, blocks), ROWS)
    da = torch.empty(parts, R, F, dtype=torch.float32, device=gate.device) if above else None
    db = torch.empty(parts, 2, F, Q, dtype=torch.float32, device=gate.device) if below else None
    of = TensorDescriptor.from_tensor
    _adapted_backward_kernel[(blocks, parts)](
        of(grad, [ROWS, columns]), _halves(gate, columns), of(dh[:, :R], [ROWS, R]), _halves(h[:, :Q], Q), a, b,
        db if da is None else da, da if db is None else db, a.stride(0), b.stride(0), b.stride(1), F, share,
        R=R, Q=Q, ABOVE=above is not None, BELOW=below is not None, AGAIN=value, ROWS=ROWS, COLUMNS=columns,
        num_warps=4,
    )  # fmt: skip
    return None if da is None else da.sum(0), None if db is None else db.sum(0)


@cache
def _evenest(T: int, F: int, blocks: int) -> int:
    """The number of shares by which the last programs to run leave least idle, and sums do not take long."""
    return min(range(1, MOST_SHARES + 1), key=lambda n: ceil_div(blocks * n, BACKWARD_AT_ONCE) / n + SUMS * n * F / T)


def _shares(T: int, wanted: int, rows: int) -> tuple[int, int]:
    """(shares of the rows, rows of a share): whole tiles."""
    share = ceil_div(ceil_div(T, wanted), rows) * rows
    return ceil_div(T, share), share


def _halves(x: Tensor, columns: int) -> Any:
    """Of x [T, W] and what lies beside it, as wide."""
    T, W = x.shape
    return TensorDescriptor(x, [T, 2, W], [x.stride(0), W, 1], [ROWS, 1, columns])


def _check(gate: Tensor, up: Tensor, y: Tensor, above: Pair | None, below: Pair | None) -> None:
    same_layout(gate, up, y)
    (T, F), step = gate.shape, gate.shape[1] * gate.element_size()
    tiled = gate, y, *(above or ())[:1], *(below or ())[:1]
    steps = step, *(n for x in tiled for n in (x.data_ptr(), x.stride(0) * x.element_size()))
    fit = gate.stride() == up.stride() and up.data_ptr() == gate.data_ptr() + step
    fit &= not any(n % MULTIPLE for n in steps)
    if above:
        dh, a = above
        fit &= len(a) in RANKS and dh.shape == (T, len(a)) and a.shape[1] == F
    if below:
        h, b = below
        fit &= b.shape[2] in RANKS and h.shape == (T, 2 * b.shape[2]) and b.shape[:2] == (2, F)
    if not fit:
        shapes = [tuple(x.shape) for x in (gate, *(above or ()), *(below or ()))]
        wanted = f"halves of one buffer, rows {MULTIPLE} bytes apart or multiples, and adapters with ranks of {RANKS}"
        raise ValueError(f"expected {wanted}, got {shapes}")
