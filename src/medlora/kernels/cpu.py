"""The operations of a training step, written for a CPU's habits.

Four things cost most there beside the products themselves: drawing a Bernoulli mask element by element (fifteen
times a product's pass over memory), the flash-attention backward on short sequences, float32 copies of
[tokens, vocabulary], and norms in a dozen passes. So masks are cut from 64-bit draws, short documents get their
probabilities kept and a backward in plain products, the loss walks the vocabulary in chunks that stay in the
computation's own dtype, and a norm keeps its input and one number a token.

Shapes: T tokens, D inputs, N outputs, R rank, V vocabulary, H query heads, K key heads, L tokens of a document,
C head size.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

SHORT = 768  # documents up to here keep their [L, L] probabilities; longer ones are faster through flash attention
BLOCK = 128  # queries at once
CHUNK = 25 << 20  # bytes of logits held at once: what a cache of the last level holds


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """1 with probability 1 - p to within 2^-16, else 0, from torch's global generator."""
    count = math.prod(shape)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    threshold = round(p * 2**16) - 2**15
    return (bits.view(torch.int16)[:count] >= threshold).view(shape).to(dtype)


class _LoraLinear(Function):
    """y = x W' + s (m x / (1 - p)) A' B', keeping x, the mask and the rank-R product for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        h_TR = (x if mask is None else x * mask) @ a.t()
        y = x @ w.t()
        y.addmm_(h_TR, b.t(), alpha=scaling)
        ctx.save_for_backward(x, w, a, b, h_TR, mask)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, h_TR, mask = ctx.saved_tensors
        dh_TR = (grad @ b).mul_(ctx.scaling)
        da = (dh_TR.t() @ (x if mask is None else x * mask)).float()
        db = (grad.t() @ h_TR).float().mul_(ctx.scaling)
        if not ctx.needs_input_grad[0]:
            return None, None, da, db, None, None
        dx = grad @ w
        if mask is None:
            dx.addmm_(dh_TR, a)
        else:
            dx.addcmul_(dh_TR @ a, mask)
        return dx, None, da, db, None, None


def lora_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """A frozen linear layer with a LoRA branch.

    Args:
        x: [..., D], any floating dtype; products run in it.
        w: [N, D] frozen, of x's dtype.
        a: [R, D], b: [N, R] trained, usually float32; their gradients are float32.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r).
        dropout: probability of leaving an element of x out of the LoRA branch, drawn from the global generator.

    Returns:
        [..., N] of x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    mask = keep_mask(flat.shape, dropout, x.dtype) if dropout else None
    y: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        flat, w, a, b, scaling / (1 - dropout), mask
    )
    return y.view(*x.shape[:-1], -1)


class _RMSNorm(Function):
    """w x / rms(x), the quotient rounded to x's dtype as in Transformers; keeps x and 1 / rms(x) [..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, inverse)
        y: Tensor = (x * inverse).to(x.dtype).mul_(w)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, w, inverse = ctx.saved_tensors
        unit, g = x * inverse, (grad * w).to(inverse.dtype)
        g -= unit.mul_(torch.linalg.vecdot(unit, g)[..., None].div_(x.shape[-1]))
        return g.mul_(inverse).to(x.dtype), None, None


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) over the last dimension, in float32 inside.

    Args:
        x: [..., D], any floating dtype. w: [D] frozen, of x's dtype.
    """
    y: Tensor = _RMSNorm.apply(x, w, eps)  # type: ignore[no-untyped-call]
    return y


class _LinearCrossEntropy(Function):
    """The gradient of a summed cross-entropy is softmax - onehot, so one walk gives the loss and d hidden."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        size = max(1, min(CHUNK // (len(weight) * weight.element_size()), len(labels)))
        buffer = hidden.new_empty(size, len(weight))  # one for all: fresh pages cost more than the softmax
        for start in range(0, len(labels), size):
            rows, label = slice(start, start + size), labels[start : start + size]
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: len(label)])
            if d_hidden is None:
                total += F.cross_entropy(logits.float(), label, reduction="sum")
                continue
            at = torch.arange(len(label)), label
            below = logits.amax(1).float() - logits[at]
            p = torch.softmax(logits, -1, out=logits)
            p_chosen = p[at]
            # where bfloat16's p is 0, the loss follows from the logits themselves
            total += torch.where(p_chosen > 0, -p_chosen.float().log(), below).sum()
            p[at] = p_chosen - 1  # scatter_ would copy all of p twice
            torch.mm(p, weight, out=d_hidden[rows])
        ctx.save_for_backward(d_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T`, never holding more than 25 MiB of logits.

    Args:
        hidden: [T, D], only the rows that have a label. weight: [V, D], frozen. labels: [T] int64.

    Returns:
        Scalar float32. Without gradients the loss is taken from float32 logits.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
    return loss


class _ShortAttention(Function):
    """Causal attention of one document with its probabilities kept, by blocks of queries: a block sees only the keys
    up to its end, which halves the work, and a group's queries share one product."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, probabilities = torch.empty_like(q), []
        for start in range(0, q.shape[1], BLOCK):
            stop = min(start + BLOCK, q.shape[1])
            p = _probabilities(q[:, start:stop], k[:, :stop], start, scale)
            out[:, start:stop] = (p @ v[:, :stop]).view(q.shape[0], -1, q.shape[2])
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *probabilities = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, p in zip(range(0, q.shape[1], BLOCK), probabilities, strict=True):
            stop = min(start + BLOCK, q.shape[1])
            qb, gb = (t[:, start:stop].reshape(len(k), -1, q.shape[2]) for t in (q, grad))
            dv[:, :stop].baddbmm_(p.transpose(1, 2), gb)
            ds = torch._softmax_backward_data(gb @ v[:, :stop].transpose(1, 2), p, -1, p.dtype)
            dq[:, start:stop] = (ds @ k[:, :stop]).mul_(ctx.scale).view(q.shape[0], -1, q.shape[2])
            dk[:, :stop].baddbmm_(ds.transpose(1, 2), qb, alpha=ctx.scale)
        return dq, dk, dv, None


def _probabilities(q: Tensor, k: Tensor, start: int, scale: float) -> Tensor:
    """softmax of a block's scores: q [H, B, C] at positions start..., k [K, S, C] -> [K, H / K * B, S]."""
    group, block = len(q) // len(k), q.shape[1]
    future = torch.full((block, k.shape[1]), -math.inf, dtype=q.dtype).triu_(start + 1).repeat(group, 1)
    rows = q.reshape(len(k), group * block, -1)
    return torch.softmax(torch.baddbmm(future, rows, k.transpose(1, 2), alpha=scale), -1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, borders: list[int], scale: float) -> Tensor:
    """Causal attention that stays inside documents.

    Args:
        q: [H, T, C]. k, v: [K, T, C], K dividing H.
        borders: [0, ..., T], the documents' starts and the end.
        scale: factor of the scores, usually C ** -0.5.

    Returns:
        [H, T, C].
    """
    parts: list[Tensor] = []
    for start, stop in pairwise(borders):
        qd, kd, vd = q[:, start:stop], k[:, start:stop], v[:, start:stop]
        if q.requires_grad and stop - start <= SHORT:
            parts.append(_ShortAttention.apply(qd, kd, vd, scale))  # type: ignore[no-untyped-call]
        else:
            qd, kd, vd = qd[None], kd[None], vd[None]
            parts.append(F.scaled_dot_product_attention(qd, kd, vd, is_causal=True, scale=scale, enable_gqa=True)[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
