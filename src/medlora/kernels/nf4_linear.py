"""y = f(x) W' + s (f(x) A') B' + residual for a few rows, W read as NF4 codes: the linear layer of a decode step.

Here f is the identity or RMSNorm; W belongs to the modules that read one input (q, k, v or gate, up), their codes end
to end; A and B to one of several adapters, chosen row by row, or to none (Hu et al. 2022, arXiv 2106.09685). Of gate
and up, what is written may be silu(gate) * up.

Two launches, where f or an adapter asks for the first. `_prepare_kernel` applies f once and computes h = s f(x) A'.
Then one of two products, which decode blocks of 64 weights in registers, multiply on the tensor cores (also for one
row: the multiplications are then free) and apply a block's absmax to the fp32 result:

- nf4_linear.cu, in bfloat16 where D is a multiple of 256: two weights a look-up in a table in shared memory. For one
  row it does the first launch's work too.
- `_product_kernel`, anywhere that Triton runs: its programs split the columns, and the last one of a tile adds the
  shares in order, so results do not depend on who came last. PRMT picks four bytes of eight by four nibbles: 2.6
  integer instructions a weight, whose units work at half rate, and that is its limit.

In bfloat16 the table's values are rounded to bf16 and scales are not; bitsandbytes rounds their product instead.

Shapes: M rows, D inputs, N outputs, G modules, R rank, S adapters.
"""

# torch leaves Tensor.split untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .cuda import CudaKernel, cuda_kernel, early_start, wait_for_inputs
from .dispatch import ceil_div, jit, next_power_of_2, tl, use_triton
from .nf4 import BITS, BLOCKSIZE, OUTER_BLOCKSIZE, TABLE, DoubleQuant, dequantize_nf4, narrow, nf4_values, stored_scales
from .swiglu import swiglu

MAX_ROWS = 16
MAX_MODULES = 3
TILE = 16  # a module's outputs come in multiples of this
BATCH_COUNTERS = 64  # tiles of ranks that programs share in nf4_batch
RANK_STEP = 8  # and ranks of this: rows of b begin where loads of 16 bytes may
PROGRAMS = 528  # programs that fill a GPU of 132 multiprocessors, four on each
CHUNK = 4096  # most columns at once in `_prepare_kernel`
RANKS = 4  # rows of A a program
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)  # by their number in nf4_linear.cu


