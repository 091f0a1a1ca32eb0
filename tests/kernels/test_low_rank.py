import pytest
import torch

from medlora.kernels.low_rank import add_low_rank_


@pytest.mark.parametrize(
    ("T", "n", "N", "R"),
    [(1, 1, 8, 1), (3, 2, 40, 4), (127, 3, 96, 8), (300, 1, 200, 24), (129, 2, 136, 64), (70, 2, 136, 152)],
)
def test_every_module_adds_its_own(T, n, N, R, dtype, device, close):
    before = torch.randn(T, n * N + 8, device=device).to(dtype)
    h = torch.randn(T, n * R + 5, device=device).to(dtype)[:, : n * R]
    b = torch.randn(n, N, R + 3, device=device).to(dtype)[:, :, :R]
    both = before.clone()
    y = both[:, : n * N]
    assert add_low_rank_(y, h, b) is y
    terms = [left @ right.t() for left, right in zip(h.double().split(R, 1), b.double(), strict=True)]
    close(y, before[:, : n * N].double() + torch.cat(terms, 1), roundings=1)
    assert torch.equal(both[:, n * N :], before[:, n * N :])


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        add_low_rank_(torch.zeros(3, 8), torch.zeros(3, 4), torch.zeros(2, 4, 4))
