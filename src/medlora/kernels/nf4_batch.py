"""y = f(x) W' + s (f(x) A') B' + residual for up to 64 rows, W read as NF4 codes: a linear layer of a batch's step.

`nf4_linear` decodes a weight for every 16 rows anew; here one decoded weight meets all rows. Dequantised for good, the
weights of a 7B would take 12 GiB more and four times the bytes a step. How it works is in nf4_batch.cu; the launch
before it, in nf4_prepare.cu, applies the norm f, puts the columns of x in order and makes h = s f(x) A' for all
adapters, zero in rows that take another.

bfloat16 on a GPU, where `serves` says so; anything else is for the caller. A weight is the table's value times
its scale, each rounded to bfloat16, and rounded again.

Shapes: M rows, D inputs, N outputs, G modules, R rank, S adapters.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda import CudaKernel, cuda_kernel
from .dispatch import ceil_div, is_hopper, next_power_of_2
from .nf4 import TABLE
from .nf4_linear import BATCH_COUNTERS, SCALES, LoraTerms, NF4Weights, check_adapters

MAX_ROWS = 64
COLUMNS = 128  # of a unit of work
RANKS = 32  # of a unit of an adapter
STAGES, SLOTS = 4, 4  # units of x and of codes in shared memory
PREPARE_WARPS = 8  # in nf4_prepare.cu, as the three below
RANK_TILE = 16  # of a program
MOST_SHARES = 16  # that the columns of one tile of ranks are cut into
PREPARE_PROGRAMS = 200  # for ranks: two on a multiprocessor, beside those for rows


class Cut(NamedTuple):
    """How nf4_batch.cu is compiled."""

    hopper: bool = False
    """Whether four warps multiply together, by instructions that only compute capability 9.0 has."""
    tall: int = 2
    """Tiles of 16 outputs a warp."""
    warps: int = 8

    @property
    def outputs(self) -> int:
        """Of a program at a time."""
        return 16 * self.tall * self.warps

    def shared(self, rows: int) -> int:
        """Bytes: the table, the stages of x with two barriers for each, and the slots of codes."""
        return 2**15 + STAGES * (rows * 2 * COLUMNS + 16) + SLOTS * self.outputs * COLUMNS // 2


@cache
def choose_cut(device: torch.device) -> Cut:
    """By `bench/kernels_decode.py`, one H100."""
    return Cut(True, 1, 16) if is_hopper(device) else Cut()


@cache
def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there: from compute capability 8.0 on, with room for 64 rows, if they can be compiled."""
    if device.type != "cuda" or torch.version.hip is not None or dtype != torch.bfloat16:
        return False
    found, cut = torch.cuda.get_device_properties(device), choose_cut(device)
    room = getattr(found, "shared_memory_per_block_optin", 0)  # torch's types leave it out
    if found.major < 8 or room < cut.shared(MAX_ROWS):
        return False
    both = (
        _kernel(device.index, cut, MAX_ROWS, torch.bfloat16, lora=False, residual=False),
        _preparing(device.index, MAX_ROWS, norm=False, lora=False),
    )
    return all(kernel is not None for kernel in both)


