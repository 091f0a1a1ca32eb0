"""Causal attention of a packed row that stays inside its documents, with the rotary embedding before it.

Documents of any length pass in one launch: by tiles (`document_attention`) on Hopper, else by the flash kernel behind
torch.nn.attention.varlen, or, on cards before Ampere and in float32, by CUTLASS's kernel behind nested tensors, both
called through aten. Each stands in an autograd function that owns the fused q, k, v buffer: the rotation happens in
that buffer, and the backward pass gives the three gradients as one, ready for the product that follows. Elsewhere (odd
head sizes, a CPU) documents pass one by one through scaled_dot_product_attention.

Shapes: T tokens of the row, H query heads, K key heads, C head size.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel

from .dispatch import is_hopper, upload
from .document_attention import HEAD_SIZES, document_attention, document_attention_backward, serves, tiles_of
from .rope import rope, rope_, rope_back

FLASH_DTYPES = (torch.bfloat16, torch.float16)
CAUSAL = 1  # by the first tokens, to CUTLASS's kernel
# For documents of one length, where it is a multiple of this and not short; the first of them that can.
DENSE_MULTIPLE, DENSE_LENGTH = 256, 1024
DENSE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Not cuDNN's: with torch's own choice of backend, which may be that one, rows of short documents gave NaN.
SAFE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Documents(NamedTuple):
    """A row's positions and borders, in the forms that attention reads."""

    cos: Tensor
    sin: Tensor
    borders: list[int]
    """[0, ..., T] on the host."""
    starts: Tensor
    """The same on the device, int32."""
    longest: int
    alike: bool
    """All are of one length."""
    tiles: Tensor | None = None
    """Of `tiles_of`, where those kernels serve."""

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, borders: list[int]) -> Documents:
        """From the rotary tables [T, C] and the borders; does not wait for the device."""
        starts = upload(torch.tensor(borders, dtype=torch.int32), cos.device)
        lengths = [stop - start for start, stop in pairwise(borders)]
        return cls(cos, sin, borders, starts, max(lengths), len(set(lengths)) == 1)

    def tiled(self) -> Documents:
        """With `tiles`, which all layers share."""
        T, C = self.cos.shape
        return self._replace(tiles=tiles_of(self.starts, T)) if C in HEAD_SIZES and serves(self.cos) else self


class Tails(NamedTuple):
    """The last tokens of conversations, beside each other, and the whole conversations, likewise."""

    queries: Tensor
    """Borders of the former, [0, ..., T] on the device, int32."""
    keys: Tensor
    longest: tuple[int, int]

    @classmethod
    def of(cls, new: Sequence[int], whole: Sequence[int], device: torch.device) -> Tails:
        """From the lengths; does not wait for the device."""
        borders = torch.tensor([[0, *accumulate(new)], [0, *accumulate(whole)]], dtype=torch.int32)
        borders = upload(borders, device)
        return cls(borders[0], borders[1], (max(new), max(whole)))


class _TiledAttention(Function):
    """Rope and causal attention inside documents. `qkv` [T, (H + 2 K) C] is overwritten by its rotation, so
    the function that made it must not have kept it."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, row: Documents, heads: tuple[int, int, int], scale: float, room: int) -> Tensor:
        out, lse = _tiled(qkv, row, heads, scale, room)
        ctx.save_for_backward(qkv, out, lse)
        ctx.row, ctx.heads, ctx.scale = row, heads, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (qkv, out, lse), row = ctx.saved_tensors, ctx.row
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        d_qkv = document_attention_backward(grad, qkv, out, lse, row.tiles, ctx.heads, ctx.scale, row.cos, row.sin)
        return d_qkv, None, None, None, None


def _tiled(qkv: Tensor, row: Documents, heads: tuple[int, int, int], scale: float, room: int) -> tuple[Tensor, Tensor]:
    assert row.tiles is not None
    q, k, _ = _heads(qkv, heads)
    rope_(q, k, row.cos, row.sin)
    return document_attention(qkv, row.tiles, heads, scale, room)


class _FlashAttention(Function):
    """As `_TiledAttention`."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, row: Documents, heads: tuple[int, int, int], scale: float) -> Tensor:
        out, lse, rng, unused, _ = _flash(qkv, row, heads, scale)
        ctx.save_for_backward(qkv, out, lse, rng, unused)
        ctx.row, ctx.heads, ctx.scale = row, heads, scale
        y: Tensor = out.view(len(qkv), -1)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (qkv, out, lse, rng, unused), row, n = ctx.saved_tensors, ctx.row, ctx.row.longest
        with _in_one_order():
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                grad.view(out.shape), *_heads(qkv, ctx.heads), out, lse, row.starts, row.starts, n, n, 0.0, True,
                rng, unused, scale=ctx.scale,
            )  # fmt: skip
        d_qkv = qkv.detach()  # nobody reads q, k and v again: their gradients take their place
        rope_back((dq, dk, dv), _heads(d_qkv, ctx.heads), row.cos, row.sin)
        return d_qkv, None, None, None


