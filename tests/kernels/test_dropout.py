import pytest
import torch

from medlora.kernels import reference
from medlora.kernels.dropout import dropout


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        (7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_known_answers(rounds, words):
    """The published vectors of Random123 for counter 0 and key 0."""
    assert tuple(int(word) for word in reference.philox(0, torch.zeros(1, dtype=torch.int64), rounds)) == words


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 7, 2**62 + 12345])
@pytest.mark.parametrize("shape", [(1,), (3, 96), (127, 33), (2049, 5)])
def test_mask_is_the_reference(shape, seed, device):
    mask = dropout(torch.ones(shape, device=device), 0.3, seed) != 0
    assert torch.equal(mask, reference.dropout_mask(mask, 0.3, seed))


@pytest.mark.parametrize(("T", "D"), [(1, 576), (3, 96), (127, 577)])
def test_values_and_gradient(T, D, dtype, device):
    x = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    dy = torch.randn(T, D, device=device).to(dtype)
    y = dropout(x, 0.1, 5)
    y.backward(dy)
    assert torch.equal(y, reference.dropout(x, 0.1, 5))
    assert torch.equal(x.grad, reference.dropout(dy, 0.1, 5))


@pytest.mark.parametrize(("D", "room"), [(96, 8), (96, 4), (40, 24), (33, 7)])
def test_rows_that_lie_apart(D, room, dtype, device):
    wide = torch.randn(127, D + room, device=device).to(dtype)
    y = dropout(wide[:, :D], 0.3, 5)
    assert y.is_contiguous() and torch.equal(y, reference.dropout(wide[:, :D].contiguous(), 0.3, 5))


def test_rate_scale_and_independence():
    p, ones = 0.1, torch.ones(1_000_000)
    a, b = (reference.dropout(ones, p, seed) for seed in (1, 2))
    assert abs((a == 0).float().mean() - p) < 2e-3  # six standard deviations
    assert torch.allclose(a[a != 0], torch.tensor(1 / 0.9))
    both = ((a == 0) & (b == 0)).float().mean()
    assert abs(both - p * p) < 1e-3
    neighbours = ((a[1:] == 0) & (a[:-1] == 0)).float().mean()
    assert abs(neighbours - p * p) < 1e-3


def test_edges(device):
    x = torch.randn(3, 96, device=device)
    assert dropout(x, 0.0, 1) is x
    with pytest.raises(ValueError, match="probability"):
        dropout(x, 1.0, 1)
    with pytest.raises(ValueError, match="seed"):
        dropout(x, 0.1, -1)
