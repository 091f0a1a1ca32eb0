"""Every operation of this package in plain PyTorch: the fallback, the test oracle and the benchmark baseline.

Each function computes in fp32 and returns its input's dtype, so calling it on `tensor.float()` gives the
exact values that tests compare with. All are differentiable by autograd except the in-place and integer ones.

Shapes: T tokens, D hidden, H heads, d head size, F intermediate, V vocabulary.
"""

# torch leaves Tensor.split untyped
# mypy: allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]

# Quantiles of the normal distribution, Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), appendix E.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP8_MAX = 448.0  # largest finite float8_e4m3fn
FP8_FLOOR = 1e-12  # absmax below which a row counts as zero, so that its inverse stays finite

# Philox 4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Seven rounds are the fewest
# that pass BigCrush; one call gives four words, that is eight 16-bit draws.
PHILOX_ROUNDS = 7
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
DRAWS = 8
WORD = 0xFFFFFFFF


def dequantize_absmax(absmax: Tensor, code: Tensor, outer: Tensor, offset: Tensor, blocksize: int = 256) -> Tensor:
    """Undo the double quantisation of block scales: code[absmax] * outer[block] + offset, fp32 [blocks]."""
    return code[absmax.long()] * outer.repeat_interleave(blocksize)[: absmax.numel()] + offset