def nf4_batch(
    x: Tensor,
    weights: NF4Weights,
    lora: LoraTerms | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """f(x) W' + s (f(x) A') B' + residual -> [M, N]; no gradient. Can be captured in a CUDA graph.

    Not from two streams at once over the same weights.

    Args:
        x: bf16 [M, D] where `serves` says so, 1 <= M <= 64.
        lora: adapters, their ranks filled up to a multiple of 8; None for none at all.
        norm: weight [D] and epsilon of the RMSNorm f; None for none.
        residual: [M, N]; may be `out`.
        out: [M, N], rows dense.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    M, N, D, sizes, absmax = len(x), weights.N, weights.D, weights.sizes, weights.absmax
    y = x.new_empty(M, N) if out is None else out
    added = y if residual is None else residual
    _check(x, weights, lora, norm, added, y)
    rows, cut = max(next_power_of_2(M), 16), cut or choose_cut(x.device)
    kernel = _kernel(x.device.index, cut, rows, absmax.dtype, lora=lora is not None, residual=residual is not None)
    assert kernel is not None
    image, h = _prepare(x, weights, lora, norm, rows)
    b, S, R = (lora.b, len(lora.b), lora.b.shape[2]) if lora else (h, 0, 8)
    code, outer, offset = weights.double or (absmax,) * 3
    work = sum(ceil_div(size, cut.outputs) for size in sizes) * (ceil_div(D, COLUMNS) + S * ceil_div(R, RANKS))
    programs = min(work, torch.cuda.get_device_properties(x.device).multi_processor_count)
    shares = torch.empty(programs * 2 * rows * cut.outputs, dtype=torch.float32, device=x.device)
    kernel(
        programs, image, weights.codes, absmax, code, outer, offset, h, b, added, y, shares, weights.counters[2:],
        added.stride(0), y.stride(0), M, N, D, sizes[0], sum(sizes[:2]), S, R, len(sizes),
    )  # fmt: skip
    return y


def _prepare(
    x: Tensor, weights: NF4Weights, lora: LoraTerms | None, norm: tuple[Tensor, float] | None, rows: int
) -> tuple[Tensor, Tensor]:
    """f(x) [D / 128, 16, rows, 8] and h [G, S, R / 32, 4, rows, 8] as nf4_prepare.cu leaves them, both rounded up."""
    (M, D), G = x.shape, len(weights.sizes)
    if x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    kernel = _preparing(x.device.index, rows, norm=norm is not None, lora=lora is not None)
    assert kernel is not None
    image = h = shares = x.new_empty(ceil_div(D, COLUMNS), 16, rows, 8)
    a, scaling, slots, S, R, tiles, split = x, x, weights.counters, 0, 8, 0, 1
    if lora is not None:
        a, scaling, slots, (S, _, R) = lora.a, lora.scaling, lora.slots, lora.b.shape
        parts = ceil_div(R, RANKS)
        tiles = S * G * parts * (RANKS // RANK_TILE)
        if tiles <= BATCH_COUNTERS:
            split = max(1, min(MOST_SHARES, ceil_div(D, 32 * PREPARE_WARPS), PREPARE_PROGRAMS // tiles))
        h = x.new_empty(G, S, parts, 4, rows, 8)
        shares = torch.empty(tiles * split * (RANK_TILE + 1) * rows, dtype=torch.float32, device=x.device)
    weight, eps = norm or (x, 0.0)
    if weight.data_ptr() % 16:
        weight = weight.clone()
    kernel(
        rows + tiles * split, x, weight, image, a, scaling, slots, h, shares, weights.counters[-BATCH_COUNTERS:],
        x.stride(0), M, D, S, R, G, split, float(eps),
    )  # fmt: skip
    return image, h


def _kernel(device: int, cut: Cut, rows: int, stored: torch.dtype, *, lora: bool, residual: bool) -> CudaKernel | None:
    return _compiled(
        "nf4_batch", device, cut.warps, cut.shared(rows), WIDE=rows // 8, TALL=cut.tall, WARPS=cut.warps,
        WGMMA=int(cut.hopper), SCALES=SCALES.index(stored), LORA=int(lora), RESIDUAL=int(residual),
    )  # fmt: skip


def _preparing(device: int, rows: int, *, norm: bool, lora: bool) -> CudaKernel | None:
    shared = PREPARE_WARPS * (RANK_TILE + 1) * (rows + 4) * 4
    return _compiled("nf4_prepare", device, PREPARE_WARPS, shared, WIDE=rows // 8, NORM=int(norm), LORA=int(lora))


@cache
def _compiled(name: str, device: int, warps: int, shared: int, **defined: int) -> CudaKernel | None:
    return cuda_kernel(f"{name}.cu", name, device, {**defined, "TABLE": TABLE}, 32 * warps, shared)


def _check(
    x: Tensor,
    weights: NF4Weights,
    lora: LoraTerms | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor,
    out: Tensor,
) -> None:
    M, N, D = len(x), weights.N, weights.D
    if not 1 <= M <= MAX_ROWS or x.shape[1:] != (D,) or x.dtype != torch.bfloat16:
        raise ValueError(f"x {tuple(x.shape)} in {x.dtype}: expected 1 to {MAX_ROWS} rows of {D} in bfloat16")
    if x.stride(1) != 1:
        raise ValueError("the rows of x must be dense")
    if norm is not None and (norm[0].shape != (D,) or norm[0].dtype != x.dtype or norm[0].stride(0) != 1):
        raise ValueError(f"a norm's weight of {tuple(norm[0].shape)} in {norm[0].dtype}: expected {D} in {x.dtype}")
    for tensor in (residual, out):
        if tensor.shape != (M, N) or tensor.dtype != x.dtype or tensor.stride(1) != 1:
            raise ValueError(f"out and residual must be {(M, N)} in {x.dtype} with dense rows")
    if lora is not None:
        check_adapters(x, weights, lora)
