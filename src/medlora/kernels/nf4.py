"""Dequantise NF4 weights (bitsandbytes storage) into a buffer the caller owns.

    w[i] = NF4[code_i] * absmax[i // 64]         Dettmers et al. 2023 (QLoRA, arXiv 2305.14314)

Layout: a weight [N, K] is flattened; byte j holds weights 2j (high nibble) and 2j + 1 (low nibble); every 64
weights share one fp32 absmax. That is the largest |w| of its block, so for a base that was bf16 or fp16 the same
16 bits hold it exactly: `narrow`. With double quantisation absmax itself is an 8-bit code into a 256-entry table,
scaled by a second absmax every 256 blocks and shifted by one offset; the kernel undoes that on the way.

The operation is bandwidth: half a byte read and two written a weight. A program takes NF4_BLOCKS whole blocks
as a [blocks, 32] tile of bytes, so the scale is loaded once a block and broadcast in registers. The 16 values
are built once a program in registers and looked up by `tl.gather`, which goes through shared memory (16 words
in 16 banks, so no conflicts): a tree of selects would cost 15 instructions a weight, more than the memory
traffic hides.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .dispatch import ceil_div, jit, tl, use_triton

BLOCKSIZE = 64  # weights a scale
OUTER_BLOCKSIZE = 256  # scales an outer scale
PROGRAM_BLOCKS = 64  # blocks a program: 4096 weights, 32 a thread
NARROW = (torch.bfloat16, torch.float16)
BITS: list[int] = torch.tensor(reference.NF4_VALUES).bfloat16().view(torch.uint16).tolist()
TABLE = ",".join(map(str, BITS))  # of nf4.cuh


class DoubleQuant(NamedTuple):
    """Undoes the quantisation of absmax: fp32 code [256], outer absmax [ceil(blocks / 256)], offset []."""

    code: Tensor
    absmax: Tensor
    offset: Tensor

    @classmethod
    def of(cls, quant_state: Any) -> DoubleQuant | None:
        """Read from a bitsandbytes QuantState; None where its absmax is plain fp32.

        Raises:
            ValueError: the state is not NF4 in blocks of 64 (and 256 for the outer scale).
        """
        if quant_state.quant_type != "nf4" or quant_state.blocksize != BLOCKSIZE:
            raise ValueError(
                f"only NF4 in blocks of {BLOCKSIZE} is supported, got {quant_state.quant_type} "
                f"in blocks of {quant_state.blocksize}"
            )
        if not quant_state.nested:
            return None
        if quant_state.state2.blocksize != OUTER_BLOCKSIZE:
            raise ValueError(f"absmax must be quantised in blocks of {OUTER_BLOCKSIZE}")
        return cls(quant_state.state2.code, quant_state.state2.absmax, quant_state.offset)


def narrow(absmax: Tensor) -> Tensor:
    """fp32 scales in bf16, else in fp16, if that holds each of them exactly; else as they are. Waits for the device."""
    for dtype in NARROW:
        small = absmax.to(dtype)
        if torch.equal(small.float(), absmax):
            return small
    return absmax


def stored_scales(quant_state: Any) -> Tensor:
    """A bitsandbytes QuantState's absmax as it lies in memory: fp32, 16 bits after `store_scales`, uint8 if nested."""
    scales: Tensor = vars(quant_state)["absmax"]
    return scales


def store_scales(quant_state: Any, scales: Tensor) -> None:
    """Hold `scales` in the place of a QuantState's absmax, whose values they are.

    bitsandbytes' kernels take fp32 alone and do not look, so whoever asks a state of 16-bit scales for its `absmax`
    (bitsandbytes' products, a state dict) gets an fp32 copy.
    """
    vars(quant_state)["absmax"] = scales
    if scales.dtype in NARROW:
        quant_state.__class__ = _widening(quant_state.__class__)


@cache
def _widening(kind: type) -> type:
    if isinstance(vars(kind).get("absmax"), property):
        return kind
    absmax = property(lambda self: stored_scales(self).float(), store_scales)
    plain = {"absmax": absmax, "__reduce__": lambda self: (_restored, (kind, vars(self) | {"absmax": self.absmax}))}
    return type(kind.__name__, (kind,), plain)


def _restored(kind: type, state: dict[str, Any]) -> Any:
    """A state as it was before `store_scales`, for pickle."""
    found: Any = object.__new__(kind)
    vars(found).update(state)
    return found


