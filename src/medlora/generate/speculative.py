"""Speculative decoding by prompt lookup: draft what followed the last tokens when they stood earlier in the text.

A draft of n tokens passes through the model beside the last token, so one pass over the weights gives the choice at
n + 1 places; the answer takes the drafted tokens as long as each is what would have been chosen there, and then the
choice itself (Leviathan et al. 2023, arXiv:2211.17192; drafts by lookup: Saxena 2023). Their rule accepts a token x
drafted from q with probability min(1, p(x) / q(x)) and otherwise draws from the part of p above q. A lookup is certain
of its draft, q(x) = 1, so that rule reads: draw from p, and accept where the draw is x. That is what happens here, with
the same random number at each place as without drafts: not only the distribution is kept but every token.
"""

from collections.abc import Sequence

NGRAMS = (4, 3, 2)
LONGEST = 8  # tokens a draft
REST = 24  # steps without drafts after they lost time
FADE = 0.8


class Lookup:
    """Where each run of a few tokens last stood in one conversation."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.add(ids)

    def add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for n in NGRAMS:
                if len(self.ids) >= n:
                    self.after[tuple(self.ids[-n:])] = len(self.ids)
            self.ids.append(token)

    def draft(self, longest: int) -> list[int]:
        """At most `longest` tokens; none where the last two tokens are new."""
        for n in NGRAMS:
            place = self.after.get(tuple(self.ids[-n:]))
            if place is not None:
                return self.ids[place : place + min(longest, LONGEST)]
        return []


class Pace:
    """Whether drafts pay: seconds a token with them and without, by the clock, recent steps counting most."""

    def __init__(self) -> None:
        self.seconds, self.tokens = [0.0, 0.0], [0.0, 0.0]
        self.rest = 2  # the first steps say what a token costs without

    def pays(self) -> bool:
        self.rest -= self.rest > 0
        return not self.rest

    def note(self, seconds: float, tokens: int, *, drafted: bool) -> None:
        self.seconds[drafted] = FADE * self.seconds[drafted] + seconds
        self.tokens[drafted] = FADE * self.tokens[drafted] + tokens
        if drafted and self.seconds[1] * self.tokens[0] > self.seconds[0] * self.tokens[1] > 0:
            self.rest, self.seconds[1], self.tokens[1] = REST, 0.0, 0.0
