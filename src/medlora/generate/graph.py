"""A decode step on a GPU: one CUDA graph for each size of batch, replayed once a token.

A layer is seven short kernels, so a step of a 7B model is over two hundred launches for two milliseconds of work: the
host would take longer to ask than the device to answer. A graph is captured when a size first comes up. It reads its
tokens, lengths, block tables and adapters from buffers that stay in place, which are filled before each replay. Sizes
are powers of two; rows that fill one up have length 0, so they read nothing and write nothing.

Several tokens of one conversation (a draft, a short prompt) are rows with the same table and growing lengths: every
layer writes all keys before any row looks.
"""

# torch leaves Stream untyped
# mypy: allow-untyped-calls
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from medlora.generate.cache import BLOCK, Cache
from medlora.generate.decoder import Decoder, Span
from medlora.generate.weights import Choice
from medlora.kernels.decode_attention import decode_attention, rope_append
from medlora.kernels.dispatch import ceil_div, next_power_of_2
from medlora.kernels.nf4_batch import MAX_ROWS as BATCH_ROWS
from medlora.kernels.nf4_batch import serves
from medlora.kernels.nf4_linear import MAX_ROWS
from medlora.model.memory import free_bytes

WARM_UP = 2  # runs before a capture, in which kernels compile and libraries allocate
NARROWEST = 8  # blocks of the smallest table


class Single:
    """Single tokens, each of a conversation of its own as far as the kernels know; every buffer stays in place.

    Args:
        rows: B. width: blocks of the longest conversation.
    """

    def __init__(self, decoder: Decoder, rows: int, width: int) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=decoder.device)

        self.scale = decoder.scale
        self.cos, self.sin = decoder.tables
        self.tokens, self.lengths = zeros(rows, dtype=torch.int64), zeros(rows)
        self.table, slots = zeros(rows, width), zeros(rows)
        self.choice = Choice(None, slots, step=True)
        self.filled: Sequence[Sequence[int]] = []

    def fill(self, tokens: Tensor, spans: Sequence[Span], slots: Sequence[int]) -> None:
        """Tokens [T] on the device, T <= B; spans and slots as `Pass` takes them."""
        empty = len(self.lengths) - len(tokens)
        self.tokens[: len(tokens)] = tokens
        self._copy(self.lengths, [i + 1 for s in spans for i in range(s.past, s.past + s.new)] + [0] * empty)
        blocks = [span.blocks for span in spans for _ in range(span.new)]
        if len(blocks) == len(self.filled) and all(a is b for a, b in zip(blocks, self.filled, strict=True)):
            return
        self.filled, width = blocks, self.table.shape[1]
        lines = [[*line[:width], *[0] * (width - len(line))] for line in blocks]
        self._copy(self.table, lines + [[0] * width] * empty)
        each = [slot for span, slot in zip(spans, slots, strict=True) for _ in range(span.new)]
        self._copy(self.choice.slots, each + [-1] * empty)

    @staticmethod
    def _copy(to: Tensor, values: Sequence[int] | Sequence[Sequence[int]]) -> None:
        host = torch.tensor(values, dtype=to.dtype)
        to.copy_(host.pin_memory() if to.is_cuda else host, non_blocking=True)

    def attend(self, qkv: Tensor, cache: Cache, layer: int) -> Tensor:
        k, v = cache.k[layer], cache.v[layer]
        q = rope_append(qkv, self.cos, self.sin, k, v, self.table, self.lengths)
        return decode_attention(q, k, v, self.table, self.lengths, self.scale).flatten(1)


class Steps:
    """Decode steps of any batch.

    Args:
        graphs: whether to capture; without, the same kernels are launched one by one.
    """

    def __init__(self, decoder: Decoder, cache: Cache, *, graphs: bool = True) -> None:
        self.decoder, self.cache, self.graphs = decoder, cache, graphs
        self.ready: dict[tuple[int, int], tuple[Single, Callable[[], Tensor]]] = {}
        self.pool: Any = None
        self.aside: Any = torch.cuda.Stream(decoder.device) if graphs else None  # one: each takes a workspace of cuBLAS
        self.grown = -1

    def __call__(self, tokens: Tensor, spans: Sequence[Span], slots: Sequence[int]) -> Tensor:
        """Logits [T, V] float32, to be read before the next step; arguments as `Single.fill`."""
        if self.grown != self.cache.grown:  # graphs hold the pools' addresses
            self.ready.clear()
            self.grown = self.cache.grown
            self.pool = torch.cuda.graph_pool_handle() if self.graphs else None  # one ends with the last of its graphs
        longest = max(ceil_div(span.past + span.new, BLOCK) for span in spans)
        size = next_power_of_2(len(tokens)), max(next_power_of_2(longest), NARROWEST)
        if size not in self.ready:
            if size[0] > MAX_ROWS:
                self._keep(size[0])
            single = Single(self.decoder, *size)
            single.fill(tokens, spans, slots)
            self.ready[size] = single, self._capture(single)
        single, run = self.ready[size]
        single.fill(tokens, spans, slots)
        return run()[: len(tokens)]

    def _keep(self, rows: int) -> None:
        device = self.decoder.device
        if rows > BATCH_ROWS or not serves(device, self.decoder.dtype):
            self.decoder.keep(free_bytes(device))

    def _run(self, single: Single) -> Tensor:
        return self.decoder.logits(self.decoder(single.tokens, single, self.cache))

    def _capture(self, single: Single) -> Callable[[], Tensor]:
        if not self.graphs:
            return lambda: self._run(single)
        aside, here = self.aside, torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._run(single)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=aside):
            logits = self._run(single)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
