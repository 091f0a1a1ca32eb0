"""Attention of short documents by tiles, against softmax(q k') v written out, document by document."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from medlora.kernels.document_attention import TILE, document_attention, document_attention_backward, tiles_of
from medlora.kernels.rope import rope_

from .test_attention import tables, written_out


def both(
    borders: list[int], heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """(output, gradient of qkv before its rotation) of ours, then written out in float32."""
    (H, K, C), T = heads, borders[-1]
    width = (H + 2 * K) * C
    x = torch.randn(T, width, device=device).to(dtype)
    grad = torch.randn(T, H * C, device=device).to(dtype)
    row = tables(T, C, borders, device)
    leaf = x.float().requires_grad_()
    expected = written_out(leaf, row, heads, C**-0.5)
    expected.backward(grad.float())

    qkv = torch.full((T, width + 16), torch.nan, dtype=dtype, device=device)[:, :width]
    qkv.copy_(x)
    q, k = (qkv[:, i * C : j * C].unflatten(1, (-1, C)) for i, j in ((0, H), (H, H + K)))
    rope_(q, k, row.cos, row.sin)
    tiles = tiles_of(row.starts, T)
    out, lse = document_attention(qkv, tiles, heads, C**-0.5, room=8)
    d_qkv = document_attention_backward(grad, qkv, out, lse, tiles, heads, C**-0.5, row.cos, row.sin)
    assert out.stride() == (H * C + 8, 1) and d_qkv.stride() == qkv.stride()
    return [(out, d_qkv), (expected.detach(), leaf.grad)]


@pytest.mark.parametrize(
    ("borders", "heads", "dtype"),
    [
        ([0, 9, 48, 49], (2, 2, 32), torch.float32),
        ([0, 130], (2, 1, 32), torch.float32),
        ([0, 64, 192, 192, 200], (1, 1, 64), torch.float32),
        ([0, 64, 160], (2, 1, 32), torch.bfloat16),
    ],
    ids=["short", "grouped", "whole tiles", "bf16"],
)
def test_documents_of_any_length(borders, heads, dtype, device) -> None:
    (out, grad), (expected, expected_grad) = both(borders, heads, dtype, device)
    off = 1e-5 if dtype == torch.float32 else 0.01
    assert out.isfinite().all() and grad.isfinite().all()
    assert (out - expected).norm() < off * expected.norm()
    assert (grad - expected_grad).norm() < off * expected_grad.norm()


def test_every_token_has_one_tile(device) -> None:
    for borders in ([0, 1], [0, 64], [0, 65, 65, 300], [0, 10, 200, 201, 329]):
        tiles = tiles_of(torch.tensor(borders, dtype=torch.int32, device=device), borders[-1])
        found = []
        for start, stop, first in tiles.tolist():
            assert first >= stop or (start, stop) in pairwise(borders)
            found += range(first, min(first + TILE, stop))
        assert found == list(range(borders[-1]))
        assert len(tiles) == -(-borders[-1] // TILE) + len(borders) - 1
