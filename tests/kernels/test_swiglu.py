import pytest
import torch

from medlora.kernels import reference
from medlora.kernels import swiglu as module
from medlora.kernels.swiglu import swiglu, swiglu_adapted, swiglu_adapted_backward, swiglu_backward


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


def adapters(T, F, R, Q, dtype, device):
    """(dh, a) and (h, b), with something behind each row."""
    shapes = (T, R), (R, F), (T, 2 * Q), (2, F, Q)
    dh, a, h, b = (torch.randn(*s[:-1], s[-1] + 8, device=device).to(dtype)[..., : s[-1]] for s in shapes)
    return (dh, a), (h, b)


def completed(gate, up, below):
    """gate and up with LoRA's term, which keep what it is made of differentiable."""
    if below is None:
        return gate, up
    (h_g, h_u), b = below[0].chunk(2, 1), below[1]
    return gate + h_g @ b[0].t(), up + h_u @ b[1].t()


RANKED = [(1, 96, 16, 16), (70, 136, 16, 32), (200, 200, 64, 16)]


@pytest.fixture
def few_programs(monkeypatch):
    """So that a share has several tiles of rows."""
    monkeypatch.setattr(module, "FORWARD_PROGRAMS", 12)
    monkeypatch.setattr(module, "_evenest", lambda T, F, blocks: max(1, 12 // blocks))


@pytest.mark.parametrize(("T", "F", "R", "Q"), RANKED)
def test_terms_that_are_left_to_it(T, F, R, Q, dtype, device, close, few_programs):
    gate, up = torch.randn(T, 2 * F, device=device).to(dtype).chunk(2, dim=1)
    _, (h, b) = adapters(T, F, R, Q, dtype, device)
    expected = reference.swiglu(*completed(gate.double(), up.double(), (h.double(), b.double())))
    buffer = torch.ones(T, F + 8, device=device, dtype=dtype)
    y = buffer[:, :F]
    assert swiglu_adapted(gate, up, h, b, y) is y
    close(y, expected, roundings=1)
    close(swiglu_adapted(gate, up, h, b), expected, roundings=1)
    assert torch.equal(buffer[:, F:], torch.ones(T, 8, device=device, dtype=dtype))


@pytest.mark.parametrize(("who", "value"), [("above", False), ("below", True), ("both", False), ("neither", True)])
@pytest.mark.parametrize(("T", "F", "R", "Q"), RANKED)
def test_adapters_gradients_on_the_way(T, F, R, Q, who, value, dtype, device, close, few_programs):
    """In rows with something behind them, which stays; the value, if asked for, in the gradient's place."""
    buffer = torch.randn(T, 2 * F + 8, device=device).to(dtype)
    both, behind = buffer[:, : 2 * F], buffer[:, 2 * F :].clone()
    gate, up = both.chunk(2, dim=1)
    dy = torch.randn(T, F, device=device).to(dtype)
    above, below = adapters(T, F, R, Q, dtype, device)
    above, below = above if who in ("above", "both") else None, below if who in ("below", "both") else None

    g, u = (t.double().requires_grad_() for t in (gate, up))
    d = dy.double() + (above[0].double() @ above[1].double() if above else 0)
    h, b = [t.double().requires_grad_() for t in below] if below else (None, None)
    expected = reference.swiglu(*completed(g, u, (h, b) if below else None))
    expected.backward(d)

    kept = dy.clone()
    da, db = swiglu_adapted_backward(dy, gate, up, above, below, value=value)
    close(gate, g.grad, roundings=2)
    close(up, u.grad, roundings=2)
    close(dy, expected if value else kept.double(), roundings=1)
    assert torch.equal(buffer[:, 2 * F :], behind)
    bound = 1e-5 if dtype == torch.float32 else 6e-3  # its operand is rounded
    for got, wanted in ((da, above and above[0].double().t() @ expected), (db, below and b.grad)):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert got.dtype == torch.float32 and (got - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize(
    ("T", "F", "took"),
    [
        (16384, 14336, {1: 1021, 2: 1055, 3: 1069, 5: 1093, 7: 975, 8: 1001, 13: 1111}),
        (16384, 11008, {1: 1028, 2: 1050, 3: 727, 5: 876, 6: 755, 7: 816, 13: 849}),
        (16384, 8192, {1: 904, 2: 526, 4: 540, 6: 563}),
        (16384, 5632, {1: 908, 2: 515, 3: 362, 4: 536, 6: 379}),
        (8192, 14336, {1: 528, 2: 548, 3: 563, 5: 591, 7: 537, 8: 556, 13: 632}),
        (8192, 11008, {1: 524, 2: 542, 3: 385, 5: 471, 6: 413, 7: 448, 13: 491}),
        (2432, 14336, {1: 179, 2: 192, 3: 209, 5: 237, 7: 230, 13: 296}),
        (2432, 11008, {1: 175, 2: 188, 3: 148, 5: 186, 6: 175, 7: 190, 13: 235}),
    ],
)
def test_shares_are_those_that_an_h100_was_fastest_by(T, F, took):
    """Microseconds of the backward pass by the number of shares, rank 64."""
    assert took[module._evenest(T, F, F // 64)] <= 1.03 * min(took.values())


def test_refuses_adapters_that_do_not_fit(device):
    gate, up, dy = torch.randn(3, 5, 96, device=device).unbind()
    above, below = adapters(5, 96, 8, 8, torch.float32, device)
    with pytest.raises(ValueError, match="ranks"):
        swiglu_adapted_backward(dy, gate, up, above, None)
    with pytest.raises(ValueError, match="ranks"):
        swiglu_adapted(gate, up, *below)
    above, below = adapters(5, 80, 16, 16, torch.float32, device)
    with pytest.raises(ValueError, match="adapters"):
        swiglu_adapted_backward(dy, gate, up, above, None)
    with pytest.raises(ValueError, match="adapters"):
        swiglu_adapted(gate, up, *below)
    with pytest.raises(ValueError, match="one buffer"):
        swiglu_adapted(torch.randn(5, 100)[:, :80], torch.randn(5, 80), *below)


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
