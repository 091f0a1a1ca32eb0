"""Attention of one new token a row over a cache kept in pages, and the rotary embedding that comes before it.

    out = softmax(q K' scale) V over the row's own positions

A row's keys lie in pages of 64 positions, named by its line of a block table (Kwon et al. 2023, arXiv 2309.06180), so
that rows of any length share one pool. A program takes one key head of one row, with all query heads that read it
(grouped queries load keys once), and some of the pages; with few rows the positions are cut into shares so that
the GPU is full, and a second launch joins the shares by their log-sum-exp ("flash decoding", Dao et al. 2023).
Grids depend on the table's width alone and programs beyond a row's length return at once, so a CUDA graph holds while
rows grow.

Shapes: B rows, H query heads, K key heads, C head size, P pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .cuda import early_start, wait_for_inputs
from .dispatch import ceil_div, jit, next_power_of_2, tl, use_triton

PAGE = 64  # positions
PROGRAMS = 264  # two on each of 132 multiprocessors


@jit
def _rope_append_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    lengths: tl.tensor,
    q_out: tl.tensor,
    qkv_row: int,
    cos_row: int,
    sin_row: int,
    table_row: int,
    H: int,
    K: int,
    half: int,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Some heads of row program_id(0) by program_id(1): the H of q, then the K of k, then those of v."""
    wait_for_inputs(EARLY)
    row, head = tl.program_id(0), tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    position = tl.load(lengths + row) - 1
    col = tl.arange(0, HALF)[None, :]
    inside = (head < H + 2 * K) & (col < half)
    source = qkv + row.to(tl.int64) * qkv_row + head * 2 * half + col
    a = tl.load(source, inside)
    b = tl.load(source + half, inside)
    at = tl.maximum(position, 0)
    page = tl.load(table + row * table_row + at // 64).to(tl.int64)
    c = tl.load(cos + at.to(tl.int64) * cos_row + col, col < half).to(tl.float32)
    s = tl.load(sin + at.to(tl.int64) * sin_row + col, col < half).to(tl.float32)
    a32 = a.to(tl.float32)
    b32 = b.to(tl.float32)
    turned = head < H + K
    a = tl.where(turned, a32 * c - b32 * s, a32).to(qkv.dtype.element_ty)
    b = tl.where(turned, b32 * c + a32 * s, b32).to(qkv.dtype.element_ty)
    to = q_out + (row.to(tl.int64) * H + head) * 2 * half + col
    tl.store(to, a, inside & (head < H))
    tl.store(to + half, b, inside & (head < H))
    kept = inside & (head >= H) & (position >= 0)
    slot = (page * 64 + at % 64) * K + head - H
    to = k_cache + slot * 2 * half + col
    tl.store(to, a, kept & turned)
    tl.store(to + half, b, kept & turned)
    to = v_cache + (slot - K) * 2 * half + col
    tl.store(to, a, kept & (head >= H + K))
    tl.store(to + half, b, kept & (head >= H + K))


@jit
def _attention_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    table_row: int,
    K: int,
    group: int,
    C: int,
    pages: int,
    scale: float,
    SHARES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Key head program_id(1) of row program_id(0) over share program_id(2) of `pages` pages.

    Writes out [B, H, SHARES, C], fp32 where there are several shares, and lse [B, H, SHARES] then.
    """
    wait_for_inputs(EARLY)
    row, head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    start = share * pages * 64
    if (start >= length) & (share > 0):
        return
    member, col, position = tl.arange(0, GROUP), tl.arange(0, WIDTH), tl.arange(0, 64)
    heads = (row * K + head) * group + member  # of B H
    inside = (member < group)[:, None] & (col < C)[None, :]
    query = tl.load(q + heads.to(tl.int64)[:, None] * C + col[None, :], inside, other=0.0)
    top = tl.full((GROUP,), -1e30, tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, WIDTH), tl.float32)
    for first in range(start, tl.minimum(start + pages * 64, length), 64):
        page = tl.load(table + row * table_row + first // 64).to(tl.int64)
        known = first + position < length
        at = ((page * 64 + position[:, None]) * K + head) * C + col[None, :]
        mask = known[:, None] & (col < C)[None, :]
        keys = tl.load(k_cache + at, mask, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(known[None, :], scores, -float("inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        shrink = tl.exp(top - highest)
        values = tl.load(v_cache + at, mask, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        top = highest
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = out + (heads.to(tl.int64)[:, None] * SHARES + share) * C + col[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), inside)
    if SHARES > 1:
        tl.store(lse + heads * SHARES + share, top + tl.log(tl.where(total > 0, total, 1.0)), member < group)


@jit
def _join_kernel(
    parts: tl.tensor,
    lse: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    H: int,
    C: int,
    pages: int,
    SHARES: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One head of one row: shares weighted by exp(lse); those beyond the row's length were not written."""
    wait_for_inputs(EARLY)
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + head // H)
    share, col = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    written = (share < SHARES) & (share * pages * 64 < length)
    logs = tl.load(lse + head * SHARES + share, written, other=-1e30)
    weights = tl.where(written, tl.exp(logs - tl.max(logs, 0)), 0.0)
    inside = written[:, None] & (col < C)[None, :]
    part = tl.load(parts + (head * SHARES + share[:, None]) * C + col[None, :], inside, other=0.0)
    total = tl.sum(weights, 0)
    joined = tl.sum(part * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * C + col, joined.to(out.dtype.element_ty), col < C)


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor
) -> Tensor:
    """Rotate q and k of a new token and write k and v into the cache; returns q [B, H, C]. Can be captured in a graph.

    Args:
        qkv: [B, (H + 2 K) C], rows dense.
        cos, sin: [positions, C] in Hugging Face's layout (two equal halves), any float dtype.
        k_cache, v_cache: [P, 64, K, C] contiguous, in qkv's dtype.
        table: int32 [B, blocks], the page of each 64 positions of a row.
        lengths: int32 [B], the new token counted; the token's position is one less. A row of length 0 writes nothing.

    Raises:
        ValueError: shapes or strides that do not fit.
    """
    (B, width), (K, C) = qkv.shape, k_cache.shape[2:]
    H = width // C - 2 * K
    _check(k_cache, v_cache, table, lengths, B)
    if width % C or H <= 0 or H % K or C % 2 or cos.shape != sin.shape or cos.shape[1] != C or qkv.stride(1) != 1:
        raise ValueError(f"qkv {tuple(qkv.shape)}, tables {tuple(cos.shape)}: expected [B, (H + 2 K) C] and [n, C]")
    if not use_triton(qkv):
        return reference.rope_append(qkv, cos, sin, k_cache, v_cache, table, lengths)
    q = qkv.new_empty(B, H, C)
    heads = H + 2 * K
    each = 8 if B * heads >= 8 * PROGRAMS else 1  # a program
    _rope_append_kernel[(B, ceil_div(heads, each))](
        qkv, cos, sin, k_cache, v_cache, table, lengths, q, qkv.stride(0), cos.stride(0), sin.stride(0),
        table.stride(0), H, K, C // 2, HEADS=each, HALF=next_power_of_2(C // 2), num_warps=1, **early_start(qkv),
    )  # fmt: skip
    return q


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of q [B, H, C] over each row's cached positions -> [B, H, C]. Can be captured in a CUDA graph.

    Args:
        q: contiguous, in the cache's dtype.
        k_cache, v_cache, table, lengths: as `rope_append`; H a multiple of K. Length 0 gives zeros.
        scale: factor of the scores, usually C ** -0.5.
        out: contiguous, as q.

    Raises:
        ValueError: shapes or strides that do not fit.
    """
    (B, H, C), K = q.shape, k_cache.shape[2]
    out = torch.empty_like(q) if out is None else out
    _check(k_cache, v_cache, table, lengths, B)
    if H % K or k_cache.shape[3] != C or not (q.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache of {K} heads of {k_cache.shape[3]}")
    if not use_triton(q):
        return out.copy_(reference.decode_attention(q, k_cache, v_cache, table, lengths, scale))
    blocks = table.shape[1]
    pages = ceil_div(blocks, min(blocks, ceil_div(PROGRAMS, B * K)))
    shares = ceil_div(blocks, pages)
    width, group = max(next_power_of_2(C), 16), H // K
    parts = out if shares == 1 else torch.empty(B, H, shares, C, dtype=torch.float32, device=q.device)
    lse = torch.empty(B * H * shares, dtype=torch.float32, device=q.device)
    _attention_kernel[(B, K, shares)](
        q, k_cache, v_cache, table, lengths, parts, lse, table.stride(0), K, group, C, pages, scale,
        SHARES=shares, GROUP=max(next_power_of_2(group), 16), WIDTH=width, num_warps=4, num_stages=2,
        **early_start(q),
    )  # fmt: skip
    if shares > 1:
        _join_kernel[(B * H,)](
            parts,
            lse,
            lengths,
            out,
            H,
            C,
            pages,
            SHARES=shares,
            COUNT=next_power_of_2(shares),
            WIDTH=width,
            num_warps=1,
            **early_start(q),
        )
    return out


def _check(k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor, B: int) -> None:
    if k_cache.shape != v_cache.shape or k_cache.shape[1] != PAGE:
        raise ValueError(f"cache {tuple(k_cache.shape)}: expected k and v alike, [P, {PAGE}, K, C]")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and table.stride(1) == 1):
        raise ValueError("the cache and the table's lines must be contiguous")
    if len(table) < B or len(lengths) < B or table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError(f"table {tuple(table.shape)} and lengths {tuple(lengths.shape)} must be int32 of {B} rows")
