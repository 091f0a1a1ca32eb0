"""Linear cross-entropy: the language-model head and its loss without the logits of the whole batch.

    loss_t = logsumexp(W h_t) - (W h_t)[label_t]        dh_t = W^T (softmax(W h_t) - onehot(label_t))

As in Liger (Hsu et al. 2024, arXiv 2410.10989) and Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009),
logits exist for a chunk of rows at a time: one matmul makes them, one kernel reads them twice (online
softmax, Milakov & Gimelshein 2018, then the gradient, which overwrites them), a second matmul turns them into
dh. The gradient is thus finished in the forward pass and the backward pass only scales it. Only labelled rows
take part: prompt and padding tokens cost nothing, and dh is kept for labelled rows alone.

Logits are in the input dtype (bf16 in training), as in Hugging Face, and the softmax in fp32. Memory is chunk
x V logits; larger chunks fill the GPU's matmul better, 1024 x 32,000 in bf16 is 64 MiB.

Shapes: T tokens, D hidden, V vocabulary, R labelled rows.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import jit, row_launch, tl, use_triton

MAX_BLOCK = 8192  # logits a program holds at a time: 16 a thread at 16 warps


@jit
def _cross_entropy_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    losses: tl.tensor,
    V: int,
    ignore_index: int,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: its loss and, with GRAD, softmax - onehot in place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    col = tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    # Read before the reductions below, which synchronise the program: the last pass overwrites it. A label
    # outside the vocabulary gives a loss of NaN instead of a read outside the tensor.
    picked = tl.load(logits + label, (label >= 0) & (label < V), other=float("nan")).to(tl.float32)

    peak = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + col, start + col < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
        peak = higher
    kept = label != ignore_index
    tl.store(losses + row, tl.where(kept, peak + tl.log(total) - picked, 0.0))

    if GRAD:
        weight = tl.where(kept, 1.0 / total, 0.0)
        hit = tl.where(kept, 1.0, 0.0)
        for start in range(0, V, BLOCK):
            at = start + col
            x = tl.load(logits + at, at < V, other=-float("inf")).to(tl.float32)
            grad = tl.exp(x - peak) * weight - tl.where(at == label, hit, 0.0)
            tl.store(logits + at, grad.to(logits.dtype.element_ty), at < V)


def cross_entropy_(logits: Tensor, labels: Tensor, ignore_index: int = -100, *, grad: bool = True) -> Tensor:
    """fp32 losses [R] of logits [R, V]; with `grad` the logits are overwritten by softmax - onehot.

    Args:
        logits: [R, V], contiguous.
        labels: [R], int64; rows labelled `ignore_index` get loss and gradient 0.
    """
    if not use_triton(logits):
        compute = reference.cross_entropy_ if grad else reference.cross_entropy
        return compute(logits, labels, ignore_index)
    R, V = logits.shape
    losses = torch.empty(R, dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(R,)](logits, labels, losses, V, ignore_index, GRAD=grad, **row_launch(min(V, MAX_BLOCK)))
    return losses


def _labelled_rows(labels: Tensor, ignore_index: int, labelled: int | None) -> Tensor:
    """Indices of the labelled rows; with `labelled` that many, unlabelled ones last."""
    ignored = labels == ignore_index
    if labelled is None:
        return (~ignored).nonzero().squeeze(1)
    return ignored.to(torch.uint8).argsort(stable=True)[:labelled]  # nonzero would wait for the device


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor, ignore_index: int, chunk: int
    ) -> Tensor:
        hidden_grad, weight_grad = ctx.needs_input_grad[:2]
        grad = hidden_grad or weight_grad
        R, (V, D) = len(rows), weight.shape
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        logits = hidden.new_empty(min(chunk, R), V)
        d_hidden = hidden.new_empty(R if hidden_grad else 0, D)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_grad else None
        for start in range(0, R, chunk):
            part = rows[start : start + chunk]
            h, piece = hidden[part], logits[: len(part)]
            torch.mm(h, weight.T, out=piece)
            loss += cross_entropy_(piece, labels[part], ignore_index, grad=grad).sum()
            if hidden_grad:
                torch.mm(piece, weight, out=d_hidden[start : start + chunk])
            if d_weight is not None:
                d_weight += piece.T @ h
        ctx.shape = hidden.shape
        ctx.save_for_backward(d_hidden, rows, None if d_weight is None else d_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, rows, d_weight = ctx.saved_tensors
        hidden_grad, weight_grad = ctx.needs_input_grad[:2]
        d_hidden = None
        if hidden_grad:
            d_hidden = d_rows.new_zeros(ctx.shape)
            d_hidden[rows] = d_rows * grad.to(d_rows.dtype)
        return d_hidden, d_weight * grad if weight_grad else None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    chunk: int = 1024,
    labelled: int | None = None,
) -> Tensor:
    """Sum of the losses of hidden @ weight.T over the labelled rows: fp32 scalar, differentiable once.

    Args:
        hidden: [T, D].
        weight: [V, D], in hidden's dtype; its gradient is computed only if it requires one.
        labels: [T], int64, already shifted; rows labelled `ignore_index` take no part.
        chunk: rows whose logits exist at a time.
        labelled: how many rows are labelled, or an upper bound, if the host knows. Without it the host waits
            for the device once to learn it; with one too small, the rows beyond it are dropped.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if hidden.dtype != weight.dtype or hidden.shape[1:] != weight.shape[1:] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected hidden [T, D], weight [V, D] of one dtype and labels [T], got {tuple(hidden.shape)} "
            f"{hidden.dtype}, {tuple(weight.shape)} {weight.dtype}, {tuple(labels.shape)}"
        )
    rows = _labelled_rows(labels, ignore_index, labelled)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, rows, ignore_index, chunk)
    return loss
