"""Causal attention of a packed row of short documents, and the gradients of q, k and v before their rotation.

    o = softmax(s q k') v        Dao 2023 (FlashAttention-2, arXiv 2307.08691): tiles of scores, never all of them

A document of some hundred tokens is a few tiles, and the flash kernel of torch is made for long rows: its backward pass
adds up dq in float32, in memory and in order, and on Hopper it multiplies by Ampere's instructions. Here a program owns
a tile of queries, or in the second half of the backward pass one of keys, and adds up in registers: scores are made
once more, nothing is written but results, and those have the same bits each time. Gradients leave through the inverse
rotation, so that no pass over them follows.

Which tokens a program owns stands in a table, made of the documents' borders on the device. Its size follows from
shapes alone.

Shapes: T tokens of the row, H query heads, K key heads, C head size.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .dispatch import ceil_div, is_hopper, jit, next_power_of_2, roomy, tl, use_triton

TILE = 64  # tokens of a document that a program owns
HEAD_SIZES = (32, 64, 128)
LOG2_E = math.log2(math.e)
FORWARD = {"TILE": TILE, "STEP": 32, "num_warps": 4, "num_stages": 3}
QUERIES = FORWARD | {"num_stages": 4}
KEYS = {"TILE": TILE, "STEP": 64, "num_warps": 4, "num_stages": 1}
unspecialized = partial(jit, do_not_specialize=["T", "documents"])  # or prompts of other lengths would compile again


@unspecialized
def _tiles_kernel(starts: tl.tensor, tiles: tl.tensor, documents: int, TILE: tl.constexpr, SPAN: tl.constexpr) -> None:
    """Of one tile: the document is that before whose end it lies, tiles counted."""
    tile = tl.program_id(0)
    document = tl.arange(0, SPAN)
    start = tl.load(starts + document, document < documents, other=0)
    stop = tl.load(starts + document + 1, document < documents, other=0)
    count = (stop - start + TILE - 1) // TILE
    before = tl.cumsum(count) - count
    mine = (before <= tile) & (tile < before + count)
    first = start + (tile - before) * TILE
    entry = tiles + 3 * tile
    tl.store(entry, tl.sum(tl.where(mine, start, 0)))
    tl.store(entry + 1, tl.sum(tl.where(mine, stop, 0)))
    tl.store(entry + 2, tl.sum(tl.where(mine, first, 0)))


@jit
def _owned(tiles: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """This program's document (start, stop), first token and head."""
    entry = tiles + 3 * tl.program_id(0)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.program_id(1)


@jit
def _tile(x: tl.tensor, row: int, first: tl.tensor, stop: tl.tensor, N: tl.constexpr, C: tl.constexpr) -> tl.tensor:
    """One head of N tokens from `first` on [N, C], zero from `stop` on."""
    token = tl.arange(0, N)[:, None]
    at = token * row + tl.arange(0, C)[None, :]  # 32 bits do within a tile
    return tl.load(x + tl.cast(first, tl.int64) * row + at, token < stop - first, other=0.0)


@jit
def _store_rotated_back(
    x: tl.tensor,
    grad: tl.tensor,
    scale: float,
    row: int,
    cos: tl.tensor,
    sin: tl.tensor,
    table_row: int,
    token: tl.tensor,
    inside: tl.tensor,
    C: tl.constexpr,
) -> None:
    """The gradient of a rotated head [tokens, C], but for the scores' scale to powers of two, as that of the head
    before."""
    HALF: tl.constexpr = C // 2
    grad *= scale * 0.6931471805599453  # ln 2
    a, b = tl.split(tl.permute(tl.reshape(grad, (grad.shape[0], 2, HALF)), (0, 2, 1)))
    token, col, inside = token.to(tl.int64)[:, None], tl.arange(0, HALF)[None, :], inside[:, None]
    c = tl.load(cos + token * table_row + col, inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token * table_row + col, inside, other=0.0).to(tl.float32)
    at = x + token * row + col
    tl.store(at, (a * c + b * s).to(x.dtype.element_ty), inside)
    tl.store(at + HALF, (b * c - a * s).to(x.dtype.element_ty), inside)