def dequantize_nf4(codes: Tensor, absmax: Tensor) -> Tensor:
    """Packed NF4 codes (uint8, high nibble first) and fp32 scales of blocks of 64 -> flat fp32 weights."""
    packed = codes.reshape(-1).long()
    values = torch.tensor(NF4_VALUES, device=codes.device)[torch.stack((packed >> 4, packed & 15), dim=1)]
    return (values.view(-1, 64) * absmax.view(-1, 1)).view(-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (normalised y, h = x + residual, which is x itself without a residual)."""
    h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    normed = h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)
    return (weight.float() * normed.to(x.dtype).float()).to(x.dtype), h


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, H, d] in the half-split layout, from tables [T, d]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos.float()[:, None] + turned * sin.float()[:, None]).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up over [T, F]."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` with respect to gate and up."""
    g, u, dy = gate.float(), up.float(), grad.float()
    s = torch.sigmoid(g)
    return (dy * u * s * (1 + g * (1 - s))).to(gate.dtype), (dy * g * s).to(gate.dtype)


def adapted(gate: Tensor, up: Tensor, h: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """gate + h_g b_g' and up + h_u b_u', in float32."""
    (h_g, h_u), (b_g, b_u) = h.float().chunk(2, 1), b.float()
    return gate.float() + h_g @ b_g.t(), up.float() + h_u @ b_u.t()


def swiglu_adapted_backward(
    grad: Tensor, gate: Tensor, up: Tensor, above: Pair | None, below: Pair | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of gate and up, the value of `swiglu`, and the gradients of a and b."""
    g, u = adapted(gate, up, *below) if below else (gate.float(), up.float())
    d = grad.float() + above[0].float() @ above[1].float() if above else grad.float()
    y, (dg, du) = swiglu(g, u), (x.to(gate.dtype) for x in swiglu_backward(d, g, u))
    da = above[0].float().t() @ y if above else None
    if below is None:
        return dg, du, y, da, None
    h_g, h_u = below[0].float().chunk(2, 1)
    return dg, du, y, da, torch.stack([dg.float().t() @ h_g, du.float().t() @ h_u])


def philox(seed: int, counter: Tensor, rounds: int = PHILOX_ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32 of int64 counters below 2**32 under a 64-bit seed: four int64 tensors of 32-bit words.

    int64 products wrap, yet their 64 bits are right, so both halves are read by shift and mask.
    """
    c0, c1, c2, c3 = counter, torch.zeros_like(counter), torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(rounds):
        a, b = PHILOX_MULTIPLIERS[0] * c0, PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + PHILOX_WEYL[0] & WORD, k1 + PHILOX_WEYL[1] & WORD
    return c0, c1, c2, c3


def dropout_mask(like: Tensor, p: float, seed: int) -> Tensor:
    """Which elements of `like` are kept, bool: those whose 16-bit draw is at least round(p * 65536)."""
    counter = torch.arange(-(-like.numel() // DRAWS), device=like.device)
    words = torch.stack(philox(seed, counter), dim=1)[:, (0, 2, 1, 3)]
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=2).view(-1)[: like.numel()]
    return (draws >= round(p * 65536)).view(like.shape)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """mask * x / (1 - p) with the mask of `dropout_mask`."""
    return torch.where(dropout_mask(x, p, seed), x.float() * (1 / (1 - p)), 0.0).to(x.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """fp32 loss of each row of logits [T, V]; 0 where the label is `ignore_index`."""
    return F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="none")


def cross_entropy_(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """As `cross_entropy`, and logits become the gradient softmax - onehot (0 in ignored rows)."""
    losses = cross_entropy(logits, labels, ignore_index)
    kept = (labels != ignore_index).unsqueeze(1)
    grad = logits.float().softmax(-1)
    grad.scatter_add_(1, labels.unsqueeze(1) * kept, grad.new_full(kept.shape, -1.0))
    logits.copy_(grad.mul_(kept))
    return losses


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum of the losses of hidden [T, D] @ weight [V, D].T, all logits at once."""
    return cross_entropy(hidden.float() @ weight.float().T, labels, ignore_index).sum()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> float8_e4m3fn codes [M, K] and fp32 scale [M, 1], with x about codes * scale."""
    absmax = x.float().abs().amax(-1, keepdim=True).clamp_min(FP8_FLOOR)
    inverse = torch.full_like(absmax, FP8_MAX) / absmax  # scalar / tensor would round the reciprocal first
    return (x.float() * inverse).to(torch.float8_e4m3fn), absmax * (1 / FP8_MAX)


def fp8_matmul(codes: Tensor, scale: Tensor, w_codes: Tensor, w_scale: Tensor) -> Tensor:
    """(codes * scale) [M, K] @ (w_codes * w_scale) [N, K].T in fp32."""
    return (codes.float() @ w_codes.float().T) * scale * w_scale.view(1, -1)


def nf4_linear(
    x: Tensor,
    w: Tensor,
    sizes: tuple[int, ...],
    lora: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """f(x) W' + each row's LoRA term + residual, from weights [N, D] of modules with `sizes` outputs.

    `lora` is (a [S, G R, D], b [S, N, R], scaling [S, G], slots [M], -1 for none); f and `gated` as in
    `kernels.nf4_linear`.
    """
    inner = x if norm is None else rms_norm(x, *norm)[0]
    y = inner.float() @ w.float().T
    if lora is not None:
        a, b, scaling, slots = lora
        slot, G = slots.long().clamp_min(0), len(sizes)
        h = torch.einsum("md,mrd->mr", inner.float(), a[slot].float()).unflatten(1, (G, -1))
        h = (h * (scaling[slot] * (slots >= 0)[:, None])[:, :, None]).to(x.dtype).float()
        parts = zip(h.unbind(1), b[slot].float().split(sizes, 1), strict=True)
        y = y + torch.cat([torch.einsum("mr,mnr->mn", hg, bg) for hg, bg in parts], 1)
    y = (y if residual is None else y + residual.float()).to(x.dtype)
    return swiglu(*y.chunk(2, 1)) if gated else y


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor
) -> Tensor:
    """Rotate the q and k of one new token a row, write k and v into their pages, return q [B, H, C]."""
    page, (K, C) = k_cache.shape[1], k_cache.shape[2:]
    q, k, v = qkv.view(len(qkv), -1, C).split((qkv.shape[1] // C - 2 * K, K, K), 1)
    at = (lengths.long() - 1).clamp_min(0)
    q, k = (rotate(x, cos[at], sin[at]) for x in (q, k))
    rows = torch.nonzero(lengths > 0)[:, 0]
    pages, at = table[rows, at[rows] // page].long(), at[rows] % page
    k_cache[pages, at], v_cache[pages, at] = k[rows], v[rows]
    return q.contiguous()


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """q [B, H, C] over the first lengths[b] positions of each row's pages; zeros where there are none."""
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        if length:
            pages = table[b, : -(-length // k_cache.shape[1])].long()
            k, v = (cache[pages].flatten(0, 1)[:length].float().transpose(0, 1) for cache in (k_cache, v_cache))
            rows = q[b].float().view(len(k), -1, q.shape[2])
            out[b] = ((rows @ k.mT * scale).softmax(-1) @ v).flatten(0, 1).to(q.dtype)
    return out


def add_low_rank_(y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """y [T, n N] += h [T, n R] b' of b [n, N, R], module by module."""
    y_nTN, h_nTR = (t.unflatten(1, (len(b), -1)).transpose(0, 1) for t in (y, h))
    y_nTN.copy_(torch.baddbmm(y_nTN.float(), h_nTR.float(), b.transpose(1, 2).float()))
    return y
