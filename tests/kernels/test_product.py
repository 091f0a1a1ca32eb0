import pytest
import torch

from medlora.kernels import product
from medlora.kernels.product import LONG, TURNS, matmul

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def operands(T, K, N, transposed, device, dtype):
    """Rows with something behind them."""
    x = torch.randn(T, K + 8, device=device).to(dtype)[:, :K]
    stored = torch.randn(*((N, K + 16) if transposed else (K, N + 16)), device=device).to(dtype)
    w = stored[:, :K].t() if transposed else stored[:, :N]
    out = torch.randn(T, N + 8, device=device).to(dtype)[:, :N]
    return x, w, out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("T", [1, 3, 127])
def test_short_rows_and_other_devices(T, transposed, device, close):
    x, w, out = operands(T, 48, 40, transposed, device, torch.float32)
    expected = x.double() @ w.double()
    close(matmul(x, w), expected, roundings=2)
    added = out.double() + expected
    assert matmul(x, w, out, adds=True) is out
    close(out, added, roundings=2)
    assert matmul(x, w, out) is out
    close(out, expected, roundings=2)


class Timed:
    """A product whose offers take 3, 1 and 2 s a row; some fail, and a device that has not come so far yet is waited
    for by nobody."""

    def __init__(self, monkeypatch, failing=()):
        self.now, self.done, self.ran = 0.0, True, []
        self.product = object.__new__(product._Product)
        self.product.offers, self.product.turns, self.product.chosen = [3, 1, 2], [], None

        def run(offer, x, w, y):
            if offer in failing:
                raise product._Failed("status 15")
            self.now += offer * len(x)
            self.ran.append(offer)

        self.product._run = run
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def __call__(self, times, T=7):
        for _ in range(times):
            self.product(torch.empty(T, 2), None, None)


class Event:
    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.at = self.clock.now

    def query(self):
        return self.clock.done

    def elapsed_time(self, after):
        return after.at - self.at


def test_the_fastest_serves_once_all_are_timed(monkeypatch):
    timed = Timed(monkeypatch)
    timed.done = False
    timed(3 * TURNS // 2)
    timed(2 * TURNS, T=70)  # longer rows take longer by any
    assert timed.product.chosen is None and set(timed.ran) == {1, 2, 3}
    timed.done = True
    timed(4)
    assert timed.ran[-4:] == [1] * 4 and not timed.product.turns


def test_an_algorithm_that_fails_takes_no_further_turn(monkeypatch):
    timed = Timed(monkeypatch, failing=(1, 2))
    for _ in range(2):
        with pytest.raises(product._Failed):
            timed(2)
    timed(2 * TURNS)
    assert set(timed.ran) == {3} and timed.product.chosen == 3
    timed = Timed(monkeypatch, failing=(1, 2, 3))
    for _ in range(4):
        with pytest.raises(product._Failed):
            timed(1)


@pytest.fixture
def anew(monkeypatch):
    monkeypatch.setattr(product, "PRODUCTS", {})
    return product.PRODUCTS


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_turn_gives_the_same_bits(transposed, adds, anew, close):
    """Through all algorithms and the choice, at lengths that change between them."""
    results = []
    for T in (LONG, LONG + 384):
        x, w, before = operands(T, 576, 1088, transposed, "cuda", torch.bfloat16)
        reference = x.double() @ w.double() + (before.double() if adds else 0)
        results.append((x, w, before, reference, []))
    for turn in range(16 * TURNS + 4):
        x, w, before, _, found = results[turn // 5 % 2]
        out = before.clone()
        found.append(matmul(x, w, out, adds=adds))
    (tried,) = anew.values()
    assert tried is not None and len(tried.offers) > 1
    torch.cuda.synchronize()
    matmul(*results[0][:2], results[0][2].clone(), adds=adds)
    assert tried.chosen is not None and tried.turns == []
    for *_, reference, found in results:
        close(found[0], reference.float(), roundings=2)
        assert all(torch.equal(found[0], other) for other in found[1:])


@GPU
@pytest.mark.gpu
def test_a_capture_is_left_alone(anew):
    x, w, out = operands(LONG, 64, 64, True, "cuda", torch.bfloat16)
    torch.mm(x, w, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matmul(x, w, out)
    graph.replay()
    assert not anew and torch.allclose(out.float(), x.float() @ w.float(), atol=0.5, rtol=0.02)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("broken", ["no library", "no algorithm", "a call fails"])
def test_torch_serves_where_cublaslt_does_not(broken, anew, monkeypatch):
    x, w, out = operands(LONG, 64, 64, True, "cuda", torch.bfloat16)
    if broken == "no library":
        monkeypatch.setattr(product, "_library", lambda device: None)
    elif broken == "no algorithm":
        monkeypatch.setattr(product, "OFFERED", 0)
    else:
        matmul(x, w)
        (tried,) = anew.values()
        monkeypatch.setattr(tried, "offers", [product._Offer()])
    assert torch.equal(matmul(x, w, out), torch.mm(x, w))
