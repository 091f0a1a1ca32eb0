import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from medlora.kernels import decode_attention as module
from medlora.kernels.decode_attention import decode_attention, rope_append

SHAPES = [(1, 4, 4, 16), (3, 6, 2, 24), (2, 32, 2, 64)]  # B, H, K, C


def paged(lengths, K, C, dtype, device, blocks=None):
    """A cache with NaN where nothing was written, its table in no order, and each row's keys and values."""
    needed = [math.ceil(length / 64) for length in lengths]
    blocks = blocks or max([*needed, 1])
    order = torch.randperm(sum(needed) + 2, dtype=torch.int32)
    k_cache, v_cache = (torch.full((len(order), 64, K, C), math.nan, device=device, dtype=dtype) for _ in range(2))
    table = torch.full((len(lengths), blocks), -(10**6), dtype=torch.int32)
    rows, used = [], 0
    for b, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        table[b, :count] = order[used : used + count]
        used += count
        k, v = (torch.randn(length, K, C, device=device).to(dtype) for _ in range(2))
        for position in range(length):
            at = table[b, position // 64], position % 64
            k_cache[at], v_cache[at] = k[position], v[position]
        rows.append((k, v))
    return k_cache, v_cache, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), rows


def expected(q, rows, scale):
    out = torch.zeros_like(q, dtype=torch.float32)
    for b, (k, v) in enumerate(rows):
        if len(k):
            heads = (t.float().transpose(0, 1)[None] for t in (q[b][None], k, v))
            out[b] = scaled_dot_product_attention(*heads, scale=scale, enable_gqa=True)[0, :, 0]
    return out


@pytest.mark.parametrize("programs", [1, 264], ids=["one-share", "many-shares"])
@pytest.mark.parametrize(("B", "H", "K", "C"), SHAPES)
def test_attention(B, H, K, C, programs, dtype, device, close, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    k_cache, v_cache, table, lengths, rows = paged([130, 1, 64][:B], K, C, dtype, device, blocks=5)
    q = torch.randn(B, H, C, device=device).to(dtype)
    out = torch.empty_like(q)
    assert decode_attention(q, k_cache, v_cache, table, lengths, C**-0.5, out) is out
    close(out, expected(q, rows, C**-0.5), roundings=3)  # probabilities are rounded for the product


def test_idle_rows_give_zeros(device):
    k_cache, v_cache, table, lengths, _ = paged([0, 65, 0], 2, 16, torch.float32, device, blocks=3)
    out = decode_attention(torch.randn(3, 4, 16, device=device), k_cache, v_cache, table, lengths, 0.25)
    assert not out[0].any() and not out[2].any() and out[1].isfinite().all()


def test_large_scores_stay_finite(device, close):
    k_cache, v_cache, table, lengths, rows = paged([100], 1, 16, torch.float32, device, blocks=4)
    q = torch.randn(1, 1, 16, device=device) * 1e4
    close(decode_attention(q, k_cache, v_cache, table, lengths, 1.0), expected(q, rows, 1.0))


@pytest.mark.parametrize("programs", [1, 264], ids=["some-heads", "one-head"])
@pytest.mark.parametrize(("B", "H", "K", "C"), SHAPES)
def test_rope_append(B, H, K, C, programs, dtype, device, close, monkeypatch):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    monkeypatch.setattr(module, "PROGRAMS", programs)
    k_cache, v_cache, table, lengths, _ = paged([65, 1, 0][:B], K, C, dtype, device)
    angles = torch.outer(torch.arange(100.0), 0.7 ** torch.arange(C // 2)).repeat(1, 2).to(device)
    before = k_cache.clone()
    qkv = torch.randn(B, (H + 2 * K) * C + 8, device=device).to(dtype)[:, : (H + 2 * K) * C]
    q = rope_append(qkv, angles.cos(), angles.sin(), k_cache, v_cache, table, lengths)
    heads = qkv.reshape(B, H + 2 * K, C).float()
    at = (lengths.long() - 1).clamp_min(0)
    turned = apply_rotary_pos_emb(heads, heads, angles[at].cos(), angles[at].sin())[0]
    close(q[lengths > 0], turned[lengths > 0][:, :H])
    for b in torch.nonzero(lengths)[:, 0].tolist():
        slot = table[b, at[b] // 64], at[b] % 64
        close(k_cache[slot], turned[b, H : H + K])
        assert torch.equal(v_cache[slot], heads[b, H + K :].to(dtype))
        k_cache[slot] = before[slot]
    assert torch.equal(k_cache.isnan(), before.isnan()), "written elsewhere too"


def test_reference(dtype, close, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    k_cache, v_cache, table, lengths, rows = paged([130, 0, 64], 2, 16, dtype, "cpu")
    q = torch.randn(3, 6, 16).to(dtype)
    close(decode_attention(q, k_cache, v_cache, table, lengths, 0.25), expected(q, rows, 0.25))
    test_rope_append(3, 6, 2, 16, 264, dtype, "cpu", close, monkeypatch)


def test_refuses_what_does_not_fit(device):
    k_cache, v_cache, table, lengths, _ = paged([3], 2, 16, torch.float32, device)
    q = torch.randn(1, 4, 16, device=device)
    for arguments, message in (
        ((q[:, :3].contiguous(), k_cache, v_cache, table, lengths, 1.0), "does not fit"),
        ((q, k_cache[:, :32], v_cache, table, lengths, 1.0), "expected k and v alike"),
        ((q, k_cache, v_cache, table.long(), lengths, 1.0), "int32"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*arguments)
    with pytest.raises(ValueError, match="H \\+ 2 K"):
        rope_append(torch.randn(1, 60), torch.ones(9, 16), torch.ones(9, 16), k_cache, v_cache, table, lengths)
