"""y = x W' + s (x A') B' + residual for up to 64 rows, W read as NF4 codes: the linear layer of a batch's decode step.

`nf4_linear` decodes a weight for every 16 rows anew; here one decoded weight meets all rows. Dequantised for good, the
weights of a 7B take 12 GiB more and four times the bytes a step, and are faster where `beats_dense` says no. How it
works is in nf4_batch.cu. Two launches where there are adapters: h = x A' for all of them, then the product, which
leaves out what a row's own adapter did not make.

bfloat16 on a GPU, where `serves` says so; anything else is for the caller. A weight is the table's value times
its scale, each rounded to bfloat16, and rounded again.

Shapes: M rows, D inputs, N outputs, G modules, R rank, S adapters.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cuda import CudaKernel, cuda_kernel
from .dispatch import ceil_div, next_power_of_2
from .nf4 import TABLE
from .nf4_linear import SCALES, LoraTerms, NF4Weights, check_adapters

MAX_ROWS = 64
COLUMNS = 128  # of a unit of work


class Cut(NamedTuple):
    """How nf4_batch.cu is compiled."""

    tall: int = 2
    """Tiles of 16 outputs a warp."""
    ahead: int = 2
    """Units by which codes are asked for ahead."""
    warps: int = 8
    stages: int = 3

    @property
    def outputs(self) -> int:
        """Of a program at a time."""
        return 16 * self.tall * self.warps

    def shared(self, rows: int) -> int:
        """Bytes: the table, the stages of x, the sums, the rows' adapters and a flag."""
        return 2**15 + self.stages * rows * 2 * COLUMNS + rows * (self.outputs + 4) * 4 + rows * 4 + 16


CUT = Cut()


def beats_dense(rows: int, N: int, D: int) -> bool:
    """Whether this is faster than cuBLAS over weights dequantised for good: bench/kernels_decode.py, one H100."""
    return rows <= (MAX_ROWS if N >= 16384 else 32 if N * D > 2**24 else 0)


@cache
def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether nf4_batch.cu runs there: from compute capability 8.0 on, with room for 64 rows, if it can be compiled."""
    if device.type != "cuda" or torch.version.hip is not None or dtype != torch.bfloat16:
        return False
    found = torch.cuda.get_device_properties(device)
    room = getattr(found, "shared_memory_per_block_optin", 0)  # torch's types leave it out
    if found.major < 8 or room < CUT.shared(MAX_ROWS):
        return False
    return _kernel(device.index, CUT, MAX_ROWS, torch.bfloat16, lora=False, residual=False) is not None


def nf4_batch(
    x: Tensor,
    weights: NF4Weights,
    lora: LoraTerms | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    cut: Cut = CUT,
) -> Tensor:
    """x W' + s (x A') B' + residual -> [M, N]; no gradient. Can be captured in a CUDA graph.

    Not from two streams at once over the same weights.

    Args:
        x: bf16 [M, D] where `serves` says so, 1 <= M <= 64.
        lora: adapters, their ranks filled up to a multiple of 8; None for none at all.
        residual: [M, N]; may be `out`.
        out: [M, N], rows dense.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    (M, D), N, sizes, absmax = x.shape, weights.N, weights.sizes, weights.absmax
    y = x.new_empty(M, N) if out is None else out
    added = y if residual is None else residual
    _check(x, weights, lora, added, y)
    rows = max(next_power_of_2(M), 16)
    kernel = _kernel(x.device.index, cut, rows, absmax.dtype, lora=lora is not None, residual=residual is not None)
    assert kernel is not None
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    S, R, units = 0, 8, ceil_div(D, COLUMNS)
    h, b, scaling, slots = x, x, absmax, weights.counters
    if lora is not None:
        b, scaling, slots = lora.b, lora.scaling, lora.slots
        h, (S, _, R) = F.linear(x, lora.a.flatten(0, 1)), b.shape
        units += S * ceil_div(R, COLUMNS)
    code, outer, offset = weights.double or (absmax,) * 3
    work = sum(ceil_div(size, cut.outputs) for size in sizes) * units
    programs = min(work, torch.cuda.get_device_properties(x.device).multi_processor_count)
    shares = torch.empty(programs * 2 * rows * cut.outputs, dtype=torch.float32, device=x.device)
    kernel(
        programs, x, weights.codes, absmax, code, outer, offset, h, b, scaling, slots, added, y, shares,
        weights.counters[2:], x.stride(0), added.stride(0), y.stride(0), M, N, D, sizes[0], sum(sizes[:2]), S, R,
        len(sizes),
    )  # fmt: skip
    return y


def _kernel(device: int, cut: Cut, rows: int, stored: torch.dtype, *, lora: bool, residual: bool) -> CudaKernel | None:
    return _compiled(
        device, cut.shared(rows), WIDE=rows // 8, TALL=cut.tall, WARPS=cut.warps, STAGES=cut.stages, AHEAD=cut.ahead,
        SCALES=SCALES.index(stored), LORA=int(lora), RESIDUAL=int(residual),
    )  # fmt: skip


@cache
def _compiled(device: int, shared: int, **defined: int) -> CudaKernel | None:
    return cuda_kernel("nf4_batch.cu", "nf4_batch", device, {**defined, "TABLE": TABLE}, 32 * defined["WARPS"], shared)


def _check(x: Tensor, weights: NF4Weights, lora: LoraTerms | None, residual: Tensor, out: Tensor) -> None:
    M, N, D = len(x), weights.N, weights.D
    if not 1 <= M <= MAX_ROWS or x.shape[1:] != (D,) or x.dtype != torch.bfloat16:
        raise ValueError(f"x {tuple(x.shape)} in {x.dtype}: expected 1 to {MAX_ROWS} rows of {D} in bfloat16")
    for tensor in (residual, out):
        dense = tensor.stride(1) == 1 and tensor.stride(0) % 4 == 0 and tensor.data_ptr() % 8 == 0
        if tensor.shape != (M, N) or tensor.dtype != x.dtype or not dense:
            raise ValueError(f"out and residual must be {(M, N)} in {x.dtype} with dense rows, 8 bytes aligned")
    if lora is not None:
        check_adapters(x, weights, lora)
