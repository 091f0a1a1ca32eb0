"""Log-likelihoods of continuations, with the prefix that the options of a question share computed once.

A request is one flat sequence: the prefix, then a branch for each option. A branch sees the prefix and itself, never
another branch, and its positions go on where the prefix ends, so every token gets the hidden state that it has in
prefix + option alone. Requests stand side by side in a row without padding, and the output head is applied only
where something is predicted: for a one-token option, to one hidden state a question.

    ids        p0 p1 p2 | a0 a1 | b0        the last token of an option is predicted, never fed
    positions  0  1  2    3  4    3

Tokens are split as lm-evaluation-harness splits them, so that scores are equal: the continuation is what
tokenize(prompt + continuation) has beyond the length of tokenize(prompt).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medlora.data.prompts import IGNORE, Example, Tokenizer, takes_special_tokens
from medlora.model.packed import autocast_of, causal_of, packing, unsupported

ATTENTION = "medlora_shared_prefix"
TOKENS_PER_ROW = 2048
LOGIT_ROWS = 128  # rows of logits held at once


@dataclass(frozen=True, slots=True)
class Request:
    ids: list[int]
    """The prefix, then every branch."""
    prefix: int
    """Tokens of the prefix."""
    branches: list[int]
    """Tokens that each branch feeds; may be 0."""
    targets: list[list[tuple[int, int]]]
    """For each score: (index into `ids` of the token that predicts, predicted token id)."""
    cut: int = 0
    """Tokens that were cut off the prefix's left end to fit the context."""


def choice_request(tokenizer: Tokenizer, prompt: str, continuations: Sequence[str], context: int) -> Request:
    """A question with its options.

    A prompt that leaves no room for the longest option in `context` tokens loses its left end, as in
    lm-evaluation-harness; `cut` says how much.
    """
    pairs = [_split(tokenizer, prompt, continuation) for continuation in continuations]
    prefix, options = pairs[0][0], [option for _, option in pairs]
    cut = max(0, len(prefix) + max(map(len, options)) - 1 - context)
    prefix = prefix[cut:]
    ids, branches, targets = list(prefix), [], []
    for option in options:
        fed = [len(prefix) - 1, *range(len(ids), len(ids) + len(option) - 1)]
        targets.append(list(zip(fed, option, strict=True)))
        ids += option[:-1]
        branches.append(len(option) - 1)
    return Request(ids, len(prefix), branches, targets, cut)


def loss_request(example: Example) -> Request:
    """A row, scored once: the sum over its labelled tokens."""
    pairs = [(i - 1, label) for i, label in enumerate(example.labels) if label != IGNORE]
    return Request(example.input_ids[:-1], len(example.input_ids) - 1, [], [pairs])


