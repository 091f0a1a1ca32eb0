"""A loaded model with any number of adapters, ready to decode many requests at once.

Each request brings its own adapter or none, settings, seed and stop rule, and nothing of the others enters its numbers:
untuned and tuned answers come from one base, in one batch. Draws are its own; but on a GPU products of other numbers of
rows round otherwise, so that a near tie of two tokens may fall otherwise in company. `Batch` schedules, `Decoder`
computes, `Cache` remembers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from medlora.errors import ModelError
from medlora.generate.batch import SHORT, Arrivals, Batch, Step
from medlora.generate.cache import Cache
from medlora.generate.decoder import Decoder, Pass, Span
from medlora.generate.graph import Steps
from medlora.generate.request import Request, Row, Token
from medlora.model.memory import free_bytes

SHARE = 0.6  # of the free memory, for the cache


class Engine:
    """Decodes requests over one model.

    Args:
        model: as `Decoder` takes it; adapters may be trained on between calls.
        rows: most requests decoded at once; by default 64 on a GPU, 32 on a CPU.
        cache_bytes: most that keys and values may take; by default a share of the memory free now.
        draft: whether to draft tokens by prompt lookup; by default on a CPU, while it saves time.
        graphs: whether a GPU's steps are captured; off for debugging.

    Raises:
        Unknown: the model is not of a kind that `Decoder` knows.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int | None = None,
        cache_bytes: int | None = None,
        draft: bool | None = None,
        graphs: bool = True,
    ) -> None:
        self.decoder = decoder = Decoder(model)
        self.device, self.draft = decoder.device, draft
        self.rows = rows or (64 if self.device.type == "cuda" else 32)
        heads, limit = decoder.heads[1:], cache_bytes or int(SHARE * free_bytes(self.device))
        self.cache = Cache(len(decoder.layers), heads, decoder.dtype, self.device, limit)
        on_gpu = self.device.type == "cuda"
        self.step: Step = Steps(decoder, self.cache, graphs=graphs) if on_gpu else self._step

    def generate(self, requests: Sequence[Request]) -> list[list[Token]]:
        """The tokens of every request, an end token included.

        Raises:
            ModelError: as `stream`.
        """
        found: list[list[Token]] = [[] for _ in requests]
        for token in self.stream(requests):
            found[token.request].append(token)
        return found

    def stream(self, requests: Sequence[Request]) -> Iterator[Token]:
        """Tokens as they come, those of different requests interleaved.

        Raises:
            ModelError: a prompt that is empty, leaves no room in the model's context or does not fit the cache, or an
                adapter that is not there.
        """
        return self._batch([self.row(index, request) for index, request in enumerate(requests)]).run()

    def serve(self, arrivals: Arrivals) -> Iterator[Token]:
        """Tokens of rows that go on arriving, until none runs and none comes any more.

        Raises:
            ModelError: other calls hold the memory for keys and values.
        """
        return self._batch(()).run(arrivals)

    def _batch(self, rows: Sequence[Row]) -> Batch:
        with torch.inference_mode():
            if self.decoder.refresh():
                self.cache.forget()
        # Before the first capture, a pass is sooner than one capture more.
        short = SHORT if isinstance(self.step, Steps) and self.step.ready else 0
        return Batch(self.decoder, self.cache, self.step, rows, self.rows, self.draft, short)

    def _step(self, tokens: Tensor, spans: Sequence[Span], slots: Sequence[int]) -> Tensor:
        hidden = self.decoder(tokens, Pass(self.decoder, spans, slots, step=True), self.cache)
        return self.decoder.logits(hidden)

    def row(self, index: int, request: Request) -> Row:
        """A request as a row of this engine's; its tokens will carry the index.

        Raises:
            ModelError: as `stream`.
        """
        known, settings = self.decoder.adapters, request.settings
        if request.adapter is not None and request.adapter not in known:
            raise ModelError(f"no adapter `{request.adapter}` on this base; there is {', '.join(known) or 'none'}")
        context = min(self.decoder.context, settings.max_length or self.decoder.context)
        room = min(settings.max_new_tokens, context - len(request.ids))
        if not request.ids or room < 1:
            raise ModelError(f"a prompt of {len(request.ids)} tokens leaves no answer within {context}; shorten it")
        if not self.cache.possible(len(request.ids) + room):
            raise ModelError(
                f"{len(request.ids)} + {room} tokens do not fit the memory left for keys and values; ask for fewer"
            )
        slot = -1 if request.adapter is None else known.index(request.adapter)
        return Row(index, request, slot, room, settings.generator())
