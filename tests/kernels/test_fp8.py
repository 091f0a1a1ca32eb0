import pytest
import torch

from medlora.kernels import reference
from medlora.kernels.fp8 import fp8_linear, quantize_rows


@pytest.mark.parametrize(("M", "K"), [(1, 576), (3, 96), (127, 577)])
def test_codes_equal_the_reference(M, K, dtype, device):
    x = (torch.randn(M, K, device=device) * torch.logspace(-4, 3, M, device=device)[:, None]).to(dtype)
    codes, scale = quantize_rows(x)
    expected, expected_scale = reference.quantize_rows(x)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (M, 1)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


def test_many_rows(device):
    x = torch.randn(600, 16, device=device)
    assert torch.equal(quantize_rows(x)[0].view(torch.uint8), reference.quantize_rows(x)[0].view(torch.uint8))


def test_strided_rows_and_error(device):
    x = torch.randn(127, 200, device=device)[:, 50:146]
    codes, scale = quantize_rows(x)
    error = (codes.float() * scale - x).abs()
    assert bool((error <= x.abs() * 2**-4 + scale * 2**-10).all())  # half a step, of a subnormal at the least
    assert codes.float().abs().amax(1).eq(448).all(), "a row does not use the whole range"


def test_zero_rows_and_nan(device):
    x = torch.zeros(3, 96, device=device)
    x[1, 5] = torch.nan
    codes, scale = quantize_rows(x)
    assert codes[0].float().eq(0).all() and scale.isfinite().all()
    assert codes[1, 5].float().isnan()


@pytest.mark.parametrize("M", [16, 127])
def test_linear(M, dtype, device, close):
    x, w = torch.randn(M, 576, device=device).to(dtype), torch.randn(96, 576, device=device)
    weight = quantize_rows(w)
    y = fp8_linear(x, *weight)
    exact = x.float() @ w.T
    assert y.dtype == dtype
    assert (y.float() - exact).norm() < 0.04 * exact.norm()  # two roundings of 3 mantissa bits
    emulated = reference.fp8_matmul(*quantize_rows(x), *weight)
    close(y.bfloat16(), emulated, roundings=2)


def test_refuses_what_does_not_fit(device):
    with pytest.raises(ValueError, match="must agree"):
        fp8_linear(torch.randn(3, 32, device=device), *quantize_rows(torch.randn(16, 48, device=device)))
    with pytest.raises(ValueError, match="expected"):
        quantize_rows(torch.randn(3, device=device))