def _split(tokenizer: Tokenizer, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    stripped = prompt.rstrip()
    continuation, prompt = prompt[len(stripped) :] + continuation, stripped
    special = takes_special_tokens(tokenizer, prompt)
    prefix = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    whole = list(tokenizer(prompt + continuation, add_special_tokens=special)["input_ids"])
    return prefix, whole[len(prefix) :]


def score(model: Any, requests: Sequence[Request], tokens: int = TOKENS_PER_ROW) -> Iterator[list[list[float]]]:
    """Summed log-likelihoods (nats) of each request's targets; otherwise as `predict`."""
    for batch in predict(model, requests, tokens):
        yield [[sum(value for value, _ in target) for target in targets] for targets in batch]


@torch.no_grad()
def predict(
    model: Any, requests: Sequence[Request], tokens: int = TOKENS_PER_ROW
) -> Iterator[list[list[list[tuple[float, bool]]]]]:
    """Each token of each request's targets: (log-likelihood in nats, whether no other token is likelier); a batch of
    requests at a time, in order.

    Models that cannot take packed rows are scored option by option.

    Args:
        model: a causal LM or a `PeftModel` of one, in evaluation mode.
        tokens: how many tokens a batch may have; a longer request is a batch of its own.
    """
    longest = max((len(request.ids) for request in requests), default=0)
    plain = unsupported(model, longest)
    hidden_of: Callable[[Any, list[Request]], Tensor] = _plain_hidden if plain else _packed_hidden
    for batch in _batches(requests, tokens):
        with nullcontext() if plain else _sharing(model):  # not across a yield: it must not reach the caller
            found = _predicted(model, hidden_of(model, batch), batch)
        yield found


def _batches(requests: Sequence[Request], tokens: int) -> Iterator[list[Request]]:
    batch: list[Request] = []
    held = 0
    for request in requests:
        if batch and held + len(request.ids) > tokens:
            yield batch
            batch, held = [], 0
        batch.append(request)
        held += len(request.ids)
    if batch:
        yield batch


def _packed_hidden(model: Any, batch: list[Request]) -> Tensor:
    """[T, D] last hidden states of all requests, one after the other."""
    causal = causal_of(model)
    device = causal.lm_head.weight.device
    ids = torch.tensor([[i for request in batch for i in request.ids]], device=device)
    positions = torch.cat([_positions(request) for request in batch])[None].to(device)
    masks = [_branch_mask(request).to(device) for request in batch]
    with autocast_of(causal.lm_head.weight):
        out = causal.model(
            input_ids=ids, position_ids=positions, use_cache=False, requests=batch, branch_masks=masks
        )  # fmt: skip
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def _plain_hidden(model: Any, batch: list[Request]) -> Tensor:
    """The same, a branch at a time through the model's own attention."""
    causal = causal_of(model)
    rows = []
    for request in batch:
        ids = torch.tensor(request.ids, device=model.device)
        prefix, tails = ids[: request.prefix], ids[request.prefix :].split_with_sizes(request.branches)
        hidden = [causal.model(input_ids=prefix[None], use_cache=False).last_hidden_state[0]]
        for tail in filter(len, tails):
            row = torch.cat([prefix, tail])[None]
            hidden.append(causal.model(input_ids=row, use_cache=False).last_hidden_state[0, request.prefix :])
        rows.append(torch.cat(hidden))
    return torch.cat(rows)


def _predicted(model: Any, hidden_TD: Tensor, batch: list[Request]) -> list[list[list[tuple[float, bool]]]]:
    """The head where something is predicted, once a place, whatever the number of options that begin there."""
    head = causal_of(model).lm_head
    start, wanted = 0, []
    for request in batch:
        wanted += [(start + place, token) for target in request.targets for place, token in target]
        start += len(request.ids)
    places = sorted({place for place, _ in wanted})
    row_of = {place: row for row, place in enumerate(places)}
    chosen = [(0.0, False)] * len(wanted)
    for first in range(0, len(places), LOGIT_ROWS):
        last = min(first + LOGIT_ROWS, len(places))
        logits = head(hidden_TD[places[first:last]].to(head.weight.dtype)).float()
        log_z = logits.logsumexp(-1)
        inside = [i for i, (place, _) in enumerate(wanted) if first <= row_of[place] < last]
        rows = torch.tensor([row_of[wanted[i][0]] - first for i in inside], device=logits.device)
        tokens = torch.tensor([wanted[i][1] for i in inside], device=logits.device)
        values = logits[rows, tokens]
        likeliest = values == logits.amax(-1)[rows]
        for i, *found in zip(inside, (values - log_z[rows]).tolist(), likeliest.tolist(), strict=True):
            chosen[i] = (found[0], found[1])
    left = iter(chosen)
    return [[[next(left) for _ in target] for target in request.targets] for request in batch]


def _positions(request: Request) -> Tensor:
    starts = [torch.arange(request.prefix)]
    return torch.cat(starts + [torch.arange(request.prefix, request.prefix + n) for n in request.branches])


def _branch_mask(request: Request) -> Tensor:
    """[branch tokens, all tokens] bool: a branch token sees the prefix and its own branch up to itself."""
    total = sum(request.branches)
    branch = torch.repeat_interleave(
        torch.arange(len(request.branches)), torch.tensor(request.branches, dtype=torch.int64)
    )
    own = (branch[:, None] == branch[None]).tril()
    return torch.cat([torch.ones(total, request.prefix, dtype=torch.bool), own], 1)


@contextmanager
def _sharing(model: Any) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    with packing(model, fuse=False):  # puts the attention back at its end
        model.config._attn_implementation = ATTENTION
        yield


def _attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float,
    requests: list[Request], branch_masks: list[Tensor], **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Transformers' attention interface: q [1, H, T, C], k, v [1, K, T, C] -> [1, T, H, C]."""
    parts, start = [], 0
    for request, seen in zip(requests, branch_masks, strict=True):
        middle, stop = start + request.prefix, start + len(request.ids)
        before, whole = slice(start, middle), slice(start, stop)
        parts.append(F.scaled_dot_product_attention(
            q[:, :, before], k[:, :, before], v[:, :, before], is_causal=True, scale=scaling, enable_gqa=True
        ))  # fmt: skip
        if stop > middle:
            parts.append(F.scaled_dot_product_attention(
                q[:, :, middle:stop], k[:, :, whole], v[:, :, whole], attn_mask=seen, scale=scaling, enable_gqa=True
            ))  # fmt: skip
        start = stop
    return torch.cat(parts, 2).transpose(1, 2), None
