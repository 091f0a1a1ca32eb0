"""Kernels are tested on CUDA where there is one, and elsewhere on the CPU through Triton's interpreter."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def kernels(interpreter: None) -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run; a test that asks for it fails rather than compare the reference with itself."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if INTERPRETED:
        from medlora.kernels.swiglu import _forward_kernel

        if type(_forward_kernel).__name__ != "InterpretedFunction":
            pytest.fail("kernels were imported before TRITON_INTERPRET=1 was set (tests/conftest.py does)")
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def close() -> Callable[..., None]:
    """close(actual, expected, roundings=1): within that many roundings of actual's dtype."""

    def check(actual: Tensor, expected: Tensor, roundings: int = 1) -> None:
        assert actual.shape == expected.shape
        expected = expected.float()
        bound = roundings * TOLERANCE[actual.dtype] * (expected.abs() + expected.abs().mean())
        excess = (actual.float() - expected).abs() - bound
        assert bool((excess <= 0).all()), f"{excess.max().item():.3g} above the bound at {excess.argmax().item()}"

    return check
