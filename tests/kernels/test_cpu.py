"""The CPU's operations against plain PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medlora.kernels import cpu

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = list(BOUND)


def apart(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, grad = torch.randn(2, 37, 67).to(dtype), torch.rand(67).to(dtype), torch.randn(2, 37, 67).to(dtype)
    x.requires_grad_()
    y = cpu.rms_norm(x, w, 1e-5)
    y.backward(grad)
    exact = x.detach().double().requires_grad_()
    expected = F.rms_norm(exact, (67,), w.double(), 1e-5)
    expected.backward(grad.double())
    assert y.dtype == x.grad.dtype == dtype
    assert apart(y, expected) < BOUND[dtype]
    assert apart(x.grad, exact.grad) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy_in_several_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, w, labels = torch.randn(131, 64).to(dtype), torch.randn(503, 64).to(dtype), torch.randint(0, 503, (131,))
    monkeypatch.setattr(cpu, "CHUNK", 50 * 503 * dtype.itemsize)
    hidden.requires_grad_()
    loss = cpu.linear_cross_entropy(hidden, w, labels)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ w.double().t(), labels, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=max(BOUND[dtype], 1e-6))
    assert apart(hidden.grad, exact.grad) < BOUND[dtype]


def test_linear_cross_entropy_where_bfloat16_loses_a_probability() -> None:
    hidden = torch.tensor([[1.0]]).bfloat16().requires_grad_()
    weight = torch.tensor([[300.0], [0.0], [-10.0]]).bfloat16()
    loss = cpu.linear_cross_entropy(hidden, weight, torch.tensor([2]))
    loss.backward()
    assert loss.item() == 310
    assert hidden.grad is not None and float(hidden.grad) == 310


def test_linear_cross_entropy_of_nothing_is_zero() -> None:
    hidden = torch.empty(0, 64, requires_grad=True)
    loss = cpu.linear_cross_entropy(hidden, torch.randn(503, 64), torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert float(loss) == 0


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_linear(p: float) -> None:
    """Both dropout and its backward by the same mask, which is read off an adapter that is the identity."""
    torch.manual_seed(0)
    x, w = torch.randn(3, 11, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    a, b = torch.randn(4, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    one, zero = torch.eye(8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    mask = cpu.lora_linear(torch.ones_like(x), zero, one, one, 1.0, p)
    assert set(mask.unique().tolist()) <= {0.0, 1 / (1 - p)}
    tensors, others = ([t.clone().requires_grad_() for t in (x, a, b)] for _ in range(2))
    torch.manual_seed(1)
    y = cpu.lora_linear(tensors[0], w, tensors[1], tensors[2], 0.7, p)
    expected = others[0] @ w.t() + 0.7 * (others[0] * mask) @ others[1].t() @ others[2].t()
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert apart(y, expected) < 1e-12
    for ours, theirs in zip(tensors, others, strict=True):
        assert apart(ours.grad, theirs.grad) < 1e-6  # the gradients of a and b pass through float32


def test_keep_mask_keeps_the_share_it_is_asked_for() -> None:
    torch.manual_seed(0)
    kept = cpu.keep_mask(torch.Size((1000, 1001)), 0.1, torch.float32)
    assert float(kept.mean()) == pytest.approx(0.9, abs=0.002)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