@jit
def nf4_values() -> tl.tensor:
    """The sixteen values as a register tensor [16]."""
    i = tl.arange(0, 16)
    v = tl.where(i == 0, -1.0, 0.0)
    v = tl.where(i == 1, -0.6961928009986877, v)
    v = tl.where(i == 2, -0.5250730514526367, v)
    v = tl.where(i == 3, -0.39491748809814453, v)
    v = tl.where(i == 4, -0.28444138169288635, v)
    v = tl.where(i == 5, -0.18477343022823334, v)
    v = tl.where(i == 6, -0.09105003625154495, v)
    v = tl.where(i == 8, 0.07958029955625534, v)
    v = tl.where(i == 9, 0.16093020141124725, v)
    v = tl.where(i == 10, 0.24611230194568634, v)
    v = tl.where(i == 11, 0.33791524171829224, v)
    v = tl.where(i == 12, 0.44070982933044434, v)
    v = tl.where(i == 13, 0.5626170039176941, v)
    v = tl.where(i == 14, 0.7229568362236023, v)
    return tl.where(i == 15, 1.0, v)


@jit
def _dequantize_kernel(
    codes: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    outer: tl.tensor,
    offset: tl.tensor,
    out: tl.tensor,
    blocks: int,
    row_blocks: int,
    out_row: int,
    DOUBLE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Blocks [pid * BLOCKS, (pid + 1) * BLOCKS) of a flattened weight, `row_blocks` of them a row."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    if DOUBLE:
        inner = tl.load(code + tl.load(absmax + block, inside, other=0).to(tl.int32))
        scale = inner * tl.load(outer + block // 256, inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, inside, other=0.0).to(tl.float32)

    wide = block.to(tl.int64)[:, None]  # N * K may pass 2**31
    packed = tl.load(codes + wide * 32 + tl.arange(0, 32)[None, :], inside[:, None], other=0).to(tl.int32)
    nibbles = tl.reshape(tl.join(packed >> 4, packed & 15), (BLOCKS * 64,))
    values = tl.reshape(tl.gather(nf4_values(), nibbles, 0), (BLOCKS, 64)) * scale[:, None]
    row = block // row_blocks
    at = row.to(tl.int64) * out_row + (block - row * row_blocks).to(tl.int64) * 64
    tl.store(out + at[:, None] + tl.arange(0, 64)[None, :], values.to(out.dtype.element_ty), inside[:, None])


def dequantize_nf4(codes: Tensor, absmax: Tensor, out: Tensor, double: DoubleQuant | None = None) -> Tensor:
    """Write the weights behind NF4 codes into `out` and return it.

    Args:
        codes: uint8, N * K / 2 bytes of any shape, contiguous.
        absmax: [N * K / 64], fp32, bf16 or fp16; uint8 with `double`.
        out: [N, K], contiguous or dense rows of whole blocks; fp32, bf16 or fp16. fp32 equals bitsandbytes bit for bit.
        double: the second quantisation, `DoubleQuant.of(quant_state)`; None where absmax is plain.

    Raises:
        ValueError: sizes that do not belong together, or N * K no multiple of 64.
    """
    if out.numel() % BLOCKSIZE or codes.numel() * 2 != out.numel() or absmax.numel() * BLOCKSIZE != out.numel():
        raise ValueError(
            f"{codes.numel()} bytes and {absmax.numel()} scales do not make {tuple(out.shape)}: "
            f"expected {out.numel() // 2} bytes and {out.numel() // BLOCKSIZE} scales of {BLOCKSIZE} weights"
        )
    whole = out.dim() == 2 and out.stride(1) == 1 and not out.shape[1] % BLOCKSIZE
    if not (codes.is_contiguous() and absmax.is_contiguous() and (whole or out.is_contiguous())):
        raise ValueError("codes and absmax must be contiguous, and out too or of rows of whole blocks")
    if absmax.dtype not in ((torch.float32, *NARROW) if double is None else (torch.uint8,)):
        raise ValueError(f"absmax of {absmax.dtype}: expected fp32, bf16 or fp16, or uint8 together with `double`")
    if not use_triton(out):
        scale = absmax if double is None else reference.dequantize_absmax(absmax, *double)
        return out.copy_(reference.dequantize_nf4(codes, scale).view(out.shape))
    code, outer, offset = double or (absmax, absmax, absmax)
    blocks = absmax.numel()
    rows = (out.shape[1] // BLOCKSIZE, out.stride(0)) if whole else (blocks, 0)
    _dequantize_kernel[(ceil_div(blocks, PROGRAM_BLOCKS),)](
        codes, absmax, code, outer, offset, out, blocks, *rows,
        DOUBLE=double is not None, BLOCKS=PROGRAM_BLOCKS, num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds the product before adding the offset
    )  # fmt: skip
    return out