def _flash(qkv: Tensor, row: Documents, heads: tuple[int, int, int], scale: float) -> tuple[Tensor, ...]:
    """What aten's flash attention gives, its output [T, H, C] first."""
    q, k, v = _heads(qkv, heads)
    rope_(q, k, row.cos, row.sin)
    found: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        q, k, v, row.starts, row.starts, row.longest, row.longest, 0.0, True, False, scale=scale
    )
    return found


class _CutlassAttention(Function):
    """As `_TiledAttention`; heads share no keys there."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, row: Documents, heads: tuple[int, int, int], scale: float) -> Tensor:
        out, *rest = _cutlass(qkv, row, heads, scale)
        ctx.save_for_backward(qkv, out, *rest)
        ctx.row, ctx.heads, ctx.scale = row, heads, scale
        y: Tensor = out.view(len(qkv), -1)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (qkv, out, lse, seed, offset), row, n, (_, K, C) = ctx.saved_tensors, ctx.row, ctx.row.longest, ctx.heads
        with _in_one_order():
            dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
                grad.view(out.shape), *_apart(qkv, ctx.heads), None, out, row.starts, row.starts, n, n, lse, 0.0, seed,
                offset, CAUSAL, False, scale=ctx.scale,
            )  # fmt: skip
        dk, dv = (t.view(len(qkv), K, -1, C).sum(2) for t in (dk, dv))
        d_qkv = qkv.detach()
        rope_back((dq[0], dk, dv), _heads(d_qkv, ctx.heads), row.cos, row.sin)
        return d_qkv, None, None, None


def _cutlass(qkv: Tensor, row: Documents, heads: tuple[int, int, int], scale: float) -> tuple[Tensor, ...]:
    """(output [1, T, H, C], log-sum-exp, two of dropout's)."""
    q, k, _ = _heads(qkv, heads)
    rope_(q, k, row.cos, row.sin)
    found: tuple[Tensor, ...] = torch.ops.aten._efficient_attention_forward(
        *_apart(qkv, heads), None, row.starts, row.starts, row.longest, row.longest, 0.0, CAUSAL, True, scale=scale
    )
    return found[:4]


def _apart(qkv: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, T, H, C]."""
    (q, k, v), share = _heads(qkv, heads), heads[0] // heads[1]
    return q[None], _repeated(k, share, 1)[None], _repeated(v, share, 1)[None]


def _repeated(keys: Tensor, share: int, dim: int) -> Tensor:
    """For each of the `share` query heads its own."""
    return keys if share == 1 else keys.repeat_interleave(share, dim)


@contextmanager
def _in_one_order() -> Iterator[None]:
    """Programs add up dq as they come, so that a seed would not decide the losses, unless torch's global switch asks
    for one order."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    torch._C._set_deterministic_algorithms(True, warn_only=False)  # torch's own function imports its compiler
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(filling)


class _Rotation(Function):
    """q, k and v as views of `qkv`, which is overwritten by its rotation and then by their gradients."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, row: Documents, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        ctx.row, ctx.heads, ctx.qkv = row, heads, qkv.detach()
        q, k, v = _heads(qkv, heads)
        rope_(q, k, row.cos, row.sin)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        d_qkv, ctx.qkv = ctx.qkv, None  # whose readers are done; the loss, which lives on, would hold it
        rope_back((dq, dk, dv), _heads(d_qkv, ctx.heads), ctx.row.cos, ctx.row.sin)
        return d_qkv, None, None


def _dense_attention(qkv: Tensor, row: Documents, heads: tuple[int, int, int], scale: float) -> Tensor:
    """Documents of one length as a batch [B, heads, L, C]."""
    q, k, v = (t.unflatten(0, (-1, row.longest)).transpose(1, 2) for t in _Rotation.apply(qkv, row, heads))
    with sdpa_kernel(DENSE, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads[0] != heads[1])
    return out.transpose(1, 2).reshape(len(qkv), -1)


def dense_length(tokens: int) -> bool:
    """Whether documents that are all of so many tokens pass as a batch, where a card does so."""
    return tokens % DENSE_MULTIPLE == 0 and tokens >= DENSE_LENGTH


def _is_dense(qkv: Tensor, row: Documents) -> bool:
    """Whether a Hopper card takes the row as a batch of documents of one length."""
    return row.alike and dense_length(row.longest) and is_hopper(qkv.device)


def _heads(qkv: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Views q [T, H, C], k and v [T, K, C]."""
    H, K, C = heads
    q, k, v = qkv.view(len(qkv), H + 2 * K, C).split((H, K, K), 1)
    return q, k, v


def flash_takes(x: Tensor, head_size: int) -> bool:
    """Whether the flash kernel serves x's device and dtype."""
    ready = x.is_cuda and x.dtype in FLASH_DTYPES and head_size % 8 == 0 and head_size <= 256
    return ready and torch.cuda.get_device_capability(x.device) >= (8, 0)


def in_one_launch(x: Tensor, head_size: int) -> bool:
    """Whether documents pass together on x's device and in its dtype, by borders that lie there."""
    return flash_takes(x, head_size) or (x.is_cuda and x.dtype != torch.bfloat16 and head_size % 8 == 0)


def attention(qkv: Tensor, row: Documents, heads: tuple[int, int, int], scale: float, room: int = 0) -> Tensor:
    """Rotary positions and causal attention inside documents: [T, (H + 2 K) C] -> [T, H C].

    By tiles, the flash kernel of torch.nn.attention.varlen or CUTLASS's where dtype, head size and device allow, or as
    a dense batch; else document by document through scaled_dot_product_attention. All but the last overwrite `qkv`.

    Args:
        heads: (H, K, C).
        scale: factor of the scores, usually C ** -0.5.
        room: columns to leave behind each row of the output; only tiles do.
    """
    if in_one_launch(qkv, heads[2]):
        flash = flash_takes(qkv, heads[2])
        if flash and _is_dense(qkv, row):
            return _dense_attention(qkv, row, heads, scale)
        out: Tensor
        trained = torch.is_grad_enabled() and qkv.requires_grad
        if flash and row.tiles is not None:
            how = qkv, row, heads, scale, room
            out = _TiledAttention.apply(*how) if trained else _tiled(*how)[0]
            return out
        if trained:
            out = (_FlashAttention if flash else _CutlassAttention).apply(qkv, row, heads, scale)
            return out
        # without autograd's bookkeeping on the host
        return (_flash if flash else _cutlass)(qkv, row, heads, scale)[0].view(len(qkv), -1)
    q, k, v = _heads(qkv, heads)
    q, k, v = (t.transpose(0, 1)[None] for t in (*rope(q, k, row.cos, row.sin), v))
    return by_document(q, k, v, row.borders, scale)[0].transpose(0, 1).reshape(len(qkv), -1)


def tail_attention(q: Tensor, k: Tensor, v: Tensor, tails: Tails, scale: float) -> Tensor:
    """Causal attention of each conversation's last tokens over all of it, one launch; where `flash_takes` q.

    The flash kernel (2.1 and later, as in torch) lets the last query see the last key.

    Args:
        q: [T, H, C], rotated.
        k, v: [all tokens, K, C].
    """
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, tails.queries, tails.keys, *tails.longest, 0.0, True, False, scale=scale
    )[0]
    return out


def by_document(q: Tensor, k: Tensor, v: Tensor, borders: list[int], scale: float) -> Tensor:
    """Causal attention of each document by itself: q [1, H, T, C], k, v [1, K, T, C] -> [1, H, T, C]."""
    if q.is_cuda and not flash_takes(q, q.shape[3]):  # what else shares keys writes all scores down
        k, v = (_repeated(t, q.shape[1] // t.shape[1], 1) for t in (k, v))
    with sdpa_kernel(SAFE):
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, i:j], k[:, :, i:j], v[:, :, i:j], is_causal=True, scale=scale, enable_gqa=True
            )
            for i, j in pairwise(borders)
        ]
    return torch.cat(parts, 2)
