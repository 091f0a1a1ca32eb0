"""Where a kernel runs, and how it is launched.

Triton is optional. Where it is installed, kernels serve CUDA tensors, and CPU tensors too under
TRITON_INTERPRET=1, which executes a kernel in numpy one program at a time (for tests). Everywhere else
`reference` serves. So that the operation files import without Triton, they take `jit`, `tl` and the helpers
from here and never from Triton itself.

Launches go to the current CUDA device, as every Triton launch does: work on another one under
`torch.cuda.device`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING or find_spec("triton"):
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    triton = tl = TensorDescriptor = None

__all__ = [
    "TensorDescriptor", "ceil_div", "is_hopper", "jit", "multiplies", "next_power_of_2", "roomy", "row_launch",
    "same_layout", "tl", "upload", "use_triton", "widened",
]  # fmt: skip

MAX_ROW = 65536  # elements a program may hold in registers: 128 a thread at 16 warps


def use_triton(tensor: Tensor) -> bool:
    """Whether the kernel (rather than the reference) serves `tensor`.

    True for a CUDA tensor where Triton is installed, and for a CPU tensor under TRITON_INTERPRET=1. Triton
    reads that variable when the kernels are imported, so set it before.
    """
    if triton is None:
        return False
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def is_hopper(device: torch.device) -> bool:
    """An H100 or H200, say."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def multiplies(device: torch.device) -> bool:
    """Whether `tl.dot` has tensor cores there: on cards before Ampere Triton multiplies without (triton-lang/triton,
    pull request 5066)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def jit(kernel: Callable[..., Any], **options: Any) -> Any:
    """`triton.jit`, or the plain function where Triton is not installed (it is then never launched)."""
    return kernel if triton is None else triton.jit(kernel, **options)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for it: only from pinned memory is the copy asynchronous."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def ceil_div(size: int, block: int) -> int:
    """Number of blocks of `block` that cover `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """Smallest power of two that is at least `size`: Triton's tiles have no other sizes."""
    return 1 << max(size - 1, 0).bit_length()


def row_launch(width: int) -> dict[str, int]:
    """BLOCK and num_warps of a kernel whose program holds one whole row of `width` elements in registers.

    Raises:
        ValueError: a row too wide for the registers of one program.
    """
    if width > MAX_ROW:
        raise ValueError(f"a row of {width} elements does not fit one program, which holds up to {MAX_ROW}")
    block = next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def roomy(x: Tensor, room: int, width: int | None = None) -> Tensor:
    """An empty [T, width], by default x's, as rows of which each has `room` more columns behind it."""
    width = x.shape[1] if width is None else width
    return x.new_empty(len(x), width + room)[:, :width]


def widened(x: Tensor, room: int) -> Tensor | None:
    """x with the columns behind it [T, W + room], if it is `roomy`. Autograd does not see what is written there."""
    width = x.shape[1] + room
    return x.data.as_strided((len(x), width), (width, 1)) if room and x.stride() == (width, 1) else None


def same_layout(*tensors: Tensor) -> None:
    """Check that tensors share shape, dtype and device, and that their last dimension is dense.

    Raises:
        ValueError: naming the first difference.
    """
    first = tensors[0]
    for other in tensors:
        if (other.shape, other.dtype, other.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"expected alike tensors, got {tuple(first.shape)} {first.dtype} on {first.device} "
                f"and {tuple(other.shape)} {other.dtype} on {other.device}"
            )
        if other.stride(-1) != 1:
            raise ValueError(f"the last dimension must be dense, got strides {other.stride()}")
