"""Continuous batching (Yu et al. 2022, Orca): rows wait, enter, take a token a step together, and leave.

A row waits until the cache has room for its longest answer, enters with all new prompts in as few passes as memory
allows, and leaves when it ends, or once nobody wants it any more; a waiting row takes the place at once.

On a GPU a step is launched before the tokens of the last one are read, so that the host's work hides behind the
device's; a row that turns out to have ended leaves one token that nobody looks at. Where the host must see a token
before the next step (constraints, drafts) and on a CPU, where nothing would hide, steps and reading alternate.
"""

# torch leaves Event untyped
# mypy: allow-untyped-calls
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medlora.errors import ModelError
from medlora.generate.cache import Cache
from medlora.generate.decoder import Decoder, Pass, Span
from medlora.generate.request import Row, Token
from medlora.generate.sampling import Controls, choose, log_probabilities, penalise
from medlora.generate.speculative import Lookup, Pace
from medlora.kernels.dispatch import ceil_div
from medlora.kernels.nf4_linear import MAX_ROWS

CHUNK = 1280  # most prompt tokens in one pass, which holds 50 KiB for each of them at 7B: 64 questions of 20 fit
LONG_CHUNK = 768  # of a pass where that does not do: keys and values then take the memory
DRAFTING = 4  # most rows that draft together: with more, the products are no longer bound by memory

SHORT = 2 * MAX_ROWS  # tokens of a prompt that two steps take

Arrivals = Callable[[bool], Sequence[Row]]
"""Rows that came since it was last asked; told whether all others have ended, when none means that no more will."""
Step = Callable[[Tensor, Sequence[Span], Sequence[int]], Tensor]
"""Tokens [T], spans and the spans' adapters -> logits [T, V] float32."""


class Group(NamedTuple):
    """The settings of a batch's rows on the device, made anew when its rows change."""

    who: list[int]
    controls: Controls
    seats: Tensor


@dataclass(frozen=True, slots=True)
class Flight:
    """Tokens on their way from the device: for each row one, and one for each token of its draft."""

    rows: Sequence[Row]
    drafts: Sequence[Sequence[int]]
    land: Callable[[], list[list[Any]]]
    """Waits; then the tokens and, where they are wanted, the three parts of `log_probabilities`."""
    began: float


