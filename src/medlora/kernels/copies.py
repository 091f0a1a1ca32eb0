"""Many matrices into others of another dtype, in one launch: torch's foreach copies one by one where rows lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import ceil_div, jit, tl, upload, use_triton

SHARE = 4096  # elements of a program


@jit
def _copy_kernel(table: tl.tensor, source: tl.tensor, target: tl.tensor, SHARE: tl.constexpr) -> None:
    """A share of one matrix; `source` and `target` are any of them, which tell the dtypes."""
    entry = table + 5 * tl.program_id(1)
    x = tl.load(entry).to(tl.pointer_type(source.dtype.element_ty))
    y = tl.load(entry + 1).to(tl.pointer_type(target.dtype.element_ty))
    size, columns, row = tl.load(entry + 2), tl.load(entry + 3).to(tl.int32), tl.load(entry + 4)
    at = tl.program_id(0) * SHARE + tl.arange(0, SHARE)  # by 64 bits a division would take longer than memory does
    inside = at < size
    tl.store(y + at // columns * row + at % columns, tl.load(x + at, inside).to(target.dtype.element_ty), inside)


class Copies:
    """What is copied where.

    Args:
        sources: matrices.
        targets: matrices of the same shapes, with dense rows, of one dtype.
    """

    def __init__(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self.sources, self.targets = list(sources), list(targets)
        self.at: list[int] = []
        self.tables: list[Tensor | None] = [None]
        """The last one serves; what has been captured reads earlier ones."""

    @torch.no_grad()
    def __call__(self) -> None:
        """Copy; the sources may lie elsewhere than last time, the targets not."""
        at = [source.data_ptr() for source in self.sources]
        if at != self.at:
            self.at = at
            self.tables.append(self._described(at))
        table = self.tables[-1]
        if table is None:
            torch._foreach_copy_(self.targets, self.sources)
            return
        shares = ceil_div(max(target.numel() for target in self.targets), SHARE)
        _copy_kernel[(shares, len(at))](table, self.sources[0], self.targets[0], SHARE=SHARE, num_warps=8)

    def _described(self, at: list[int]) -> Tensor | None:
        """A row of each for the kernel, where it can serve."""
        alike = len({source.dtype for source in self.sources}) == 1
        if not (alike and use_triton(self.targets[0]) and all(source.is_contiguous() for source in self.sources)):
            return None
        rows = [
            (source, target.data_ptr(), target.numel(), target.shape[1], target.stride(0))
            for source, target in zip(at, self.targets, strict=True)
        ]
        return upload(torch.tensor(rows), self.targets[0].device)
