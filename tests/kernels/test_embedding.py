import pytest
import torch

from medlora.kernels.embedding import gather_rows


@pytest.mark.parametrize(("T", "D"), [(1, 576), (3, 96), (127, 33)])
def test_rows_are_those_of_the_table(T, D, dtype, device):
    table = torch.randn(50, D).to(dtype)
    ids = torch.randint(50, (T,))
    ids[0] = 49
    there = table.pin_memory() if device.type == "cuda" else table
    y = gather_rows(there, ids.to(device))
    assert y.device.type == device.type and torch.equal(y.cpu(), table[ids])
