import copy
import pickle

import pytest
import torch

from medlora.kernels import nf4, reference

functional = pytest.importorskip("bitsandbytes.functional")


def quantize(N, K, double, device):
    """Blocks of unequal scale; flat, as bitsandbytes' CPU code is wrong for rows that end within a block."""
    weight = (torch.randn(N, K) * torch.rand(N, 1)).flatten()
    return functional.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=double)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize(("N", "K"), [(1, 64), (3, 64), (96, 96), (127, 576), (2049, 64)])
def test_equals_bitsandbytes(N, K, double, dtype, device):
    codes, state = quantize(N, K, double, device)
    expected = functional.dequantize_4bit(codes, state).view(N, K)
    out = torch.full((N, K), torch.nan, dtype=dtype, device=device)
    assert nf4.dequantize_nf4(codes, state.absmax, out, nf4.DoubleQuant.of(state)) is out
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize(("N", "K"), [(3, 64), (127, 576)])
def test_rows_with_something_behind_them(N, K, dtype, device):
    codes, state = quantize(N, K, False, device)
    buffer = torch.full((N, K + 8), torch.nan, dtype=dtype, device=device)
    nf4.dequantize_nf4(codes, state.absmax, buffer[:, :K])
    assert torch.equal(buffer[:, :K], functional.dequantize_4bit(codes, state).view(N, K).to(dtype))
    assert buffer[:, K:].isnan().all()


@pytest.mark.parametrize("stored", nf4.NARROW)
def test_scales_in_16_bits_give_the_bits_of_fp32(stored, dtype, device):
    codes, state = quantize(127, 576, False, device)
    scales = state.absmax.to(stored)
    assert nf4.narrow(scales.float()).dtype == stored
    assert nf4.narrow(state.absmax) is state.absmax, "they do not fit"
    out, wide = (torch.empty(127, 576, dtype=dtype, device=device) for _ in range(2))
    assert torch.equal(
        nf4.dequantize_nf4(codes, scales, out), nf4.dequantize_nf4(codes, nf4.narrow(scales.float()).float(), wide)
    )


def test_a_state_of_16_bit_scales_serves_bitsandbytes(device):
    weight = torch.randn(64 * 64, device=device).bfloat16()
    codes, state = functional.quantize_4bit(weight, quant_type="nf4")
    plain = copy.deepcopy(state)
    for _ in range(2):
        nf4.store_scales(state, nf4.narrow(nf4.stored_scales(state).float()))
        assert nf4.stored_scales(state).dtype == torch.bfloat16
        assert state.absmax.dtype == torch.float32 and torch.equal(state.absmax, plain.absmax)
    for each in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(functional.dequantize_4bit(codes, each), functional.dequantize_4bit(codes, plain))
    packed = state.as_dict(packed=True)
    assert all(torch.equal(packed[name], value) for name, value in plain.as_dict(packed=True).items())
    assert "absmax" in vars(plain) and isinstance(plain.absmax, torch.Tensor) and type(plain) is not type(state)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_reference_equals_bitsandbytes(double):
    codes, state = quantize(127, 576, double, "cpu")
    absmax = reference.dequantize_absmax(state.absmax, *nf4.DoubleQuant.of(state)) if double else state.absmax
    expected = functional.dequantize_4bit(codes, state).view(-1)
    assert torch.equal(reference.dequantize_nf4(codes, absmax), expected)


def test_every_code(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(8, 64, device=device)
    nf4.dequantize_nf4(codes, torch.ones(8, device=device), out)
    table = torch.tensor(reference.NF4_VALUES, device=device)
    assert torch.equal(out.view(16, 16, 2)[..., 0], table[:, None].expand(16, 16))
    assert torch.equal(out.view(16, 16, 2)[..., 1], table.expand(16, 16))


def test_refuses_what_does_not_fit(device):
    codes, state = quantize(96, 96, False, device)
    out = torch.empty(96, 96, device=device)
    with pytest.raises(ValueError, match="do not make"):
        nf4.dequantize_nf4(codes, state.absmax, out[:64])
    with pytest.raises(ValueError, match="contiguous"):
        nf4.dequantize_nf4(codes, state.absmax, out.T)
    with pytest.raises(ValueError, match="whole blocks"):
        nf4.dequantize_nf4(codes, state.absmax, torch.empty(96, 104, device=device)[:, :96])
    with pytest.raises(ValueError, match="absmax"):
        nf4.dequantize_nf4(codes, state.absmax.byte(), out)
    state.blocksize = 128
    with pytest.raises(ValueError, match="blocks of 64"):
        nf4.DoubleQuant.of(state)
