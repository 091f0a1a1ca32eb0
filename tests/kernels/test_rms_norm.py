import pytest
import torch

from medlora.kernels import reference
from medlora.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5
SHAPES = [(1, 576), (3, 96), (127, 576)]


def inputs(T, D, dtype, device):
    """x, residual and their output gradients; the weight differs from 1 so that a missing factor shows."""
    x, residual, dy, dh = (torch.randn(T, D, device=device).to(dtype) for _ in range(4))
    weight = (torch.rand(D, device=device) + 0.5).to(dtype)
    return x, residual, weight, dy, dh


def leaves(*tensors):
    return [t.detach().float().requires_grad_() for t in tensors]


@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_norm(T, D, weight_grad, dtype, device, close):
    x, _, weight, dy, _ = inputs(T, D, dtype, device)
    x32, w32 = leaves(x, weight)
    expected, _ = reference.rms_norm(x32, w32, EPS)
    expected.backward(dy.float())

    x.requires_grad_()
    weight.requires_grad_(weight_grad)
    y = rms_norm(x, weight, EPS)
    y.backward(dy)
    close(y, expected, roundings=2)  # before and after the weight
    close(x.grad, x32.grad)
    if weight_grad:
        close(weight.grad, w32.grad, roundings=2)
    else:
        assert weight.grad is None


@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_add_and_norm(T, D, dtype, device, close):
    x, residual, weight, dy, dh = inputs(T, D, dtype, device)
    (h32, w32) = leaves((x.float() + residual.float()).to(dtype), weight)  # the sum as it is stored
    expected, _ = reference.rms_norm(h32, w32, EPS)
    torch.autograd.backward([expected, h32], [dy.float(), dh.float()])

    x.requires_grad_()
    residual.requires_grad_()
    y, h = add_rms_norm(x, residual, weight, EPS)
    torch.autograd.backward([y, h], [dy, dh])
    assert torch.equal(h, h32.to(dtype))
    close(y, expected, roundings=2)
    close(x.grad, h32.grad)
    assert torch.equal(x.grad, residual.grad)


def test_many_rows(device, close):
    x, residual, weight, dy, _ = inputs(600, 16, torch.float32, device)
    (h32, w32) = leaves(x + residual, weight)
    reference.rms_norm(h32, w32, EPS)[0].backward(dy)
    x.requires_grad_()
    weight.requires_grad_()
    add_rms_norm(x, residual, weight, EPS)[0].backward(dy)
    close(x.grad, h32.grad)
    close(weight.grad, w32.grad, roundings=4)  # sums of 600 terms in another order


@pytest.mark.parametrize("added", [False, True])
def test_rows_with_something_behind_them(added, dtype, device, close):
    """In x, and room behind the norm and behind the gradient, which is as wide as x's rows at least."""
    x, residual, weight, dy, dh = inputs(3, 96, dtype, device)
    other = residual if added else None
    plain = x.clone().requires_grad_()
    expected = add_rms_norm(plain, other, weight, EPS)
    torch.autograd.backward(expected, (dy, dh))
    buffer = torch.randn(3, 104, device=device).to(dtype)
    buffer[:, :96] = x
    apart = buffer[:, :96].requires_grad_()
    widths = []
    apart.register_hook(lambda grad: widths.append(grad.stride(0)))
    found = add_rms_norm(apart, other, weight, EPS, room=16, grad_room=24)
    wide = torch.randn(3, 112, device=device).to(dtype)
    wide[:, :96] = dh
    torch.autograd.backward(found, (dy, wide[:, :96]))
    assert all(map(torch.equal, found, expected)) and torch.equal(apart.grad, plain.grad)
    assert found[0].stride(0) == 112 and widths == [120]


def test_only_the_sum_is_used(device):
    x, residual, weight, _, dh = inputs(3, 96, torch.float32, device)
    x.requires_grad_()
    add_rms_norm(x, residual, weight, EPS)[1].backward(dh)
    assert torch.equal(x.grad, dh)


def test_rounds_as_hugging_face(device):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, _, weight, _, _ = inputs(3, 576, torch.bfloat16, device)
    norm = llama.LlamaRMSNorm(576, eps=EPS).to(device, torch.bfloat16)
    norm.weight.data.copy_(weight)
    assert torch.equal(reference.rms_norm(x, weight, EPS)[0], norm(x))
    ours = rms_norm(x[None], weight, EPS)[0]
    assert (ours != norm(x)).float().mean() < 0.01  # a last bit of rsqrt may tip a rounding


def test_row_too_wide(device):
    with pytest.raises(ValueError, match="65536"):
        rms_norm(torch.empty(1, 65537, device=device), torch.empty(65537, device=device), EPS)
