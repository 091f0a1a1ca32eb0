"""Rotary position embedding of q and k in one launch.

    (a, b) -> (a cos - b sin, b cos + a sin)        Su et al. 2021 (RoFormer, arXiv 2104.09864)

Layout is Hugging Face LLaMA's: a is the first half of a head, b the second ("rotate_half"), and both halves
of a row of cos and sin are equal, so only the first is read. A rotation is undone by the angle's negative, so
the backward pass is the same kernel with -sin and nothing is saved but the tables.

Two forms. `rope_` overwrites q and k, which may be strided views of one fused qkv buffer; autograd does not
see it, so it belongs inside an autograd.Function that owns the buffer. `rope` is differentiable and writes
new tensors: autograd forbids one function to modify two views in place, and reading here while writing there
moves the same bytes.

Shapes: T tokens, H heads of q, G heads of k, d head size.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import jit, next_power_of_2, same_layout, tl, use_triton


@jit
def _rotate_heads(
    source: tl.tensor,
    target: tl.tensor,
    source_head: int,
    target_head: int,
    heads: int,
    half: int,
    cos: tl.tensor,
    sin: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Rotate all heads of one token; cos and sin are register tensors [1, HALF]."""
    head = tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (col < half)
    a = tl.load(source + head * source_head + col, inside).to(tl.float32)
    b = tl.load(source + head * source_head + half + col, inside).to(tl.float32)
    at = target + head * target_head + col
    tl.store(at, (a * cos - b * sin).to(target.dtype.element_ty), inside)
    tl.store(at + half, (b * cos + a * sin).to(target.dtype.element_ty), inside)


@jit
def _rope_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    v_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_token: int,
    q_head: int,
    k_token: int,
    k_head: int,
    v_token: int,
    v_head: int,
    q_out_token: int,
    q_out_head: int,
    k_out_token: int,
    k_out_head: int,
    v_out_token: int,
    v_out_head: int,
    cos_token: int,
    sin_token: int,
    H: int,
    G: int,
    half: int,
    INVERSE: tl.constexpr,
    VALUES: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """One token: every head of q, then every head of k; with VALUES those of v are copied, as many as k's."""
    t = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + t * cos_token + col, col < half).to(tl.float32)
    s = tl.load(sin + t * sin_token + col, col < half).to(tl.float32)
    if INVERSE:
        s = -s
    _rotate_heads(q + t * q_token, q_out + t * q_out_token, q_head, q_out_head, H, half, c, s, Q_HEADS, HALF)
    _rotate_heads(k + t * k_token, k_out + t * k_out_token, k_head, k_out_head, G, half, c, s, K_HEADS, HALF)
    if VALUES:
        head = tl.arange(0, K_HEADS)[:, None]
        inside = (head < G) & (col < half)
        source, target = v + t * v_token + head * v_head + col, v_out + t * v_out_token + head * v_out_head + col
        tl.store(target, tl.load(source, inside), inside)
        tl.store(target + half, tl.load(source + half, inside), inside)


def _launch(heads: tuple[Tensor, ...], out: tuple[Tensor, ...], cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """q and k, and v where it is to be copied."""
    (T, H, d), G = heads[0].shape, heads[1].shape[1]
    values = len(heads) == 3
    every = [*heads, *out] if values else [*heads, heads[1], *out, out[1]]
    _rope_kernel[(T,)](
        *every, cos, sin, *(stride for x in every for stride in x.stride()[:2]), cos.stride(0), sin.stride(0),
        H, G, d // 2, INVERSE=inverse, VALUES=values,
        Q_HEADS=next_power_of_2(H), K_HEADS=next_power_of_2(G), HALF=next_power_of_2(d // 2), num_warps=4,
    )  # fmt: skip


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    same_layout(q[:, 0], k[:, 0])
    same_layout(cos, sin)
    if q.shape[-1] % 2 or cos.shape != (q.shape[0], q.shape[-1]):
        raise ValueError(f"tables {tuple(cos.shape)} do not fit q {tuple(q.shape)}: expected [T, d], d even")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
        _launch((q, k), (q_out, k_out), cos, sin, inverse=False)
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk))
        q_out, k_out = dq.new_empty(dq.shape), dk.new_empty(dk.shape)
        _launch((dq, dk), (q_out, k_out), cos, sin, inverse=True)
        return q_out, k_out, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated copies of q and k, differentiable in both.

    Args:
        q: [T, H, d], last dimension dense, other strides free.
        k: [T, G, d], in q's dtype.
        cos, sin: [T, d] as Hugging Face makes them (two equal halves), any float dtype; no gradient.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    _check(q, k, cos, sin)
    if not use_triton(q):
        return reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
    q_out, k_out = _Rope.apply(q, k, cos, sin)
    return q_out, k_out


@torch.no_grad()
def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> None:
    """Rotate q and k in place, outside autograd; `inverse` rotates back, which is also the backward pass.

    Arguments and errors as `rope`; q and k must not overlap.
    """
    _check(q, k, cos, sin)
    if use_triton(q):
        _launch((q, k), (q, k), cos, sin, inverse)
        return
    for x in (q, k):
        x.copy_(reference.rotate(x, cos, -sin if inverse else sin))


@torch.no_grad()
def rope_back(
    grads: tuple[Tensor, Tensor, Tensor], out: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor
) -> None:
    """Write v's gradient, and q's and k's before their rotation, into given buffers, views of one fused gradient say.

    Args:
        grads: of q [T, H, d], k and v [T, G, d]; last dimension dense, other strides free.
        out: likewise.
        cos, sin: as of `rope`, with its errors.
    """
    (dq, dk, dv), (to_q, to_k, to_v) = grads, out
    _check(dq, dk, cos, sin)
    for grad, to in zip(grads, out, strict=True):
        same_layout(grad, to)
    if use_triton(dq):
        _launch(grads, out, cos, sin, inverse=True)
        return
    for grad, to in ((dq, to_q), (dk, to_k)):
        to.copy_(reference.rotate(grad, cos, -sin))
    to_v.copy_(dv)
