"""Many conversations through one decoder: continuous batching (Yu et al. 2022, Orca) over a paged cache.

A call gives each request a row. Rows wait until the cache has room for their longest answer, enter in one pass over all
their prompts, then take one token a step together, and leave when they end; a waiting row takes the place at once. Each
row brings its own adapter or none, settings, seed and stop rule, so neither tokens nor draws depend on the company.

On a GPU a step is launched before the tokens of the last one are read, so that the host's work hides behind the
device's; a row that turns out to have ended leaves one token that nobody looks at.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from medlora.errors import ModelError
from medlora.generate.cache import Cache, Held
from medlora.generate.decoder import Decoder, Pass, Span
from medlora.generate.sampling import Controls, Sampling, choose, penalise

CHUNK = 4096  # prompt tokens a pass
SHARE = 0.6  # of the free memory, for the cache


@dataclass(frozen=True, slots=True)
class Request:
    ids: Sequence[int]
    """The prompt's tokens."""
    settings: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    """Name of an adapter on the model; None asks the base."""
    ends: frozenset[int] = frozenset()
    """Tokens that end the answer."""
    stopped: Callable[[list[int]], bool] | None = None
    """Asked after each token but an end token: whether an answer of these tokens is complete."""

    def ended(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.ends or bool(self.stopped and self.stopped(tokens))


@dataclass(frozen=True, slots=True)
class Token:
    request: int
    """Index of the request."""
    id: int
    last: bool
    ended: bool
    """The last, and not because of the length limit."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the likeliest."""


@dataclass(slots=True)
class Row:
    """A request at work."""

    index: int
    request: Request
    slot: int
    random: random.Random
    limit: int
    held: Held = field(default_factory=lambda: Held(-1))
    seat: int = -1
    tokens: list[int] = field(default_factory=list)
    launched: int = 0
    """Tokens asked for; on a GPU one more than `tokens` holds."""
    done: bool = False

    @property
    def past(self) -> int:
        """Tokens in the cache before the next step."""
        return len(self.request.ids) + self.launched - 1


@dataclass(frozen=True, slots=True)
class Flight:
    """Tokens on their way from the device."""

    rows: Sequence[Row]
    tokens: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None
    """Of the chosen [B], of the likeliest [B, n], and which those are [B, n]."""


class Engine:
    """A loaded model with any number of adapters, ready to decode.

    Args:
        model: as `Decoder` takes it; adapters may be trained on between calls.
        rows: most requests decoded at once; by default 64 on a GPU, 32 on a CPU.
        cache_bytes: most that keys and values may take; by default a share of the memory free now.

    Raises:
        Unknown: the model is not of a kind that `Decoder` knows.
    """

    def __init__(self, model: Any, rows: int | None = None, cache_bytes: int | None = None) -> None:
        self.decoder = decoder = Decoder(model)
        self.device = decoder.device
        self.rows = rows or (64 if self.device.type == "cuda" else 32)
        heads, limit = decoder.heads[1:], cache_bytes or int(SHARE * free_bytes(self.device))
        self.cache = Cache(len(decoder.layers), heads, decoder.dtype, self.device, limit)

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
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        with torch.inference_mode():
            if self.decoder.refresh():
                self.cache.forget()
        return _Call(self, rows).run()

    def _row(self, index: int, request: Request) -> Row:
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
        return Row(index, request, slot, settings.generator(), room)


class _Call:
    """One call of `stream`."""

    def __init__(self, engine: Engine, rows: Sequence[Row]) -> None:
        self.engine, self.decoder, self.cache = engine, engine.decoder, engine.cache
        self.waiting, self.running = deque(rows), list[Row]()
        self.seats = list(range(engine.rows))[::-1]
        self.last = torch.zeros(engine.rows, dtype=torch.int64, device=engine.device)
        self.seen: Tensor | None = None
        self._batch: tuple[list[int], Controls, Tensor] | None = None
        self.ahead = engine.device.type == "cuda"

    def run(self) -> Iterator[Token]:
        flight: Flight | None = None
        try:
            while self.waiting or self.running or flight:
                flight, landed = self._advance(flight)
                yield from landed
        finally:
            for row in self.running:
                self.cache.give(row.held, ())

    @torch.inference_mode()  # for a step only: it must not reach the caller
    def _advance(self, flight: Flight | None) -> tuple[Flight | None, list[Token]]:
        try:
            following = self._launch() if flight is None or self.ahead else None
            return following, self._land(flight) if flight else []
        except BaseException:
            self.cache.forget()  # blocks may be findable that no pass has filled
            raise

    def _launch(self) -> Flight | None:
        rows = self._admit()
        if rows:
            logits = self._prefill(rows)
        else:
            rows = [row for row in self.running if row.launched < row.limit]
            if not rows and not self.running:
                raise ModelError("the cache is full of other calls' keys and values; try again, or load with more")
            if not rows:
                return None
            logits = self._step(rows)
        return self._choose(rows, logits)

    def _admit(self) -> list[Row]:
        admitted: list[Row] = []
        while self.waiting and self.seats:
            row = self.waiting[0]
            held = self.cache.take(row.request.ids, len(row.request.ids) + row.limit, row.slot)
            if held is None:
                break
            row.held, row.seat = held, self.seats.pop()
            self.running.append(self.waiting.popleft())
            admitted.append(row)
        return admitted

    def _prefill(self, rows: Sequence[Row]) -> Tensor:
        """Logits [B, V] float32 after each prompt."""
        parts = [part for row in rows for part in _parts(row)]
        last: list[Tensor] = []
        while parts:
            now, size = [parts.pop(0)], 0
            size = now[0][1].new
            while parts and size + parts[0][1].new <= CHUNK:
                size += parts[0][1].new
                now.append(parts.pop(0))
            ids = [i for row, span in now for i in row.request.ids[span.past : span.past + span.new]]
            tokens = torch.tensor(ids).to(self.engine.device)
            this = Pass(self.decoder, [span for _, span in now], [row.slot for row, _ in now])
            hidden = self.decoder(tokens, this, self.cache)
            ends = [
                border - 1
                for (row, span), border in zip(now, this.borders[1:], strict=True)
                if span.past + span.new == len(row.request.ids)
            ]
            last.append(hidden[ends])
        return self.decoder.head(torch.cat(last)).float()

    def _step(self, rows: Sequence[Row]) -> Tensor:
        """Logits [B, V] float32 after each row's last token."""
        tokens = self.last[self._settings(rows)[1]]
        spans = [Span(row.held.blocks, row.past, 1) for row in rows]
        hidden = self.decoder(tokens, Pass(self.decoder, spans, [row.slot for row in rows]), self.cache)
        return self.decoder.head(hidden).float()

    def _settings(self, rows: Sequence[Row]) -> tuple[Controls, Tensor]:
        """Controls and seats of a batch, made anew when its rows change."""
        who = [row.index for row in rows]
        if self._batch is None or self._batch[0] != who:
            seats = torch.tensor([row.seat for row in rows]).to(self.engine.device)
            controls = Controls([row.request.settings for row in rows], self.engine.device)
            self._batch = who, controls, seats
        return self._batch[1], self._batch[2]

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> Flight:
        controls, seats = self._settings(rows)
        scores = self._penalised(rows, logits, controls, seats) if controls.penalises else logits
        uniform = None
        if not controls.greedy:
            numbers = [row.random.random() for row in rows]
            uniform = torch.tensor(numbers, dtype=torch.float64).to(logits.device, non_blocking=True)
        tokens = choose(scores, controls, uniform)
        self.last[seats] = tokens
        if self.seen is not None:
            self.seen[seats, tokens] = True
        for row in rows:
            row.launched += 1
        wanted = [row.request.settings.logprobs for row in rows if row.request.settings.logprobs is not None]
        return Flight(rows, tokens, log_probabilities(logits, tokens, max(wanted)) if wanted else None)

    def _penalised(self, rows: Sequence[Row], logits: Tensor, controls: Controls, seats: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = torch.zeros(len(self.last), logits.shape[1], dtype=torch.bool, device=logits.device)
        for row in rows:
            if row.launched == 0:
                self.seen[row.seat] = False
                self.seen[row.seat, torch.tensor(row.request.ids).to(logits.device)] = True
        return penalise(logits, self.seen[seats], controls)

    def _land(self, flight: Flight) -> list[Token]:
        """Read a flight's tokens; rows that end leave."""
        tokens = flight.tokens.tolist()  # the one wait of a step
        chosen, values, likeliest = (t.tolist() for t in flight.logprobs) if flight.logprobs else ([], [], [])
        landed: list[Token] = []
        for i, (row, token) in enumerate(zip(flight.rows, tokens, strict=True)):
            if row.done:
                continue
            row.tokens.append(token)
            wanted, ended = row.request.settings.logprobs, row.request.ended(row.tokens)
            row.done = ended or len(row.tokens) == row.limit
            report: tuple[Any, ...] = ()
            if wanted is not None:
                report = chosen[i], tuple(zip(likeliest[i], values[i], strict=True))[:wanted]
            landed.append(Token(row.index, token, row.done, ended, *report))
            if row.done:
                self._leave(row)
        return landed

    def _leave(self, row: Row) -> None:
        self.running.remove(row)
        self.seats.append(row.seat)
        self.cache.give(row.held, [*row.request.ids, *row.tokens[:-1]])


def _parts(row: Row) -> Iterator[tuple[Row, Span]]:
    """A prompt beyond what the cache knows, in passes of at most `CHUNK` tokens."""
    for start in range(row.held.known, len(row.request.ids), CHUNK):
        yield row, Span(row.held.blocks, start, min(CHUNK, len(row.request.ids) - start))


def log_probabilities(logits: Tensor, tokens: Tensor, likeliest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the chosen tokens [B], of the likeliest ones [B, n], and which those are [B, n]; logits [B, V] float32."""
    every = logits.log_softmax(-1)
    values, order = every.topk(likeliest)
    return every.gather(1, tokens[:, None])[:, 0], values, order


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)
