"""Turn records into token ids and labels, through one mechanism: the tokenizer's chat template.

The recipe's template (and system prompt) is written into the tokenizer, and the tokenizer is saved with the
adapter. Training, asking, chat and any other tool that reads the adapter therefore build the same prompt.

Which tokens are trained is decided by length, never by token id, so the end token is trained even where it is also
the padding token: the prompt's ids are a prefix of the whole row's ids, and what follows them is the answer.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medlora.data.sources import Record
from medlora.errors import DataError, RecipeError
from medlora.recipe import Prompt

BATCH = 1000  # records that are tokenized at once
IGNORE = -100  # the label that cross-entropy leaves out
LLAMA2 = (Path(__file__).parent / "llama2.jinja").read_text(encoding="utf-8")
_LLAMA2_TURN = re.compile(r"\[INST\](.*?)\[/INST\](.*?)(?=<s>|\[INST\]|$)", re.DOTALL)
Text = tuple[str, bool]  # and whether special tokens are to be added
Tokenizer = Any  # PreTrainedTokenizerBase; Transformers is imported late


@dataclass(frozen=True, slots=True)
class Example:
    """One row for the model. `labels[i]` is `input_ids[i]` where it is trained, else -100; `labels[0]` is -100
    always, since nothing predicts the first token."""

    where: str
    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE)


def prepare_tokenizer(tokenizer: Tokenizer, prompt: Prompt) -> Tokenizer:
    """Write the recipe's template into the tokenizer; pad with the end token, on the right.

    Raises:
        RecipeError: `template: base`, but the base has no chat template.
    """
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    template = LLAMA2 if prompt.template == "llama2" else tokenizer.chat_template
    if not template:
        raise RecipeError(
            "prompt.template: the base has no chat template of its own; set prompt.template=llama2, or ask with "
            "--template llama2"
        )
    if prompt.system:
        head = "{%- if messages[0]['role'] != 'system' -%}{%- set messages = [{'role': 'system', 'content': "
        template = head + repr(prompt.system) + "}] + messages -%}{%- endif -%}" + template
    tokenizer.chat_template = template
    return tokenizer


def render(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]], *, ask: bool) -> str:
    """The conversation as text; with `ask`, up to where the assistant begins to speak."""
    turns = [{"role": role, "content": content} for role, content in messages]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    return text


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of the conversation, ready for the assistant's answer."""
    return list(tokenizer(render(tokenizer, messages, ask=True), add_special_tokens=False)["input_ids"])


def encode(tokenizer: Tokenizer, records: Sequence[Record], prompt: Prompt) -> list[Example]:
    """One `Example` a record, in order.

    Raises:
        DataError: a raw text whose answer is not marked, with `loss_on: completion`; or a conversation that the
            template cannot hold.
    """
    return [
        example
        for start in range(0, len(records), BATCH)
        for example in _encode(tokenizer, records[start : start + BATCH], prompt)
    ]


def _encode(tokenizer: Tokenizer, records: Sequence[Record], prompt: Prompt) -> Iterator[Example]:
    turns = [_turns(tokenizer, record, prompt) for record in records]
    ids = _token_ids(tokenizer, [text for each in turns for turn in each for text in turn])
    for record, each in zip(records, turns, strict=True):
        row: list[int] = []
        spans: list[tuple[int, int]] = []
        for (asked, _), (told, _) in each:
            before, row = next(ids), next(ids)
            if row[: len(before)] != before:  # a merge across the border: tokenise as generation will see it
                row = before + list(tokenizer(told.removeprefix(asked), add_special_tokens=False)["input_ids"])
            spans.append((len(before), len(row)))
        spans = [(0, len(row))] if prompt.loss_on == "all" else spans
        yield _example(record.where, row, spans, tokenizer.eos_token_id)


