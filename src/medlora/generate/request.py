"""What is asked of the engine and what comes back, token by token."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from medlora.generate.cache import Held
from medlora.generate.sampling import Sampling
from medlora.generate.speculative import Lookup


class Constraint(Protocol):
    """A rule that every token of one answer must keep."""

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [V] on the host; an end token once the answer may end."""

    def accept(self, token: int) -> bool:
        """Take a chosen token; whether nothing can follow it."""


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
    constraint: Constraint | None = None
    """For this request alone: it keeps the state of one answer."""

    def ended(self, tokens: list[int]) -> bool:
        """Whether the answer is complete; asked once for each new token."""
        if tokens[-1] in self.ends:
            return True
        stopped = bool(self.stopped and self.stopped(tokens))
        return bool(self.constraint and self.constraint.accept(tokens[-1])) or stopped


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
    """The adapter, -1 for none."""
    limit: int
    """Most tokens of the answer."""
    random: random.Random
    held: Held = field(default_factory=lambda: Held(-1))
    seat: int = -1
    """Its place in what the device keeps of every row."""
    tokens: list[int] = field(default_factory=list)
    launched: int = 0
    """Tokens asked for; on a GPU one more than `tokens` holds."""
    done: bool = False
    """It has ended, or nobody wants it any more; then it leaves."""
    lookup: Lookup | None = None
    _drawn: list[float] = field(default_factory=list)

    @property
    def past(self) -> int:
        """Tokens in the cache before the next step."""
        return len(self.request.ids) + self.launched - 1

    def uniform(self, index: int) -> float:
        """The number in [0, 1) that decides the answer's token `index`, however the steps fall."""
        while len(self._drawn) <= index:
            self._drawn.append(self.random.random())
        return self._drawn[index]