class Batch:
    """The rows of one call.

    Args:
        step: a decode step of the engine.
        seats: most rows at once.
        draft: whether rows draft; None leaves it to the clock.
        short: most tokens of a prompt that passes through steps, if it is the only one.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache,
        step: Step,
        rows: Sequence[Row],
        seats: int,
        draft: bool | None,
        short: int = 0,
    ) -> None:
        self.decoder, self.cache, self.step, self.short = decoder, cache, step, short
        self.device = decoder.device
        self.waiting, self.running = deque(rows), list[Row]()
        self.seats = list(range(seats))[::-1]
        self.last = torch.zeros(seats, dtype=torch.int64, device=self.device)
        self.seen: Tensor | None = None
        self.group: Group | None = None
        self.draft, self.pace = draft, Pace()

    @property
    def ahead(self) -> bool:
        """Whether a step is launched before the last one is read."""
        if self.device.type != "cuda" or self.draft:
            return False
        return not any(row.request.constraint for rows in (self.waiting, self.running) for row in rows)

    def run(self, arrivals: Arrivals = lambda idle: ()) -> Iterator[Token]:
        flight: Flight | None = None
        try:
            while True:
                self.waiting.extend(arrivals(not (self.waiting or self.running or flight)))
                if not (self.waiting or self.running or flight):
                    return
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
        began = time.monotonic()
        rows = self._admit()
        if rows:
            return self._choose(rows, [()] * len(rows), self._prefill(rows), began)
        rows = [row for row in self.running if row.launched < row.limit]
        if self.waiting and not self.running:
            raise ModelError("the memory for keys and values is taken by other calls; ask again when they have ended")
        if not rows:
            return None
        drafts = self._drafts(rows)
        return self._choose(rows, drafts, self._decode(rows, drafts), began)

    def _admit(self) -> list[Row]:
        admitted: list[Row] = []
        while self.waiting and self.seats:
            row = self.waiting[0]
            if row.done:
                self.waiting.popleft()
                continue
            held = self.cache.take(row.request.ids, len(row.request.ids) + row.limit, row.slot)
            if held is None:
                break
            row.held, row.seat = held, self.seats.pop()
            self.running.append(self.waiting.popleft())
            admitted.append(row)
        return admitted

    def _prefill(self, rows: Sequence[Row]) -> Tensor:
        """Logits [B, V] float32 after each prompt."""
        if len(rows) == 1 and len(rows[0].request.ids) - rows[0].held.known <= self.short:
            return self._through_steps(rows[0])
        last: list[Tensor] = []
        passes = list(_passes(rows))
        with self.decoder.in_pieces(len(passes) > 1):
            for parts in passes:
                ids = [i for row, span in parts for i in row.request.ids[span.past : span.past + span.new]]
                this = Pass(self.decoder, [span for _, span in parts], [row.slot for row, _ in parts])
                hidden = self.decoder(torch.tensor(ids).to(self.device), this, self.cache)
                whole = [span.past + span.new == len(row.request.ids) for row, span in parts]
                last.append(hidden[[end - 1 for end, done in zip(this.borders[1:], whole, strict=True) if done]])
        return self.decoder.logits(torch.cat(last))

    def _through_steps(self, row: Row) -> Tensor:
        """Logits [1, V] after a prompt whose tokens pass like a draft's: a pass of few is the host's time alone."""
        ids, start = row.request.ids, row.held.known
        for left in range(ceil_div(len(ids) - start, MAX_ROWS), 0, -1):
            new = ceil_div(len(ids) - start, left)
            tokens = torch.tensor(ids[start : start + new]).to(self.device)
            logits = self.step(tokens, [Span(row.held.blocks, start, new)], [row.slot])
            start += new
        return logits[-1:]

    def _decode(self, rows: Sequence[Row], drafts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [T, V] float32 after each row's last token and each token of its draft."""
        if any(drafts):
            ids = [i for row, draft in zip(rows, drafts, strict=True) for i in (row.tokens[-1], *draft)]
            tokens = torch.tensor(ids).to(self.device)
        else:
            tokens = self.last[self._group(rows).seats]
        spans = [Span(row.held.blocks, row.past, 1 + len(draft)) for row, draft in zip(rows, drafts, strict=True)]
        return self.step(tokens, spans, [row.slot for row in rows])

    def _drafts(self, rows: Sequence[Row]) -> Sequence[Sequence[int]]:
        none: Sequence[Sequence[int]] = [()] * len(rows)
        if self.ahead or self.draft is False or len(rows) > DRAFTING or self.group is None:
            return none
        if any(row.request.constraint for row in rows) or self._group(rows).controls.penalises:
            return none
        if not self.draft and not self.pace.pays():
            return none
        for row in rows:
            row.lookup = row.lookup or Lookup(row.request.ids)
            row.lookup.add([*row.request.ids, *row.tokens][len(row.lookup.ids) :])
        return [row.lookup.draft(row.limit - row.launched - 1) if row.lookup else () for row in rows]

    def _group(self, rows: Sequence[Row]) -> Group:
        who = [row.index for row in rows]
        if self.group is None or self.group.who != who:
            seats = torch.tensor([row.seat for row in rows]).to(self.device)
            self.group = Group(who, Controls([row.request.settings for row in rows], self.device), seats)
        return self.group

    def _choose(self, rows: Sequence[Row], drafts: Sequence[Sequence[int]], logits: Tensor, began: float) -> Flight:
        group = self._group(rows)
        controls = group.controls
        scores = self._penalised(rows, logits, group) if controls.penalises else logits
        if any(row.request.constraint for row in rows):
            scores = scores.masked_fill(~self._allowed(rows, logits), -torch.inf)
        if any(drafts):
            controls = controls.repeat([1 + len(draft) for draft in drafts])
        uniform = None
        if not controls.greedy:
            numbers = [
                row.uniform(row.launched + i)
                for row, draft in zip(rows, drafts, strict=True)
                for i in range(1 + len(draft))
            ]
            uniform = torch.tensor(numbers, dtype=torch.float64).to(self.device)
        tokens = choose(scores, controls, uniform)
        if not any(drafts):
            self.last[group.seats] = tokens
            if self.seen is not None:
                self.seen[group.seats, tokens] = True
        for row in rows:
            row.launched += 1
        wanted = [row.request.settings.logprobs for row in rows if row.request.settings.logprobs is not None]
        report = log_probabilities(logits, tokens, max(wanted)) if wanted else ()
        return Flight(rows, drafts, _departed(tokens, *report), began)

    def _penalised(self, rows: Sequence[Row], logits: Tensor, group: Group) -> Tensor:
        if self.seen is None:
            self.seen = torch.zeros(len(self.last), logits.shape[1], dtype=torch.bool, device=self.device)
        for row in rows:
            if row.launched == 0:
                self.seen[row.seat] = False
                self.seen[row.seat, torch.tensor(row.request.ids).to(self.device)] = True
        return penalise(logits, self.seen[group.seats], group.controls)

    def _allowed(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        allowed = torch.ones(logits.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            if row.request.constraint:
                allowed[i] = row.request.constraint.allowed()
        return allowed.to(self.device)

    def _land(self, flight: Flight) -> list[Token]:
        """Read a flight's tokens; rows that end leave."""
        tokens, *report = flight.land()  # the one wait of a step
        reports = list(zip(*report, strict=True))
        landed: list[Token] = []
        place = 0
        for row, draft in zip(flight.rows, flight.drafts, strict=True):
            for i in range(place, place + 1 + len(draft)):
                if row.done:
                    break
                landed.append(_token(row, tokens[i], reports[i] if reports else None))
                if i < place + len(draft) and tokens[i] != draft[i - place]:
                    break
            place += 1 + len(draft)
            if any(flight.drafts):
                row.launched = len(row.tokens)
                self.last[row.seat] = row.tokens[-1]
            if row.done and row in self.running:
                self._leave(row)
        self.pace.note(time.monotonic() - flight.began, len(landed), drafted=any(flight.drafts))
        return landed

    def _leave(self, row: Row) -> None:
        self.running.remove(row)
        self.seats.append(row.seat)
        self.cache.give(row.held, [*row.request.ids, *row.tokens[:-1]])


def _departed(*tensors: Tensor) -> Callable[[], list[list[Any]]]:
    """Copies set out for the host now, so that reading them does not wait for what is launched later."""
    if not tensors[0].is_cuda:
        return lambda: [tensor.tolist() for tensor in tensors]
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    here = torch.cuda.Event()
    here.record()

    def land() -> list[list[Any]]:
        here.synchronize()
        return [copy.tolist() for copy in copies]

    return land


def _passes(rows: Sequence[Row]) -> Iterator[list[tuple[Row, Span]]]:
    """What the cache does not know of the prompts, in one pass or in several."""
    parts: list[tuple[Row, Span]] = []
    most = CHUNK if sum(len(row.request.ids) - row.held.known for row in rows) <= CHUNK else LONG_CHUNK
    room = most
    for row in rows:
        start, end = row.held.known, len(row.request.ids)
        while start < end:
            new = min(room, end - start)
            parts.append((row, Span(row.held.blocks, start, new)))
            start, room = start + new, room - new
            if not room:
                yield parts
                parts, room = [], most
    if parts:
        yield parts


def _token(row: Row, token: int, report: tuple[float, list[float], list[int]] | None) -> Token:
    row.tokens.append(token)
    ended = row.request.ended(row.tokens)
    row.done = ended or len(row.tokens) == row.limit
    wanted = row.request.settings.logprobs
    if wanted is None or report is None:
        return Token(row.index, token, row.done, ended)
    chosen, values, likeliest = report
    return Token(row.index, token, row.done, ended, chosen, tuple(zip(likeliest, values, strict=True))[:wanted])
