"""Row-wise FP8: quantise rows to float8_e4m3fn, multiply by frozen FP8 weights.

    scale_m = max_k |x_mk| / 448        code_mk = round_e4m3(x_mk / scale_m)
    y = (codes @ w_codes.T) * scale * w_scale.T        Micikevicius et al. 2022 (arXiv 2209.05433)

FP8 matmuls run at twice the bf16 rate. A scale for every row (token) of x and every row (output) of w keeps
one outlier from costing the others their precision; e4m3 has 3 mantissa bits, so a product carries about 2^-4
relative error and a sum over K thousands far less. Scales cannot vary along K, so the gradient in x, whose
sum runs over w's rows, needs a second copy: `fp8_linear(grad, *quantize_rows(w.T.contiguous()))`.

The quantisation kernel holds one row in registers: one read in 16 bits, one write in 8, one launch. No clamp:
the largest element maps to 448 up to a rounding, which e4m3 rounds to 448, and NaN or infinity must stay
visible.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import jit, row_launch, tl, use_triton


@jit
def _quantize_kernel(x: tl.tensor, codes: tl.tensor, scale: tl.tensor, x_row: int, K: int, BLOCK: tl.constexpr) -> None:
    """One row. Divisions round to nearest, so that codes equal the reference's bit for bit."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_row + col, col < K, other=0.0).to(tl.float32)
    absmax = tl.maximum(tl.max(tl.abs(value), 0), 1e-12)
    tl.store(codes + row * K + col, (value * tl.div_rn(448.0, absmax)).to(codes.dtype.element_ty), col < K)
    tl.store(scale + row, absmax * (1 / 448.0))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (codes float8_e4m3fn [M, K], scale fp32 [M, 1]), x being about codes * scale; no gradient.

    Args:
        x: fp32, bf16 or fp16; rows dense, row stride free. On CUDA: compute capability 8.9 or higher.

    Raises:
        ValueError: x is not two-dimensional, or K above 65536.
    """
    if x.dim() != 2:
        raise ValueError(f"expected [M, K], got {tuple(x.shape)}")
    x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
    if not use_triton(x):
        return reference.quantize_rows(x)
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    _quantize_kernel[(M,)](x, codes, scale, x.stride(0), K, **row_launch(K))
    return codes, scale


def fp8_linear(x: Tensor, w_codes: Tensor, w_scale: Tensor) -> Tensor:
    """x [M, K] @ w.T for a weight in row-wise FP8 -> [M, N] in x's dtype; no gradient (see above).

    Args:
        x: fp32, bf16 or fp16; quantised here.
        w_codes, w_scale: `quantize_rows` of the weight, float8_e4m3fn [N, K] contiguous and fp32 [N, 1].

    Raises:
        ValueError: K differs; on CUDA also K or N no multiple of 16.
    """
    (N, K) = w_codes.shape
    if x.shape[-1] != K or (x.is_cuda and (K % 16 or N % 16)):
        raise ValueError(
            f"x {tuple(x.shape)} and weight {(N, K)}: K must agree, and on CUDA K and N be multiples of 16"
        )
    codes, scale = quantize_rows(x)
    if not x.is_cuda:
        return reference.fp8_matmul(codes, scale, w_codes, w_scale).to(x.dtype)
    # Row-wise scales come with bf16 results only; fast accumulation is what the doubled rate needs.
    y = torch._scaled_mm(codes, w_codes.T, scale, w_scale.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True)
    return y.to(x.dtype)
