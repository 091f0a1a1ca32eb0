"""Drafts may change how many passes an answer takes, and nothing else."""

from typing import Any

import pytest
import torch

from medlora.generate.decoder import Decoder
from medlora.generate.engine import Engine
from medlora.generate.request import Request
from medlora.generate.sampling import Sampling
from medlora.generate.speculative import REST, Lookup, Pace

REQUESTS = [
    Request([5, 6, 7, 8] * 9, Sampling(max_new_tokens=60)),
    Request([9, 4] * 20, Sampling(max_new_tokens=50, temperature=0.8, seed=2, logprobs=2), "all"),
    Request([9, 4, 3] * 20, Sampling(max_new_tokens=31, temperature=1.3, top_p=0.8, top_k=30, seed=7), "some"),
]
Found = list[list[tuple[int, bool, int]]]


def answers(model: Any, *, draft: bool, together: bool) -> Found:
    engine = Engine(model, draft=draft)
    calls = [REQUESTS] if together else [[request] for request in REQUESTS]
    found = [tokens for requests in calls for tokens in engine.generate(requests)]
    return [[(token.id, token.last, len(token.top)) for token in tokens] for tokens in found]


def test_rows_draft_again_when_a_penalised_one_has_left(toy_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lookup, "draft", lambda self, longest: [5, 6][:longest])
    requests = [Request([5, 6], Sampling(max_new_tokens=3, repetition_penalty=1.2)), REQUESTS[0]]
    found = [[token.id for token in row] for row in Engine(toy_model, draft=True).generate(requests)]
    assert found == [[token.id for token in row] for row in Engine(toy_model, draft=False).generate(requests)]


@pytest.mark.parametrize("together", [True, False])
def test_drafted_answers_equal_undrafted_ones_token_by_token(
    toy_model: Any, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """With drafts from an oracle that is wrong at every seventh place, so that both verdicts occur."""
    plain = answers(toy_model, draft=False, together=together)
    rows = [[*request.ids, *(token for token, *_ in row)] for request, row in zip(REQUESTS, plain, strict=True)]

    def oracle(self: Lookup, longest: int) -> list[int]:
        row = next(row for row in rows if row[: len(self.ids)] == self.ids)
        places = range(len(self.ids), min(len(self.ids) + longest, len(row)))
        return [row[i] if i % 7 else row[i] ^ 1 for i in places][:5]

    passes = list[int]()
    call = Decoder.__call__

    def counting(self: Decoder, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(len(tokens))
        return call(self, tokens, *rest)

    monkeypatch.setattr(Lookup, "draft", oracle)
    monkeypatch.setattr(Decoder, "__call__", counting)
    assert answers(toy_model, draft=True, together=together) == plain
    assert len(passes) < (60 if together else 141) / 2


def test_a_lookup_drafts_what_followed_the_longest_run_seen_last() -> None:
    lookup = Lookup([1, 2, 3, 4, 9, 2, 3, 5])
    assert lookup.draft(8) == []  # 3, 5 is new
    lookup.add([2, 3])
    assert lookup.draft(8) == [5, 2, 3]
    lookup.add([4])
    assert lookup.draft(2) == [9, 2]
    assert Lookup([7] * 30).draft(3) == [7]  # only what is there already


def test_drafting_rests_where_it_loses_time_and_goes_on_where_it_gains() -> None:
    pace = Pace()
    assert not pace.pays()
    assert pace.pays()
    pace.note(1.0, 1, drafted=False)
    pace.note(1.5, 2, drafted=True)
    assert pace.pays()
    pace.note(3.0, 1, drafted=True)
    assert [pace.pays() for _ in range(REST)] == [False] * (REST - 1) + [True]
