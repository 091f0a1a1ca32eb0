"""Attention of packed rows, each way against softmax(q k') v written out, document by document."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from medlora.kernels import attention as module
from medlora.kernels import reference
from medlora.kernels.attention import Documents, Tails, attention, tail_attention


def tables(T: int, C: int, borders: list[int], device: torch.device | str) -> Documents:
    at = torch.cat([torch.arange(stop - start) for start, stop in pairwise(borders)]).float()
    angles = torch.outer(at, 10000 ** -(torch.arange(C // 2) * 2 / C)).repeat(1, 2).to(device)
    return Documents.of(angles.cos(), angles.sin(), borders).tiled()


def written_out(qkv: Tensor, row: Documents, heads: tuple[int, int, int], scale: float) -> Tensor:
    H, K, C = heads
    q, k, v = qkv.view(len(qkv), H + 2 * K, C).split((H, K, K), 1)
    q, k = (reference.rotate(t, row.cos, row.sin) for t in (q, k))
    k, v = (t.repeat_interleave(H // K, 1) for t in (k, v))
    parts = []
    for i, j in pairwise(row.borders):
        scores = torch.einsum("qhc,khc->hqk", q[i:j], k[i:j]) * scale
        future = torch.ones(j - i, j - i, device=q.device).triu(1).bool()
        parts.append(torch.einsum("hqk,khc->qhc", scores.masked_fill(future, -torch.inf).softmax(-1), v[i:j]))
    return torch.cat(parts).flatten(1)


def both(way, borders: list[int], heads: tuple[int, int, int], dtype: torch.dtype, device: str):
    """(ours, written out in float32), each as output and gradient."""
    torch.manual_seed(0)
    T, width = borders[-1], (heads[0] + 2 * heads[1]) * heads[2]
    x = torch.randn(T, width, device=device).to(dtype)
    grad = torch.randn(T, heads[0] * heads[2], device=device).to(dtype)
    row = tables(T, heads[2], borders, device)
    found = []
    for function, kind in ((way, dtype), (written_out, torch.float32)):
        leaf = x.to(kind, copy=True).requires_grad_()
        out = function(leaf * 1, row._replace(cos=row.cos.to(kind), sin=row.sin.to(kind)), heads, heads[2] ** -0.5)
        out.backward(grad.to(kind))
        found.append((out.detach().float(), leaf.grad.float()))
    return found


def by_flash(qkv: Tensor, row: Documents, *how) -> Tensor:
    return attention(qkv, row._replace(tiles=None), *how)


@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 2, 16)], ids=["heads", "grouped"])
@pytest.mark.parametrize("borders", [[0, 24, 48, 72], [0, 33]], ids=["three", "one"])
def test_a_dense_batch_is_the_documents_one_by_one(borders, heads):
    (out, grad), (expected, expected_grad) = both(module._dense_attention, borders, heads, torch.float32, "cpu")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_a_loss_that_lives_on_holds_no_row():
    """Of a step's rows the first one's loss is still there while the second passes."""
    row = tables(48, 16, [0, 24, 48], "cpu")
    qkv = torch.randn(48, 12 * 16, requires_grad=True) * 1
    parts = module._Rotation.apply(qkv, row, (4, 4, 16))
    assert parts[0].grad_fn.qkv is not None
    torch.autograd.backward(parts, [torch.randn_like(part) for part in parts])
    assert parts[0].grad_fn.qkv is None


@pytest.mark.parametrize("borders", [[0, 9, 48, 49], [0, 33]], ids=["three", "one"])
def test_documents_of_any_length(borders):
    (out, grad), (expected, expected_grad) = both(attention, borders, (4, 2, 16), torch.float32, "cpu")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def by_cutlass(qkv: Tensor, row: Documents, *how) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "flash_takes", lambda *_: False)
        patch.setattr(module, "by_document", None)
        return attention(qkv, row, *how)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [(8, 8, 128), (8, 2, 64)], ids=["heads", "grouped"])
@pytest.mark.parametrize("borders", [[0, 512, 1024], [0, 1280, 1280, 1280], [0, 100, 612, 700]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_a_gpu_cutlass_gives_the_same_each_time(dtype, borders, heads):
    (out, grad), (expected, expected_grad) = both(by_cutlass, borders, heads, dtype, "cuda")
    within = 2e-3 if dtype == torch.float16 else 1e-5
    assert (out - expected).norm() < within * expected.norm()
    assert (grad - expected_grad).norm() < within * expected_grad.norm()
    again = both(by_cutlass, borders, heads, dtype, "cuda")[0]
    assert torch.equal(again[0], out) and torch.equal(again[1], grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [(8, 8, 128), (8, 2, 64)], ids=["heads", "grouped"])
@pytest.mark.parametrize(
    "borders", [[0, 512, 1024], [0, 2048, 4096], [0, 1280], [0, 100, 612, 700]], ids=["short", "dense", "one", "ragged"]
)
@pytest.mark.parametrize("way", [attention, by_flash], ids=["tiles", "flash"])
def test_on_a_gpu_the_kernels_give_the_same(borders, heads, way):
    (out, grad), (expected, expected_grad) = both(way, borders, heads, torch.bfloat16, "cuda")
    assert out.isfinite().all() and grad.isfinite().all()
    assert (out - expected).norm() < 0.01 * expected.norm()
    assert (grad - expected_grad).norm() < 0.015 * expected_grad.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", [attention, by_flash], ids=["tiles", "flash"])
def test_on_a_gpu_a_row_has_the_same_gradients_each_time(way):
    first, *others = (
        both(way, [0, 700, 1000, 1900, 2384], (8, 8, 128), torch.bfloat16, "cuda")[0][1] for _ in range(4)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("heads", [(4, 4, 64), (4, 2, 128)], ids=["heads", "grouped"])
def test_last_tokens_see_all_that_stands_before(heads: tuple[int, int, int]) -> None:
    H, K, C = heads
    new, whole = [1, 70, 5, 128], [300, 70, 200, 129]
    q = torch.randn(sum(new), H, C, device="cuda").bfloat16()
    k, v = (torch.randn(sum(whole), K, C, device="cuda").bfloat16() for _ in range(2))
    out = tail_attention(q, k, v, Tails.of(new, whole, q.device), C**-0.5)
    parts = []
    for queries, keys, values in zip(q.split(new), k.split(whole), v.split(whole), strict=True):
        n, T = len(queries), len(keys)
        keys, values = (t.float().repeat_interleave(H // K, 1) for t in (keys, values))
        scores = torch.einsum("qhc,khc->hqk", queries.float(), keys) * C**-0.5
        future = torch.ones(n, T, device="cuda").triu(1 + T - n).bool()
        parts.append(torch.einsum("hqk,khc->qhc", scores.masked_fill(future, -torch.inf).softmax(-1), values))
    torch.testing.assert_close(out.float(), torch.cat(parts), rtol=2e-2, atol=2e-2)
