import subprocess
import sys

import pytest
import torch

from medlora.kernels import dispatch

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from medlora.kernels import cross_entropy, dispatch, dropout, fp8, nf4, rms_norm, rope, swiglu
x = torch.randn(3, 96)
assert not dispatch.use_triton(x)
assert rms_norm.rms_norm(x, torch.ones(96), 1e-5).shape == x.shape
assert swiglu.swiglu(x, x).shape == dropout.dropout(x, 0.5, 1).shape == x.shape
assert fp8.fp8_linear(x, *fp8.quantize_rows(x)).shape == (3, 3)
assert cross_entropy.linear_cross_entropy(x, x, torch.tensor([0, 1, -100])).isfinite()
q = x.view(3, 3, 32)
rope.rope_(q, q.clone(), torch.ones(3, 32), torch.zeros(3, 32))
nf4.dequantize_nf4(torch.zeros(32, dtype=torch.uint8), torch.ones(1), torch.empty(1, 64))
"""


def test_serves_without_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


def test_package_import_is_light():
    code = "import sys, medlora.kernels; assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_takes_the_reference_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not dispatch.use_triton(torch.empty(1))


def test_kernels_serve_here(device):
    assert dispatch.use_triton(torch.empty(1, device=device))


@pytest.mark.parametrize(("size", "power"), [(1, 1), (2, 2), (3, 4), (576, 1024), (1024, 1024)])
def test_next_power_of_2(size, power):
    assert dispatch.next_power_of_2(size) == power


def test_row_launch():
    assert dispatch.row_launch(576) == {"BLOCK": 1024, "num_warps": 2}
    assert dispatch.row_launch(65536)["num_warps"] == 16
    with pytest.raises(ValueError, match="65536"):
        dispatch.row_launch(65537)
