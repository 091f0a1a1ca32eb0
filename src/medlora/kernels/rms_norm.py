"""RMS norm with an optional fused residual addition, forward and backward.

    h = x + residual        r = rsqrt(mean(h^2) + eps)        n = h r        y = w n
    dh = r (w dy - n mean(n w dy)) + d_new_residual        Zhang & Sennrich 2019 (arXiv 1910.07467)

One program holds one row in registers, so a row is read and written once. Kept for the backward pass: h,
which the caller needs anyway as the next residual, and the fp32 r [T]. The weight is frozen in LoRA training
and then gets no gradient; where it does require one, a fixed number of programs walk the rows and sum their
share in fp32. Rounding follows Hugging Face LLaMA: h r is rounded to the input dtype before the
multiplication by w.

Shapes: T tokens, D hidden.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import jit, roomy, row_launch, tl, use_triton

WEIGHT_PROGRAMS = 256  # programs, and fp32 partial rows, of a weight gradient


@jit
def _forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    h: tl.tensor,
    rms: tl.tensor,
    x_row: int,
    y_row: int,
    D: int,
    eps: float,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: y and r, and h where a residual is added."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    value = tl.load(x + row * x_row + col, inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * D + col, inside, other=0.0).to(tl.float32)
        total = value.to(h.dtype.element_ty)
        tl.store(h + row * D + col, total, inside)
        value = total.to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    normed = (value * r).to(y.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + col, inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + col, (normed * w).to(y.dtype.element_ty), inside)
    tl.store(rms + row, r)


@jit
def _backward_kernel(
    dy: tl.tensor,
    dh: tl.tensor,
    h: tl.tensor,
    weight: tl.tensor,
    rms: tl.tensor,
    dx: tl.tensor,
    dw: tl.tensor,
    dh_row: int,
    h_row: int,
    dx_row: int,
    T: int,
    D: int,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rows pid, pid + programs, ...: dx, and the sum of this program's weight gradients."""
    first = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    w = tl.load(weight + col, inside, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, T, tl.num_programs(0)):
        g = tl.load(dy + row * D + col, inside, other=0.0).to(tl.float32)
        r = tl.load(rms + row)
        normed = tl.load(h + row * h_row + col, inside, other=0.0).to(tl.float32) * r
        if WEIGHT:
            share += g * normed.to(dx.dtype.element_ty).to(tl.float32)
        g *= w
        grad = r * (g - normed * (tl.sum(g * normed, 0) / D))
        if RESIDUAL:
            grad += tl.load(dh + row * dh_row + col, inside, other=0.0).to(tl.float32)
        tl.store(dx + row * dx_row + col, grad.to(dx.dtype.element_ty), inside)
    if WEIGHT:
        tl.store(dw + first * D + col, share, inside)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D] -> y, h, r; h is x where nothing is added."""
    T, D = x.shape
    y, r = roomy(x, room), torch.empty(T, dtype=torch.float32, device=x.device)
    add, h = (x, x) if residual is None else (residual, x.new_empty(T, D))
    rows = x.stride(0), y.stride(0)
    _forward_kernel[(T,)](x, add, weight, y, h, r, *rows, D, eps, ADD=residual is not None, **row_launch(D))
    return y, h, r


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, r: Tensor, weight_grad: bool, width: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of h [T, D], its rows `width` apart, and, if asked for, of the weight [D]."""
    T, D = h.shape
    programs = min(T, WEIGHT_PROGRAMS) if weight_grad else T
    dx = roomy(h, width - D)
    dw = torch.empty(programs, D, dtype=torch.float32, device=h.device) if weight_grad else None
    more = dy if dh is None else dh
    _backward_kernel[(programs,)](
        dy, more, h, weight, r, dx, r if dw is None else dw, more.stride(0), h.stride(0), width, T, D,
        RESIDUAL=dh is not None, WEIGHT=weight_grad, **row_launch(D),
    )  # fmt: skip
    return dx, None if dw is None else dw.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, room: int, grad_room: int
    ) -> tuple[Tensor, Tensor]:
        y, h, r = _forward(x, residual, weight, eps, room)
        ctx.save_for_backward(h, weight, r)
        ctx.width = max(x.stride(0), x.shape[1] + grad_room)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, r = ctx.saved_tensors
        if dy is None:  # the norm was not used, only the sum
            return dh, dh, None, None, None, None
        dh = None if dh is None else _dense_rows(dh)
        dx, dw = _backward(dy.contiguous(), dh, h, weight, r, ctx.needs_input_grad[2], ctx.width)
        return dx, dx if ctx.needs_input_grad[1] else None, dw, None, None, None


def _dense_rows(x: Tensor) -> Tensor:
    """x [T, D] itself if its rows are dense, however far they are apart."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension, in x's dtype.

    Args:
        x: [..., D], fp32, bf16 or fp16.
        weight: [D], any float dtype; its gradient is computed only if it requires one.

    Raises:
        ValueError: D above 65536.
    """
    return add_rms_norm(x, None, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, room: int = 0, grad_room: int = 0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) with h = x + residual, in one pass; shapes and errors as `rms_norm`.

    The gradient in x has rows as far apart as x's own.

    Args:
        residual: as x in shape and dtype; None for zero.
        room: columns that are left free behind each row of the former, which then is a view.
        grad_room: columns that the gradient has free at least.
    """
    if not use_triton(x):
        return reference.rms_norm(x, weight, eps, residual)
    flat = _dense_rows(x.reshape(-1, x.shape[-1]))
    other = None if residual is None else residual.reshape(flat.shape).contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (flat, other, weight)):
        y, h = _RMSNorm.apply(flat, other, weight, eps, room, grad_room)
    else:  # autograd's bookkeeping would cost the host more than the launch
        y, h, _ = _forward(flat, other, weight, eps, room)
    return y.view(x.shape), h.view(x.shape)
