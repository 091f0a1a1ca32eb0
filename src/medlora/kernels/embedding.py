"""Rows of an embedding table that lies in pinned host memory, fetched by the GPU itself.

    y[t] = table[ids[t]]

Pinned memory has an address on the device, so the rows cross the bus once, straight to their place, and the host
neither gathers them nor waits for the ids.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding

from .dispatch import jit, next_power_of_2, tl, use_triton


@jit
def _gather_kernel(table: tl.tensor, ids: tl.tensor, y: tl.tensor, D: int, BLOCK: tl.constexpr) -> None:
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    tl.store(y + row * D + col, tl.load(table + tl.load(ids + row) * D + col, inside), inside)


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """[T, D] on the device of `ids`; no gradient.

    Args:
        table: [V, D], rows dense; on the device of `ids` or in pinned host memory.
        ids: [T] int64, in [0, V).
    """
    if not use_triton(ids):
        return embedding(ids.to(table.device), table).to(ids.device)
    y = table.new_empty(len(ids), table.shape[1], device=ids.device)
    _gather_kernel[(len(ids),)](table, ids, y, table.shape[1], BLOCK=next_power_of_2(table.shape[1]), num_warps=4)
    return y