@unspecialized
def _forward_kernel(
    qkv: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tiles: tl.tensor,
    row: int,
    out_row: int,
    T: int,
    H: int,
    K: int,
    scale: float,
    C: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """A tile of queries of one head. `scale` and lse [H, T] belong to powers of two."""
    start, stop, first, head = _owned(tiles)
    if first >= stop:
        return
    token = first + tl.arange(0, TILE)
    inside = token < stop
    q = _tile(qkv + head * C, row, first, stop, TILE, C)
    keys = qkv + (H + head // (H // K)) * C
    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    o = tl.zeros((TILE, C), tl.float32)
    for step in tl.range(start, tl.minimum(first + TILE, stop), STEP):
        key = step + tl.arange(0, STEP)
        k, v = _tile(keys, row, step, stop, STEP, C), _tile(keys + K * C, row, step, stop, STEP, C)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(token[:, None] >= key[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrunk = tl.exp2(top - higher)
        total = total * shrunk + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrunk[:, None], input_precision="ieee")
        top = higher
    at = token.to(tl.int64)[:, None] * out_row + head * C + tl.arange(0, C)[None, :]
    tl.store(out + at, (o / total[:, None]).to(out.dtype.element_ty), inside[:, None])
    tl.store(lse + head * T + token, top + tl.log2(total), inside)


@unspecialized
def _queries_kernel(
    qkv: tl.tensor,
    out: tl.tensor,
    grad: tl.tensor,
    d_qkv: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    tiles: tl.tensor,
    row: int,
    out_row: int,
    grad_row: int,
    d_row: int,
    table_row: int,
    T: int,
    H: int,
    K: int,
    scale: float,
    C: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """dq of a tile of queries of one head; and delta [H, T], the product of each output with its gradient."""
    start, stop, first, head = _owned(tiles)
    if first >= stop:
        return
    token = first + tl.arange(0, TILE)
    inside = token < stop
    q = _tile(qkv + head * C, row, first, stop, TILE, C)
    do = _tile(grad + head * C, grad_row, first, stop, TILE, C)
    o = _tile(out + head * C, out_row, first, stop, TILE, C)
    each = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + head * T + token, each, inside)
    weight = tl.load(lse + head * T + token, inside, other=float("inf"))
    keys = qkv + (H + head // (H // K)) * C
    dq = tl.zeros((TILE, C), tl.float32)
    for step in tl.range(start, tl.minimum(first + TILE, stop), STEP):
        key = step + tl.arange(0, STEP)
        k, v = _tile(keys, row, step, stop, STEP, C), _tile(keys + K * C, row, step, stop, STEP, C)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.where(token[:, None] >= key[None, :], tl.exp2(s - weight[:, None]), 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - each[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store_rotated_back(d_qkv + head * C, dq, scale, d_row, cos, sin, table_row, token, inside, C)


@unspecialized
def _keys_kernel(
    qkv: tl.tensor,
    grad: tl.tensor,
    d_qkv: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    tiles: tl.tensor,
    row: int,
    grad_row: int,
    d_row: int,
    table_row: int,
    T: int,
    H: int,
    K: int,
    scale: float,
    C: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """dk and dv of a tile of one key head, by the queries behind of each head that reads it."""
    _, stop, first, head = _owned(tiles)
    if first >= stop:
        return
    key = first + tl.arange(0, TILE)
    inside = key < stop
    k = _tile(qkv + (H + head) * C, row, first, stop, TILE, C)
    v = _tile(qkv + (H + K + head) * C, row, first, stop, TILE, C)
    dk = tl.zeros((TILE, C), tl.float32)
    dv = tl.zeros((TILE, C), tl.float32)
    for reader in range(head * (H // K), (head + 1) * (H // K)):
        for step in tl.range(first, stop, STEP):
            token = step + tl.arange(0, STEP)
            known = token < stop
            q = _tile(qkv + reader * C, row, step, stop, STEP, C)
            do = _tile(grad + reader * C, grad_row, step, stop, STEP, C)
            weight = tl.load(lse + reader * T + token, known, other=float("inf"))
            each = tl.load(delta + reader * T + token, known, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            p = tl.where(token[None, :] >= key[:, None], tl.exp2(s - weight[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - each[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store_rotated_back(d_qkv + (H + head) * C, dk, scale, d_row, cos, sin, table_row, key, inside, C)
    at = key.to(tl.int64)[:, None] * d_row + (H + K + head) * C + tl.arange(0, C)[None, :]
    tl.store(d_qkv + at, dv.to(d_qkv.dtype.element_ty), inside[:, None])


def serves(x: Tensor) -> bool:
    """Whether these kernels run on x's device: Hopper, where they are faster than flash attention; elsewhere nobody has
    looked."""
    return use_triton(x) and is_hopper(x.device)


def tiles_of(starts: Tensor, tokens: int) -> Tensor:
    """(start and stop of its document, its own first token) of every tile, int32 [tiles, 3]; what lies beyond the last
    begins where it stops.

    Args:
        starts: [0, ..., tokens], the documents' borders, int32; some documents may be empty.
    """
    documents = len(starts) - 1
    tiles = starts.new_empty(ceil_div(tokens, TILE) + documents, 3)
    _tiles_kernel[(len(tiles),)](starts, tiles, documents, TILE=TILE, SPAN=next_power_of_2(documents), num_warps=1)
    return tiles


def document_attention(
    qkv: Tensor, tiles: Tensor, heads: tuple[int, int, int], scale: float, room: int = 0
) -> tuple[Tensor, Tensor]:
    """(output [T, H C], with `room` columns behind each row; log-sum-exp of the scores to base two, float32 [H, T]).

    Args:
        qkv: [T, (H + 2 K) C], rotated, rows dense, row stride free.
        tiles: from `tiles_of`.
        heads: (H, K, C), C one of `HEAD_SIZES`.
        scale: factor of the scores.
    """
    (T, _), (H, K, C) = qkv.shape, heads
    out = roomy(qkv, room, H * C)
    lse = torch.empty(H, T, dtype=torch.float32, device=qkv.device)
    _forward_kernel[(len(tiles), H)](
        qkv, out, lse, tiles, qkv.stride(0), out.stride(0), T, H, K, scale * LOG2_E,
        C=C, **FORWARD,
    )  # fmt: skip
    return out, lse


def document_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    heads: tuple[int, int, int],
    scale: float,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """The gradient of qkv before q and k were rotated; its rows are as far apart as those of qkv.

    Args:
        grad: of the output [T, H C], rows dense, row stride free.
        cos, sin: the rotation's tables [T, C], two equal halves.
        qkv, out, lse, tiles, heads, scale: as of `document_attention`.
    """
    (T, width), (H, K, C) = qkv.shape, heads
    d_qkv, delta = roomy(qkv, qkv.stride(0) - width), torch.empty_like(lse)
    common = T, H, K, scale * LOG2_E
    _queries_kernel[(len(tiles), H)](
        qkv, out, grad, d_qkv, lse, delta, cos, sin, tiles,
        qkv.stride(0), out.stride(0), grad.stride(0), d_qkv.stride(0), cos.stride(0), *common,
        C=C, **QUERIES,
    )  # fmt: skip
    _keys_kernel[(len(tiles), K)](
        qkv, grad, d_qkv, lse, delta, cos, sin, tiles,
        qkv.stride(0), grad.stride(0), d_qkv.stride(0), cos.stride(0), *common,
        C=C, **KEYS,
    )  # fmt: skip
    return d_qkv
