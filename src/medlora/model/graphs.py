"""Short rows as CUDA graphs: the forward and the backward pass of each length, captured once and replayed.

A layer is some sixty launches in the two passes, and below a few thousand tokens the device ends each sooner than the
host asks for the next. Lengths are rounded up, to an eighth of their power of two or more, so that few of them come up:
the last document is the longer, and nothing reads that. Inputs, outputs and the gradients of what is trained stay in
place; all graphs share one pool of memory, whose size the longest decides, which is captured first. The loss lies
between the two passes and takes no part.

On a CPU the passes are run instead of replayed, over the same buffers.
"""

# torch leaves Function.apply and Stream untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from medlora.model.group import Group
from medlora.model.offload import Offload

if TYPE_CHECKING:
    from medlora.model.fused import Row

# A row grows to a multiple of this, replayed or not: shapes that recur are looked up once by cuBLAS and the allocator,
# and a product's tiles are as tall anyway.
ROUND = 128
VOID: list[torch.cuda.CUDAGraph] = []  # torch's allocator goes on asking a graph whose capture did not end


def rounded(tokens: int, parts: int) -> int:
    """The next of the `parts` lengths in an octave that are multiples of `ROUND`."""
    step = max(ROUND, (1 << tokens.bit_length() - 1) // parts)
    return -(-tokens // step) * step


@cache
def _side_stream(device: torch.device) -> Any:
    """One: each that computes keeps a workspace of cuBLAS."""
    return torch.cuda.Stream(device)


class Uncapturable(Exception):
    """The driver or a library does not let a pass be captured; the message says why."""


class Rows(NamedTuple):
    """Which rows are replayed."""

    tokens: int
    """Of the longest, a multiple of `ROUND`."""
    documents: int
    """How many it may have."""
    parts: int = 8
    """Lengths in an octave, a power of two."""


class Captured(NamedTuple):
    forward: Callable[[], None]
    backward: Callable[[], None]


class Graphs:
    """The passes of one decoder.

    Args:
        stack: (x [T, D], row) -> hidden states [T, D], with gradients for the groups' masters.
        groups: those of all layers; some are trained.
        rows: which are replayed.
    """

    def __init__(self, stack: Callable[[Tensor, Row], Tensor], groups: Sequence[Group], rows: Rows) -> None:
        self.stack, self.groups, self.rows = stack, groups, rows
        self.masters = [master for group in groups for master in group.masters]
        self.ready: dict[int, Captured] = {}
        self.turn = 0
        device = self.masters[0].device
        self.aside: Any = _side_stream(device) if device.type == "cuda" else None
        self.room: list[Tensor] | None = [] if self.aside else None

    def takes(self, tokens: int, documents: int) -> bool:
        """Whether a row of so many is replayed."""
        return tokens <= self.rows.tokens and documents <= self.rows.documents

    def padded(self, borders: list[int]) -> list[int]:
        """The borders of a longer row, of as many documents as every row has: the rest are empty."""
        length = min(rounded(borders[-1], self.rows.parts), self.rows.tokens)
        return borders[:-1] + [length] * (self.rows.documents + 2 - len(borders))

    def __call__(self, x: Tensor, row: Row) -> Tensor:
        """What `stack` gives for a row of `padded` borders, in memory that its backward pass, due before the next
        row's, overwrites.

        Raises:
            Uncapturable: nothing has been computed then.
        """
        if not self.ready:
            self._make_room(x, row)
        T = len(x)
        self._fill(x, row)
        if T not in self.ready:
            self.ready[T] = self._capture(T)
        hidden: Tensor = _Replayed.apply(self.masters[0], self, T)
        return hidden

    def _make_room(self, x: Tensor, row: Row) -> None:
        """Buffers for rows of every length, and the longest captured after it has been run once: kernels are compiled
        and libraries allocate then."""
        documents, n = row.documents, self.rows.tokens
        sizes = [master.numel() for master in self.masters]
        self.flat_grads = torch.zeros(sum(sizes), device=x.device)
        parts = self.flat_grads.split(sizes)
        self.grads = [part.view_as(master) for part, master in zip(parts, self.masters, strict=True)]
        self.x, self.hidden = (x.new_zeros(n, x.shape[1]) for _ in range(2))  # the latter's gradient takes its place
        self.cos, self.sin = (t.new_zeros(n, t.shape[1]) for t in (documents.cos, documents.sin))
        self.starts, self.seed = documents.starts.clone(), row.seed.clone()
        self.row = row
        if self.aside is None:
            return
        self.starts[1:] = n
        leaves = self._leaves()
        with self._aside():
            self._backward(n, leaves, *self._forward(n, leaves))
        self.pool = torch.cuda.graph_pool_handle()
        self.ready[n] = self._capture(n)

    def _fill(self, x: Tensor, row: Row) -> None:
        T, documents = len(x), row.documents
        self.row = row
        self.x[:T], self.cos[:T], self.sin[:T] = x, documents.cos, documents.sin
        self.starts.copy_(documents.starts)
        self.seed.copy_(row.seed)

    def _forward(self, T: int, leaves: list[list[Tensor]]) -> tuple[Tensor, Offload]:
        documents = self.row.documents._replace(
            cos=self.cos[:T], sin=self.sin[:T], starts=self.starts, longest=T, alike=False
        )
        offload = Offload(self.row.offload.stream, self.room)
        try:
            with self._reading(leaves), torch.enable_grad():
                hidden = self.stack(self.x[:T], self.row._replace(documents=documents, seed=self.seed, offload=offload))
            self.hidden[:T] = hidden.detach()
        finally:
            offload.settle()  # no capture ends while another stream is apart
        return hidden, offload

    def _backward(self, T: int, leaves: list[list[Tensor]], hidden: Tensor, offload: Offload) -> None:
        try:
            with self._reading(leaves):
                hidden.backward(self.hidden[:T])
        finally:
            offload.settle()

    def _leaves(self) -> list[list[Tensor]]:
        """Other leaves over the masters' memory, by group, whose gradients are added up in place. Autograd keeps one
        node of a leaf, with the stream that it was first used on, for as long as any loss lives."""
        leaves = [[master.detach().requires_grad_() for master in group.masters] for group in self.groups]
        for leaf, grad in zip(chain(*leaves), self.grads, strict=True):
            leaf.grad = grad
        return leaves

    @contextmanager
    def _reading(self, leaves: list[list[Tensor]]) -> Iterator[None]:
        """Groups read `leaves` meanwhile."""
        own = [group.masters for group in self.groups]
        self._read(leaves)
        try:
            yield
        finally:
            self._read(own)

    def _read(self, leaves: list[list[Tensor]]) -> None:
        for group, masters in zip(self.groups, leaves, strict=True):
            group.masters = masters

    def _capture(self, T: int) -> Captured:
        leaves = self._leaves()
        if self.aside is None:
            last: list[tuple[Tensor, Offload]] = []
            return Captured(
                lambda: last.append(self._forward(T, leaves)), lambda: self._backward(T, leaves, *last.pop())
            )
        torch.cuda.empty_cache()  # a capture that runs short cannot free what is cached beside its pool
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._aside():
            with self._captured(forward):
                made = self._forward(T, leaves)
            with self._captured(backward):
                self._backward(T, leaves, *made)
        return Captured(forward.replay, backward.replay)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        here = torch.cuda.current_stream(self.x.device)
        self.aside.wait_stream(here)
        try:
            with torch.cuda.stream(self.aside):
                yield
        finally:
            here.wait_stream(self.aside)

    @contextmanager
    def _captured(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        try:
            graph.capture_begin(self.pool, capture_error_mode="thread_local")  # loaders may pin memory beside it
            try:
                yield
            except BaseException:
                with suppress(RuntimeError):  # the capture may be void already
                    self._end(graph)
                raise
            self._end(graph)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Uncapturable(str(error).splitlines()[0]) from error

    @staticmethod
    def _end(graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            VOID.append(graph)
            raise

    @property
    def gradients(self) -> Tensor | None:
        """All of what is trained, end to end, if they are those that the graphs add to."""
        return self.flat_grads if self.ready and self.masters[0].grad is self.grads[0] else None

    def own_gradients(self) -> None:
        """Gradients that are added up since the last step, in the buffers that the graphs add to."""
        if self.gradients is not None:
            return
        self.flat_grads.zero_()
        before = [master.grad for master in self.masters if master.grad is not None]
        if before:  # a longer row's
            torch._foreach_copy_(self.grads, before)
        for master, grad in zip(self.masters, self.grads, strict=True):
            master.grad = grad


class _Replayed(Function):
    """Its gradients go straight to `.grad`: autograd would copy each of hundreds."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, graphs: Graphs, T: int) -> Tensor:
        graphs.ready[T].forward()
        graphs.turn += 1
        ctx.graphs, ctx.T, ctx.turn = graphs, T, graphs.turn
        return graphs.hidden[:T].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        graphs: Graphs = ctx.graphs
        if graphs.turn != ctx.turn:
            raise RuntimeError("another row was passed before this one's backward pass")
        graphs.hidden[: ctx.T] = grad
        graphs.own_gradients()
        graphs.ready[ctx.T].backward()
        return None, None, None