def takes_special_tokens(tokenizer: Tokenizer, text: str) -> bool:
    """Never two BOS: one that the text begins with is enough."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def _token_ids(tokenizer: Tokenizer, texts: Sequence[Text]) -> Iterator[list[int]]:
    """All at once, which the tokenizer spreads over the cores."""

    def together(special: bool) -> Iterator[list[int]]:
        chosen = [text for text, each in texts if each == special]
        if not chosen:
            return iter(())
        fast = getattr(tokenizer, "backend_tokenizer", None)
        if fast is None:
            return iter(tokenizer(chosen, add_special_tokens=special)["input_ids"])
        tokenizer(chosen[:1], add_special_tokens=special)  # sets the fast one up: neither cut nor padded
        # without where each token lies and what else nobody asks for
        return (found.ids for found in fast.encode_batch_fast(chosen, add_special_tokens=special))

    ids = {special: together(special) for special in (False, True)}
    return (next(ids[special]) for _, special in texts)


def _turns(tokenizer: Tokenizer, record: Record, prompt: Prompt) -> list[tuple[Text, Text]]:
    """For each answer the text before it and with it; of a raw text that is learned whole, nothing and all of it."""
    from jinja2 import TemplateError

    if record.text is not None and prompt.loss_on == "all":
        return [(("", False), (record.text, takes_special_tokens(tokenizer, record.text)))]
    messages = record.messages if record.text is None else _marked(record)
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    try:
        return [
            (
                (render(tokenizer, messages[:i], ask=True), False),
                (render(tokenizer, messages[: i + 1], ask=False), False),
            )
            for i in answers
        ]
    except TemplateError as error:
        raise DataError(f"{record.where}: {error.message}") from None


def _marked(record: Record) -> tuple[tuple[str, str], ...]:
    """The conversation that a raw text in Llama 2's form marks."""
    turns = [
        (ask.strip(), answer.replace("</s>", "").strip()) for ask, answer in _LLAMA2_TURN.findall(record.text or "")
    ]
    if not turns:
        raise DataError(
            f"{record.where}: prompt.loss_on is `completion`, but the text marks no answer ([INST] ... [/INST]); "
            "set prompt.loss_on=all, or name data.columns.prompt and data.columns.completion"
        )
    return tuple(pair for ask, answer in turns for pair in (("user", ask), ("assistant", answer)))


def _example(where: str, ids: list[int], spans: list[tuple[int, int]], eos: int) -> Example:
    """Train the spans up to their last end token; what a template writes after it (a newline) is never asked for."""
    labels = [IGNORE] * len(ids)
    for start, stop in spans:
        stop = _after_last(eos, ids, start, stop) or stop
        labels[start:stop] = ids[start:stop]
    last = _after_last(eos, labels, 0, len(ids))
    if last:
        ids, labels = ids[:last], labels[:last]
    else:
        ids, labels = [*ids, eos], [*labels, eos]
    labels[0] = IGNORE
    return Example(where, ids, labels)


def _after_last(value: int, items: list[int], start: int, stop: int) -> int:
    """The place behind the last of these values between `start` and `stop`, or 0."""
    backwards = items[start:stop][::-1]
    return stop - backwards.index(value) if value in backwards else 0


@dataclass(frozen=True, slots=True)
class Fitted:
    examples: list[Example]
    long: int
    """Rows that were longer than `max_length` and were dropped, split or truncated."""


def fit(examples: Sequence[Example], max_length: int, policy: Literal["drop", "split", "truncate", "error"]) -> Fitted:
    """Bring every row to at most `max_length` tokens.

    `split` cuts the answer into pieces and repeats the prompt before each; a row without a prompt is cut into
    windows. `truncate` cuts the end off.

    Raises:
        DataError: a long row with `error`, or no row left with something to train.
    """
    long = [example for example in examples if len(example.input_ids) > max_length]
    if long and policy == "error":
        raise DataError(
            f"{long[0].where}: {len(long[0].input_ids)} tokens, more than data.max_length ({max_length}); {len(long)} "
            "such rows; raise data.max_length or set data.on_long_row to drop, split or truncate"
        )
    kept = [piece for example in examples for piece in _pieces(example, max_length, policy)]
    trained = [example for example in kept if example.trained]
    if not trained:
        rows = ", ".join(example.where for example in list(examples)[:3])
        why = "are longer than" if not kept else "have no answer token left to train on within"
        raise DataError(
            f"all {len(examples)} rows {why} data.max_length ({max_length}): {rows}{', ...' * (len(examples) > 3)}; "
            "raise data.max_length or set data.on_long_row=split"
        )
    return Fitted(trained, len(long) + len(kept) - len(trained))


def _pieces(example: Example, size: int, policy: str) -> list[Example]:
    ids, labels = example.input_ids, example.labels
    if len(ids) <= size:
        return [example]
    if policy == "drop":
        return []
    if policy == "truncate":
        return [Example(example.where, ids[:size], labels[:size])]
    start = next((i for i, label in enumerate(labels) if label != IGNORE), 0)
    start = start if start > 1 else 0  # loss on everything: there is no prompt to repeat
    room = size - start
    if room < 1:
        return []
    return [
        Example(
            example.where,
            ids[:start] + ids[i : i + room],
            _unpredicted(labels[:start] + labels[i : i + room]),
        )
        for i in range(start, len(ids), room)
    ]


def _unpredicted(labels: list[int]) -> list[int]:
    return [IGNORE, *labels[1:]]
