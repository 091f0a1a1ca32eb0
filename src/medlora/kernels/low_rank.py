"""LoRA's second product added to what the frozen weights gave, in one pass.

    y += h b'        Hu et al. 2021 (LoRA, arXiv 2106.09685)

With so few ranks the pass over y is all that takes time, and cuBLAS, made for long sums, moves it at two thirds of the
memory's bandwidth. Where the weights lie beside the adapters (`model.group`) nobody needs it; with FP8 they cannot.

Shapes: T tokens, n modules side by side, N outputs and R ranks of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import ceil_div, jit, next_power_of_2, tl, use_triton

LAUNCH = {"ROWS": 64, "COLUMNS": 128, "num_warps": 4}  # of a tile
STEPS = (16, 64)  # ranks of a product: what the tensor cores take at least, what a program holds


@jit
def _add_kernel(
    y: tl.tensor,
    h: tl.tensor,
    b: tl.tensor,
    y_row: int,
    h_row: int,
    b_module: int,
    b_row: int,
    T: int,
    N: int,
    R: int,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    module = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = y + row * y_row + module * N + col[None, :]
    inside = (row < T) & (col < N)[None, :]
    before = tl.load(at, inside, other=0.0)
    left, right = h + row * h_row + module * R, b + module * b_module + col[:, None] * b_row
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, R, STEP):
        rank = first + tl.arange(0, STEP)[None, :]
        x = tl.load(left + rank, (row < T) & (rank < R), other=0.0)
        w = tl.load(right + rank, (col < N)[:, None] & (rank < R), other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    tl.store(at, (total + before.to(tl.float32)).to(y.dtype.element_ty), inside)


@torch.no_grad()
def add_low_rank_(y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """y with h b' of each module added, in place, the sum rounded once; outside autograd.

    Args:
        y: [T, n N], rows dense, in any float dtype.
        h: [T, n R], likewise.
        b: [n, N, R], rows dense.

    Raises:
        ValueError: shapes that do not fit.
    """
    (T, width), (n, N, R) = y.shape, b.shape
    if (width, tuple(h.shape)) != (n * N, (T, n * R)):
        raise ValueError(f"y {tuple(y.shape)}, h {tuple(h.shape)} and b {tuple(b.shape)} do not fit")
    if not use_triton(y):
        return reference.add_low_rank_(y, h, b)
    grid = ceil_div(N, LAUNCH["COLUMNS"]), ceil_div(T, LAUNCH["ROWS"]), n
    step = min(max(next_power_of_2(R), STEPS[0]), STEPS[1])
    _add_kernel[grid](
        y, h, b, y.stride(0), h.stride(0), b.stride(0), b.stride(1), T, N, R,
        STEP=step, **LAUNCH,
    )  # fmt: skip
    return y