@dataclass(frozen=True, slots=True)
class NF4Weights:
    """Frozen modules that read one input, as one [N, D] in NF4."""

    codes: Tensor
    """uint8 [N, D // 2], each module's bytes as bitsandbytes holds them."""
    absmax: Tensor
    """[N, D // 64]; fp32, or bf16 or fp16 where that holds every scale exactly; uint8 with `double`."""
    sizes: tuple[int, ...]
    """Outputs of each module."""
    double: DoubleQuant | None = None
    """Its offset holds one value a module, [G]."""
    counters: Tensor = field(init=False, repr=False)
    """int32 [2 + N // 16 + 64], zero between launches: what nf4_linear.cu's programs wait for each other by, and how
    many of those that share a tile are through in nf4_batch.cu and, of h, in nf4_prepare.cu."""

    def __post_init__(self) -> None:
        counters = torch.zeros(2 + self.N // TILE + BATCH_COUNTERS, dtype=torch.int32, device=self.codes.device)
        object.__setattr__(self, "counters", counters)

    @property
    def N(self) -> int:
        return self.codes.shape[0]

    @property
    def D(self) -> int:
        return 2 * self.codes.shape[1]

    @classmethod
    def of(cls, weights: Sequence[Tensor], states: Sequence[Any]) -> NF4Weights:
        """Concatenate copies of bitsandbytes' codes and scales; at load time, for it waits for the device.

        The second quantisation of absmax is kept where its blocks of 256 do not cross modules, else undone.

        Args:
            weights: `weight.data` of each module, uint8.
            states: their `quant_state`.

        Raises:
            ValueError: not NF4 in blocks of 64, more than three modules, or shapes off the kernel's multiples.
        """
        sizes, D = tuple(int(state.shape[0]) for state in states), int(states[0].shape[1])
        if D % BLOCKSIZE or any(N % TILE for N in sizes) or not 1 <= len(sizes) <= MAX_MODULES:
            raise ValueError(
                f"weights {[tuple(state.shape) for state in states]}: expected up to {MAX_MODULES} modules with inputs "
                f"in multiples of {BLOCKSIZE} and outputs in multiples of {TILE}"
            )
        codes = torch.cat([weight.reshape(-1, D // 2) for weight in weights])
        doubles = [DoubleQuant.of(state) for state in states]
        absmax, double = _joined_scales([stored_scales(state) for state in states], doubles)
        return cls(codes, absmax.view(-1, D // BLOCKSIZE), sizes, double)

    def parts(self) -> list[Tensor]:
        """Each module's codes in bitsandbytes' shape [N D / 2, 1], views that can stand in for its own copy."""
        return [part.view(-1, 1) for part in self.codes.split(self.sizes)]

    def dequantize(self, out: Tensor) -> Tensor:
        """Write the weights into `out` [N, D] of any float dtype and return it."""
        if self.double is None or len(self.sizes) == 1:
            return dequantize_nf4(self.codes, self.absmax.flatten(), out, self.double)
        for rows, double in self._parts(2**62):
            dequantize_nf4(self.codes[rows], self.absmax[rows].flatten(), out[rows], double)
        return out

    def pieces(self, most: int) -> list[NF4Weights]:
        """Views of each module by itself, and of a module of more than `most` weights in about equal parts."""
        parts = self._parts(most)
        return [NF4Weights(self.codes[at], self.absmax[at], (at.stop - at.start,), double) for at, double in parts]

    def _parts(self, most: int) -> Iterator[tuple[slice, DoubleQuant | None]]:
        """Their rows, and how to undo their second quantisation."""
        first = 0
        for g, N in enumerate(self.sizes):
            each = ceil_div(N, ceil_div(N * self.D, most))
            step = ceil_div(each, OUTER_BLOCKSIZE) * OUTER_BLOCKSIZE  # so that an outer block ends with a piece
            for start in range(first, first + N, step):
                rows = slice(start, min(start + step, first + N))
                blocks = self.absmax[:start].numel(), self.absmax[: rows.stop].numel()
                outer = slice(blocks[0] // OUTER_BLOCKSIZE, ceil_div(blocks[1], OUTER_BLOCKSIZE))
                double = self.double and DoubleQuant(self.double.code, self.double.absmax[outer], self.double.offset[g])
                yield rows, double
            first += N


def _joined_scales(absmax: list[Tensor], doubles: list[DoubleQuant | None]) -> tuple[Tensor, DoubleQuant | None]:
    nested = [double for double in doubles if double is not None]
    if len(nested) == len(absmax):
        aligned = len(absmax) == 1 or all(a.numel() % OUTER_BLOCKSIZE == 0 for a in absmax)
        if aligned and all(torch.equal(double.code, nested[0].code) for double in nested):
            outer = torch.cat([double.absmax for double in nested])
            offset = torch.stack([double.offset.float().reshape(()) for double in nested])
            return torch.cat(absmax), DoubleQuant(nested[0].code, outer, offset)
    plain = zip(absmax, doubles, strict=True)
    return narrow(torch.cat([a.float() if d is None else reference.dequantize_absmax(a, *d) for a, d in plain])), None


@dataclass(frozen=True, slots=True)
class LoraTerms:
    """Adapters over an NF4Weights and which of them each row takes."""

    a: Tensor
    """[S, G R, D], of x's dtype, module after module; a shorter rank is filled up with zeros, R to a multiple of 8."""
    b: Tensor
    """[S, N, R], of x's dtype."""
    scaling: Tensor
    """fp32 [S, G]."""
    slots: Tensor
    """int32 [M or more]: the adapter of each row, -1 for none. May be overwritten between launches."""

    @classmethod
    def stack(
        cls,
        adapters: Sequence[Sequence[tuple[Tensor, Tensor, float] | None]],
        sizes: tuple[int, ...],
        D: int,
        slots: Tensor,
        dtype: torch.dtype,
    ) -> LoraTerms:
        """From (a [r, D], b [N_g, r], scaling), or None, of each adapter's modules; copies them."""
        R = padded_rank(max((len(part[0]) for parts in adapters for part in parts if part), default=1))
        S, G, device = len(adapters), len(sizes), slots.device
        a = torch.zeros(S, G, R, D, dtype=dtype, device=device)
        b = torch.zeros(S, sum(sizes), R, dtype=dtype, device=device)
        scaling = torch.zeros(S, G, device=device)
        for s, parts in enumerate(adapters):
            for g, (part, rows) in enumerate(zip(parts, b[s].split(sizes), strict=True)):
                if part is not None:
                    a[s, g, : len(part[0])] = part[0]
                    rows[:, : len(part[0])] = part[1]
                    scaling[s, g] = part[2]
        return cls(a.view(S, G * R, D), b, scaling, slots)


def padded_rank(r: int) -> int:
    """As LoraTerms hold it."""
    return ceil_div(r, RANK_STEP) * RANK_STEP


def check_adapters(x: Tensor, weights: NF4Weights, lora: LoraTerms) -> None:
    """Raise ValueError if they are not for x and the weights."""
    S, N, R = lora.b.shape
    G, D = len(weights.sizes), weights.D
    alike = lora.a.dtype == lora.b.dtype == x.dtype
    shapes = (lora.a.shape, N, lora.scaling.shape)
    if shapes != ((S, G * R, D), weights.N, (S, G)) or R % RANK_STEP or len(lora.slots) < len(x) or not alike:
        raise ValueError(f"adapters a {tuple(lora.a.shape)}, b {tuple(lora.b.shape)} do not fit x and {(weights.N, D)}")


def _decode_asm() -> str:
    """PTX: four bytes of codes -> their high nibbles, then their low ones, as bf16 values in four registers.

    A nibble's lower three bits pick a byte of each half of the table, its top bit one of the two picks.
    """
    lines = [".reg .b32 m, s, h, l, u, v", "and.b32 m, $4, 0x77777777", "shr.b32 s, $4, 1"]
    lines += ["and.b32 s, s, 0x44444444", "or.b32 s, s, 0x32103210"]
    for half in range(2):
        if half:
            lines += ["shr.b32 m, m, 16", "shr.b32 s, s, 16"]
        for byte, shift in (("h", 8), ("l", 0)):
            table = [sum((BITS[i + j] >> shift & 255) << 8 * j for j in range(4)) for i in (0, 4, 8, 12)]
            lines += [f"prmt.b32 u, {table[0]:#x}, {table[1]:#x}, m", f"prmt.b32 v, {table[2]:#x}, {table[3]:#x}, m"]
            lines += [f"prmt.b32 {byte}, u, v, s"]
        lines += [f"prmt.b32 ${half}, l, h, 0x7351", f"prmt.b32 ${half + 2}, l, h, 0x6240"]
    return "{ " + "; ".join(lines) + "; }"


DECODE_ASM = _decode_asm() if tl is None else tl.constexpr(_decode_asm())


@jit
def _decode(codes: tl.tensor, ASM: tl.constexpr, BN: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Codes [BN, 32] -> the weights of even and of odd columns, bf16 with ASM, else fp32."""
    if ASM:
        even, odd = tl.inline_asm_elementwise(
            DECODE_ASM, "=r,=r,=r,=r,r", [codes], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        flat = tl.reshape(codes, (BN * 32,)).to(tl.int32)
        even = tl.reshape(tl.gather(nf4_values(), flat >> 4, 0), (BN, 32))
        odd = tl.reshape(tl.gather(nf4_values(), flat & 15, 0), (BN, 32))
    return even, odd


@jit
def _scales(
    absmax: tl.tensor, code: tl.tensor, outer: tl.tensor, offset: tl.tensor, at: tl.tensor, DOUBLE: tl.constexpr
) -> tl.tensor:
    """fp32 scales of the blocks `at`; `offset` points at the module's own."""
    if DOUBLE:
        inner = tl.load(code + tl.load(absmax + at).to(tl.int32))
        scale = inner * tl.load(outer + at // 256) + tl.load(offset)
    else:
        scale = tl.load(absmax + at).to(tl.float32)
    return scale


@jit
def _input(
    x: tl.tensor,
    norm: tl.tensor,
    col: tl.tensor,
    inverse: tl.tensor,
    D: tl.constexpr,
    NORM: tl.constexpr,
) -> tl.tensor:
    """f(x) of one row at columns `col`, fp32 rounded to x's dtype."""
    inside = col < D
    value = tl.load(x + col, inside, other=0.0).to(tl.float32)
    if NORM:
        value = (value * inverse).to(x.dtype.element_ty).to(tl.float32)
        value = value * tl.load(norm + col, inside, other=0.0).to(tl.float32)
    return value.to(x.dtype.element_ty).to(tl.float32)


@jit
def _prepare_kernel(
    x: tl.tensor,
    norm: tl.tensor,
    inner: tl.tensor,
    counters: tl.tensor,
    a: tl.tensor,
    scaling: tl.tensor,
    slots: tl.tensor,
    h: tl.tensor,
    x_row: int,
    M: int,
    R: int,
    G: int,
    tiles: int,
    eps: float,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BY_PARITY: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Row program_id(0): program 0 writes f(x) into inner, the others RANKS of h [M, G R].

    inner is [M, D], or BY_PARITY [2, M, D / 2]. All loops are unrolled, so that a row's loads are under way together.
    """
    wait_for_inputs(EARLY)
    row, part = tl.program_id(0), tl.program_id(1)
    x += row.to(tl.int64) * x_row
    chunk = tl.arange(0, CHUNK)
    inverse = 1.0
    if NORM:
        squares = tl.zeros((CHUNK,), tl.float32)
        for start in tl.static_range(0, D, CHUNK):
            value = tl.load(x + start + chunk, start + chunk < D, other=0.0).to(tl.float32)
            squares += value * value
        inverse = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    if part == 0:
        for start in tl.static_range(0, D, CHUNK):
            col = start + chunk
            value = _input(x, norm, col, inverse, D, NORM)
            to = inner + row * D + col
            if BY_PARITY:
                to = inner + (col % 2 * M + row) * (D // 2) + col // 2
            tl.store(to, value.to(inner.dtype.element_ty), col < D)
        for tile in range(0, tiles, CHUNK):
            tl.store(counters + tile + chunk, 0, tile + chunk < tiles)
    else:
        rank = (part - 1) * RANKS + tl.arange(0, RANKS)
        slot = tl.load(slots + row)
        total = tl.zeros((RANKS,), tl.float32)
        if slot >= 0:
            rows = a + slot.to(tl.int64) * G * R * D + rank[:, None] * D
            for start in tl.static_range(0, D, CHUNK):
                col = start + chunk
                inside = (rank < G * R)[:, None] & (col < D)[None, :]
                factor = tl.load(rows + col[None, :], inside, other=0.0).to(tl.float32)
                total += tl.sum(factor * _input(x, norm, col, inverse, D, NORM)[None, :], 1)
            total *= tl.load(scaling + slot * G + rank // R, rank < G * R, other=0.0)
        tl.store(h + row * G * R + rank, total.to(h.dtype.element_ty), rank < G * R)


@jit
def _product_kernel(
    halves: tl.tensor,
    codes: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    outer: tl.tensor,
    offset: tl.tensor,
    h: tl.tensor,
    b: tl.tensor,
    slots: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    shares: tl.tensor,
    counters: tl.tensor,
    residual_row: int,
    y_row: int,
    M: int,
    N: int,
    D: int,
    end0: int,
    end1: int,
    S: int,
    R: int,
    G: int,
    DOUBLE: tl.constexpr,
    LORA: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ASM: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Outputs [pid0 * BN, ...) over share pid1 of SPLIT of the columns, STEP blocks of 64 at once."""
    tile, share = tl.program_id(0), tl.program_id(1)
    g = (tile * BN >= end0).to(tl.int32) + (tile * BN >= end1).to(tl.int32)
    n = tile * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    byte = tl.arange(0, 32)
    blocks = D // 64
    steps = blocks // STEP
    at_codes = codes + n.to(tl.int64)[:, None] * (D // 2) + byte[None, :]
    even_x = halves + m[:, None] * (D // 2) + byte[None, :]
    odd_x = even_x + M * (D // 2)
    row = (m < M)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    # A block's scales are asked for while the block before is decoded: only the product's operands are pipelined.
    first = steps * share // SPLIT * STEP
    scale = _scales(absmax, code, outer, offset + g, n * blocks + first, DOUBLE)
    for start in range(first, steps * (share + 1) // SPLIT * STEP, STEP):
        for i in tl.static_range(STEP):
            block = start + i
            packed = tl.load(at_codes + block * 32)
            following = _scales(absmax, code, outer, offset + g, n * blocks + tl.minimum(block + 1, blocks - 1), DOUBLE)
            even, odd = _decode(packed, ASM, BN)
            x_even = tl.load(even_x + block * 32, row, other=0.0).to(even.dtype)
            x_odd = tl.load(odd_x + block * 32, row, other=0.0).to(odd.dtype)
            part = tl.dot(even, tl.trans(x_even), input_precision="ieee")
            part = tl.dot(odd, tl.trans(x_odd), part, input_precision="ieee")
            acc += part * scale[:, None]
            scale = following

    last = True
    if SPLIT > 1:
        to = shares + n[:, None] * BM + m[None, :]
        tl.store(to + share * N * BM, acc)
        tl.debug_barrier()  # every thread's store comes before the program's count
        last = tl.atomic_add(counters + tile, 1) == SPLIT - 1
        if last:
            acc = tl.zeros((BN, BM), tl.float32)
            for i in range(SPLIT):
                acc += tl.load(to + i * N * BM, cache_modifier=".cg")
    if last:
        if LORA:
            rank = tl.arange(0, BR)
            slot = tl.load(slots + m, m < M, other=-1)
            for s in range(S):
                mine = slot == s
                if tl.max(mine.to(tl.int32), 0) > 0:
                    inside = mine[:, None] & (rank < R)[None, :]
                    x_h = tl.load(h + m[:, None] * (G * R) + g * R + rank[None, :], inside, other=0.0)
                    rows = b + (s * N + n)[:, None] * R
                    w_b = tl.load(rows + rank[None, :], (rank < R)[None, :], other=0.0)
                    acc = tl.dot(w_b, tl.trans(x_h), acc, input_precision="ieee")
        inside = (m < M)[None, :] & (n < N)[:, None]
        if RESIDUAL:
            acc += tl.load(residual + m[None, :] * residual_row + n[:, None], inside, other=0.0).to(tl.float32)
        tl.store(y + m[None, :] * y_row + n[:, None], acc.to(y.dtype.element_ty), inside)


class Config(NamedTuple):
    """How `_product_kernel` is cut: outputs a program, shares of the columns, blocks a step, warps, stages."""

    BN: int
    SPLIT: int
    STEP: int
    warps: int
    stages: int


def choose_config(sizes: tuple[int, ...], D: int, M: int) -> Config:
    """Tiles that do not cross modules, and as many shares as fill the GPU."""
    BN = next(size for size in (64, 32, 16) if all(N % size == 0 for N in sizes))
    blocks = D // BLOCKSIZE
    STEP = next(step for step in (4, 2, 1) if blocks % step == 0)
    split = min(ceil_div(PROGRAMS, sum(sizes) // BN), max(blocks // STEP // 2, 1))
    # Above 8 rows, 64 outputs of four warps would go through wgmma, which wants x in another layout: 6.7 rather than
    # 4.4 instructions a weight.
    return Config(BN, split, STEP, warps=max(BN // (16 if M <= 8 else 32), 1), stages=3)


def nf4_linear(
    x: Tensor,
    weights: NF4Weights,
    lora: LoraTerms | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | Cut | None = None,
) -> Tensor:
    """f(x) W' + s (f(x) A') B' + residual -> [M, N] in x's dtype; no gradient. Can be captured in a CUDA graph.

    Not from two streams at once: programs wait for each other.

    Args:
        x: [M, D], 1 <= M <= 16; bf16, or fp32 and fp16 at a lower speed; rows dense.
        lora: adapters, None for none at all.
        norm: weight [D] and epsilon of an RMSNorm of x.
        gated: the modules are gate and up, and silu(gate) * up [M, N / 2] is returned.
        residual: [M, N]; may be `out`; not with `gated`.
        out: as what is returned, rows dense.
        config: instead of what is chosen; a `Cut` for nf4_linear.cu.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    out = x.new_empty(len(x), weights.N // (1 + gated)) if out is None else out
    _check(x, weights, lora, gated, residual, out)
    if not use_triton(x):
        return out.copy_(_plain(x, weights, lora, norm, gated, residual))
    cut = config if isinstance(config, Cut) else choose_cut(x, norm) if config is None else None
    if cut and _table_product(x, weights, lora, norm, gated, residual, out, cut):
        return out
    config = config if isinstance(config, Config) else choose_config(weights.sizes, weights.D, len(x))
    y = x.new_empty(len(x), weights.N) if gated else out
    _product(x, weights, lora, norm, residual, y, config)
    if gated:
        gate, up = y.chunk(2, 1)
        swiglu(gate, up, out)
    return out


def _prepare(
    x: Tensor,
    weights: NF4Weights,
    lora: LoraTerms | None,
    norm: tuple[Tensor, float] | None,
    counters: Tensor,
    *,
    by_parity: bool,
) -> tuple[Tensor, Tensor]:
    """f(x), x itself where that is the same, and h."""
    (M, D), G = x.shape, len(weights.sizes)
    R = lora.b.shape[2] if lora else 0
    h = x.new_empty(M, max(G * R, 1))
    same = norm is None and not by_parity and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    if same and lora is None:
        return x, h
    inner = x.new_empty(M, D)
    a, scaling, slots = (lora.a, lora.scaling, lora.slots) if lora else (x, x, counters)
    weight, eps = norm or (x, 0.0)
    _prepare_kernel[(M, 1 + ceil_div(G * R, RANKS))](
        x, weight, inner, counters, a, scaling, slots, h, x.stride(0), M, R, G, len(counters), eps, D=D,
        NORM=norm is not None, BY_PARITY=by_parity, CHUNK=min(CHUNK, next_power_of_2(D)), RANKS=RANKS,
        num_warps=8, **early_start(x),
    )  # fmt: skip
    return (x if same else inner), h


class Cut(NamedTuple):
    """How nf4_linear.cu is compiled."""

    resident: int
    """Programs on a multiprocessor, which must share its registers."""
    warps: int = 8
    """Of a program, that stream codes."""
    one: bool = False
    """One row in one launch."""


def choose_cut(x: Tensor, norm: tuple[Tensor, float] | None) -> Cut | None:
    """By `bench/kernels_decode.py`; None where nf4_linear.cu does not serve.

    It does in bfloat16, with D a multiple of 256, from compute capability 8.0 on.
    """
    M, D = x.shape
    if not x.is_cuda or x.dtype != torch.bfloat16 or D % 256 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return None
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (x, norm[0] if norm else x))
    return Cut(1 if M > 8 else 2, one=M == 1 and aligned)


@cache
def _compiled(device: int, shared: int, **defined: int) -> CudaKernel | None:
    return cuda_kernel(
        "nf4_linear.cu", "nf4_product", device, {**defined, "TABLE": TABLE}, 32 * (defined["WARPS"] + 1), shared
    )


def _table_product(
    x: Tensor,
    weights: NF4Weights,
    lora: LoraTerms | None,
    norm: tuple[Tensor, float] | None,
    gated: bool,
    residual: Tensor | None,
    y: Tensor,
    cut: Cut,
) -> bool:
    """Whether nf4_linear.cu could be compiled here; y is written then."""
    (M, D), N, sizes, absmax, counters = x.shape, weights.N, weights.sizes, weights.absmax, weights.counters
    S, R = (lora.b.shape[0], lora.b.shape[2]) if lora else (0, 1)
    normed = cut.one and norm is not None
    kernel = _compiled(
        x.device.index, 2 * (D * normed + len(sizes) * R * cut.one),
        TILES=1 if M <= 4 else 2 if M <= 8 else 4, WARPS=cut.warps, RESIDENT=cut.resident,
        SCALES=SCALES.index(absmax.dtype), ONE=int(cut.one), NORM=int(normed), LORA=int(lora is not None),
        RESIDUAL=int(residual is not None), GATED=int(gated),
    )  # fmt: skip
    if kernel is None:
        return False
    resident = min(cut.resident, kernel.resident) * torch.cuda.get_device_properties(y.device).multi_processor_count
    programs = min(y.shape[1] // TILE, resident)
    if cut.one:
        h = torch.empty(len(sizes) * R, 4, dtype=torch.float32, device=x.device)
    else:
        x, h = _prepare(x, weights, lora, norm, counters[:0], by_parity=False)
    code, outer, offset = weights.double or (absmax,) * 3
    a, b, scaling, slots = (lora.a, lora.b, lora.scaling, lora.slots) if lora else (h,) * 4
    weight, eps = norm or (h, 0.0)
    added = y if residual is None else residual
    kernel(
        programs, x, weights.codes, absmax, code, outer, offset, h, b, slots, added, y,
        weight, a, scaling, counters, x.stride(0), added.stride(0), y.stride(0), M, N, D, sizes[0],
        sum(sizes[:2]), S, R, len(sizes), float(eps),
    )  # fmt: skip
    return True


def _product(
    x: Tensor,
    weights: NF4Weights,
    lora: LoraTerms | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    y: Tensor,
    config: Config,
) -> None:
    (M, N), D, sizes = y.shape, weights.D, weights.sizes
    counters = x.new_empty(N // config.BN, dtype=torch.int32)
    halves, h = _prepare(x, weights, lora, norm, counters, by_parity=True)
    BM = 8 if M <= 8 else 16
    split = config.SPLIT
    shares = torch.empty(split * N * BM if split > 1 else 1, dtype=torch.float32, device=y.device)
    code, outer, offset = weights.double or (weights.absmax,) * 3
    b, slots = (lora.b, lora.slots) if lora else (h, counters)
    S, R = (b.shape[0], b.shape[2]) if lora else (0, 1)
    _product_kernel[(N // config.BN, split)](
        halves, weights.codes, weights.absmax, code, outer, offset, h, b, slots,
        y if residual is None else residual, y, shares, counters,
        0 if residual is None else residual.stride(0), y.stride(0), M, N, D, sizes[0], sum(sizes[:2]), S, R, len(sizes),
        DOUBLE=weights.double is not None, LORA=lora is not None, RESIDUAL=residual is not None,
        ASM=y.is_cuda and y.dtype == torch.bfloat16, BN=config.BN, BM=BM, BR=max(next_power_of_2(R), 16),
        STEP=config.STEP, SPLIT=split, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _plain(
    x: Tensor,
    weights: NF4Weights,
    lora: LoraTerms | None,
    norm: tuple[Tensor, float] | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    w = weights.dequantize(torch.empty(weights.N, weights.D, device=x.device))
    terms = (lora.a, lora.b, lora.scaling, lora.slots[: len(x)]) if lora else None
    return reference.nf4_linear(x, w, weights.sizes, terms, norm, gated, residual)


def _check(
    x: Tensor, weights: NF4Weights, lora: LoraTerms | None, gated: bool, residual: Tensor | None, out: Tensor
) -> None:
    M, N, D, sizes = len(x), weights.N, weights.D, weights.sizes
    if not 1 <= M <= MAX_ROWS or x.shape[1:] != (D,):
        raise ValueError(f"x {tuple(x.shape)}: expected 1 to {MAX_ROWS} rows of {D}")
    if gated and (residual is not None or len(sizes) != 2 or sizes[0] != sizes[1]):
        raise ValueError(f"modules of {sizes} outputs: `gated` takes two alike and no residual")
    for tensor in (out, out if residual is None else residual):
        if tensor.shape != (M, N // (1 + gated)) or tensor.dtype != x.dtype or tensor.stride(-1) != 1:
            raise ValueError(f"out and residual must be {(M, N // (1 + gated))} in {x.dtype} with dense rows")
    if x.stride(-1) != 1:
        raise ValueError("the rows of x must be dense")
    if lora is not None:
        check_adapters(x, weights, lora)
