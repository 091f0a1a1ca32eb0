import pytest
import torch

from medlora.kernels import reference
from medlora.kernels.swiglu import swiglu, swiglu_adapted_backward, swiglu_backward


def expectation(gate, up, dy):
    g, u = (t.detach().float().requires_grad_() for t in (gate, up))
    y = reference.swiglu(g, u)
    y.backward(dy.float())
    return y, g.grad, u.grad


@pytest.mark.parametrize(("T", "F"), [(1, 576), (3, 96), (127, 1500)])
def test_halves_of_one_buffer(T, F, dtype, device, close):
    both = torch.randn(T, 2 * F, device=device).mul(3).to(dtype).requires_grad_()
    gate, up = both.chunk(2, dim=1)
    dy = torch.randn(T, F, device=device).to(dtype)
    expected, dgate, dup = expectation(gate, up, dy)
    y = swiglu(gate, up)
    y.backward(dy)
    close(y, expected)
    close(both.grad[:, :F], dgate)
    close(both.grad[:, F:], dup)


def test_many_rows(device, close):
    gate, up = torch.randn(2, 257, 8, device=device).unbind()
    close(swiglu(gate, up), reference.swiglu(gate, up))


def test_gradients_into_the_inputs(dtype, device, close):
    both = torch.randn(3, 192, device=device).to(dtype)
    gate, up = both.chunk(2, dim=1)
    dy = torch.randn(3, 96, device=device).to(dtype)
    _, dgate, dup = expectation(gate, up, dy)
    got = swiglu_backward(dy, gate, up, gate, up)
    assert got[0] is gate and got[1] is up
    close(both[:, :96], dgate)
    close(both[:, 96:], dup)


def test_the_value_beside_the_gradients(dtype, device, close):
    """In the gradient's own place."""
    gate, up, dy = torch.randn(3, 5, 96, device=device).to(dtype).unbind()
    expected, dgate, dup = expectation(gate, up, dy)
    got = swiglu_backward(dy, gate, up, y=dy)
    close(dy, expected)
    close(got[0], dgate)
    close(got[1], dup)


@pytest.mark.parametrize("feeds", [False, True], ids=["down", "gate and up"])
@pytest.mark.parametrize(("T", "F", "R", "Q"), [(1, 96, 16, 16), (70, 130, 16, 32), (387, 576, 64, 16)])
def test_adapters_gradients_on_the_way(T, F, R, Q, feeds, dtype, device, close):
    """In rows with something behind them, which stays."""
    buffer = torch.randn(T, 2 * F + 8, device=device).to(dtype)
    both, behind = buffer[:, : 2 * F], buffer[:, 2 * F :].clone()
    gate, up = both.chunk(2, dim=1)
    dy, dh, h = (torch.randn(T, width, device=device).to(dtype) for width in (F, R, 2 * Q))
    y, dgate, dup = expectation(gate, up, dy)
    da, db = swiglu_adapted_backward(dy, gate, up, dh, h if feeds else None)
    close(gate, dgate)
    close(up, dup)
    assert torch.equal(buffer[:, 2 * F :], behind)
    rounded = y.to(dtype).float(), *(torch.stack((gate, up)).float() if feeds else ())
    bound = 1e-5 if dtype == torch.float32 else 3e-3  # an element may round otherwise
    sums = [(da, dh.float().t() @ rounded[0])]
    if feeds:
        sums += [(db[i], rounded[1 + i].t() @ h[:, i * Q : (i + 1) * Q].float()) for i in range(2)]
    else:
        assert db is None
    for got, expected in sums:
        assert got.dtype == torch.float32 and (got - expected).norm() <= bound * expected.norm()


def test_ranks_that_registers_do_not_hold(device):
    gate, up, dy = torch.randn(3, 5, 96, device=device).unbind()
    with pytest.raises(ValueError, match="ranks"):
        swiglu_adapted_backward(dy, gate, up, torch.randn(5, 8, device=device))


def test_in_the_gates_place(dtype, device, close):
    gate, up = torch.randn(3, 192, device=device).to(dtype).chunk(2, dim=1)
    expected = reference.swiglu(gate, up)
    assert swiglu(gate, up, gate) is gate
    close(gate, expected)


def test_reference_backward_is_autograd(close):
    gate, up, dy = torch.randn(3, 7, 96).mul(3).unbind()
    _, dgate, dup = expectation(gate, up, dy)
    got = reference.swiglu_backward(dy, gate, up)
    close(got[0], dgate)
    close(got[1], dup)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # exp, on the way to 1 / inf
def test_extremes_stay_finite(device):
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=device)
    y = swiglu(gate, torch.ones_like(gate))
    assert torch.equal(y.cpu(), torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))


def test_refuses_unlike_inputs(device):
    gate = torch.randn(3, 96, device=device)
    with pytest.raises(ValueError, match="alike"):
        swiglu(gate, gate[:2])
    with pytest.raises(ValueError, match="dense"):
        swiglu(gate.T, gate.T)
