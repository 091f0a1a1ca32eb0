"""Kernels are tested on CUDA where there is one, and elsewhere on the CPU through Triton's interpreter."""

from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

INTERPRETED = not torch.cuda.is_available() and find_spec("triton") is not None
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def convert(values: np.ndarray, source: object, target: object, _mode: object) -> np.ndarray:
    """Float conversion rounding to nearest even, as hardware does; the interpreter's truncates bf16."""
    import triton.language as tl

    kinds = {
        tl.float32: (torch.float32, np.int32),
        tl.float16: (torch.float16, np.int16),
        tl.bfloat16: (torch.bfloat16, np.int16),
        tl.float8e4nv: (torch.float8_e4m3fn, np.int8),
    }
    (from_torch, from_bits), (to_torch, to_bits) = kinds[source], kinds[target]
    bits = torch.from_numpy(np.frombuffer(values.tobytes(), dtype=from_bits).copy())
    result = bits.view(from_torch).to(to_torch).view(getattr(torch, np.dtype(to_bits).name))
    return result.numpy().view(f"u{np.dtype(to_bits).name}").reshape(values.shape)


def patch_tensor(tensor: type, scope: Any, original: Callable[[type, Any], None]) -> None:
    """The interpreter's patching, with a loop bound that numpy 2.4 takes too: it has shape (1,), not ()."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def dot(builder: Any, a: Any, b: Any, total: Any, *rest: Any, original: Callable[..., Any]) -> Any:
    """The interpreter's product, with bf16 operands widened first: it would multiply their bits."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    wide = [
        TensorHandle(convert(t.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
        if t.dtype.scalar == tl.bfloat16
        else t
        for t in (a, b)
    ]
    return original(builder, *wide, total, *rest)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send CPU tensors through the interpreter for the length of a test."""
    torch.manual_seed(0)
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        interpreter = import_module("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter, "_convert_float", convert)
        builder = interpreter.InterpreterBuilder
        monkeypatch.setattr(builder, "create_dot", partialmethod(dot, original=builder.create_dot))
        patched = partial(patch_tensor, original=interpreter._patch_lang_tensor)
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    yield


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


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
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
