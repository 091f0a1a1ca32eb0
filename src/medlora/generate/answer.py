"""Questions in, answers out: one loaded base that answers with its adapter and without.

The template and the end tokens are those that lie beside the adapter; nothing here knows another. LLaMA-family models
decode through `Engine`; others through Transformers' own forward pass, one answer after the other.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medlora.data.prompts import Tokenizer, prepare_tokenizer, prompt_ids
from medlora.errors import ModelError, RecipeError
from medlora.generate.constrain import Grammars
from medlora.generate.engine import Engine
from medlora.generate.request import Request, Token
from medlora.generate.sampling import Sampler, Sampling, log_probabilities
from medlora.generate.text import Text
from medlora.generate.weights import Unknown
from medlora.model.adapter import base_of, load_adapter, own_tokenizer
from medlora.model.base import load_tokenizer, resolve
from medlora.model.load import load_model
from medlora.recipe import Base, Prompt

NOTICE = "Not medical advice: a language model wrote this and can be wrong."
Messages = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    tokens: int
    seconds: float
    """From the call to this answer's end; answers of one call overlap."""
    finished: bool
    """True where the model ended by itself or at a stop string; False where the length limit cut it."""
    logprobs: tuple[Token, ...] = ()
    """Every token with its log-probabilities, where the settings ask for them."""


class Assistant:
    """One loaded base that answers untuned and, where an adapter is on it, tuned."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.has_adapter = hasattr(model, "disable_adapter")

    @classmethod
    def load(cls, adapter: Path | None = None, base: Base | None = None, prompt: Prompt | None = None) -> "Assistant":
        """From an adapter folder (its base is known), or an untuned base.

        Args:
            prompt: the chat template, where neither the adapter nor the base brings one.

        Raises:
            ModelError: as `resolve`, `load_model` and `load_adapter`.
            RecipeError: there is no chat template, or `prompt` is for an adapter that was trained with one.
        """
        base = base or base_of(adapter)
        resolved = resolve(base)
        own = own_tokenizer(adapter)
        tokenizer = load_tokenizer(resolved, own)
        if not own or not tokenizer.chat_template:
            tokenizer = prepare_tokenizer(tokenizer, prompt or Prompt())
        elif prompt:
            raise RecipeError(f"{adapter}: it answers by the chat template it was trained with; leave out --template")
        model = load_model(resolved, base).eval()
        return cls(load_adapter(model, adapter, resolved) if adapter else model, tokenizer)

    @property
    def slow(self) -> str | None:
        """Why this model decodes through Transformers, or None."""
        return self.engine if isinstance(self.engine, str) else None

    def stream(self, messages: Messages, settings: Sampling, *, tuned: bool = True) -> Iterator[str]:
        """Pieces of the answer's text, as they are decoded.

        Raises:
            ModelError: the conversation leaves no room in the model's context.
            RecipeError: a JSON schema or regex that cannot be used.
        """
        asked = self.request(messages, settings, tuned)
        for token in self.tokens([asked]):
            piece = asked.text.piece(last=token.last)
            if piece:
                yield piece

    def answer(self, messages: Messages, settings: Sampling, *, tuned: bool = True) -> Answer:
        """The whole answer at once. Raises as `stream`."""
        return self.answer_many([messages], settings, tuned=tuned)[0]

    def ask(self, question: str, settings: Sampling, *, tuned: bool = True) -> Answer:
        return self.answer([("user", question)], settings, tuned=tuned)

    def answer_many(self, conversations: Sequence[Messages], settings: Sampling, *, tuned: bool = True) -> list[Answer]:
        """The answers to many conversations, decoded together; on a GPU but for rounding what each would be alone.

        Raises:
            ModelError, RecipeError: as `stream`, for any of them.
        """
        started = time.monotonic()
        asked = [self.request(messages, settings, tuned) for messages in conversations]
        tokens: list[list[Token]] = [[] for _ in asked]
        seconds = [0.0] * len(asked)
        for token in self.tokens(asked):
            tokens[token.request].append(token)
            seconds[token.request] = time.monotonic() - started
        return [
            Answer(
                one.text.final(),
                len(found),
                took,
                bool(found) and found[-1].ended,
                tuple(found) if settings.logprobs is not None else (),
            )
            for one, found, took in zip(asked, tokens, seconds, strict=True)
        ]

    def release(self) -> None:
        """Free what decoding holds, keys and values above all; the next question takes it again."""
        self.__dict__.pop("engine", None)

    def request(self, messages: Messages, settings: Sampling, tuned: bool) -> "Asked":
        """A conversation ready to be decoded, with the text that its answer will be. Raises as `stream`."""
        prompt = prompt_ids(self.tokenizer, messages)
        context: int = self.model.config.max_position_embeddings
        limit: int = min(settings.max_length or context, context)
        if len(prompt) >= limit:
            raise ModelError(
                f"the conversation has {len(prompt)} tokens and the limit is {limit}; shorten or /reset it"
            )
        text = Text(self.tokenizer, settings.stop)
        adapter = self.model.active_adapter if self.has_adapter and tuned else None
        grammar = self._grammars.grammar(settings) if settings.json_schema or settings.regex else None
        return Asked(text, Request(prompt, settings, adapter, self._ends, text.ends_with, grammar))

    @cached_property
    def _ends(self) -> frozenset[int]:
        configured = self.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        return frozenset({self.tokenizer.eos_token_id, *ends} - {None})

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.model.config.vocab_size, self._ends)

    @cached_property
    def engine(self) -> Engine | str:
        """Made at the first question, since a model that is only trained needs none; or why there is none."""
        try:
            return Engine(self.model)
        except Unknown as reason:
            return str(reason)

    def tokens(self, asked: Sequence["Asked"]) -> Iterator[Token]:
        """Tokens of all, as they come. Raises ModelError as `Engine.stream`."""
        requests = [one.request for one in asked]
        if isinstance(self.engine, Engine):
            yield from self.engine.stream(requests)
            return
        for index, request in enumerate(requests):
            yield from self._through_transformers(index, request)

    def _through_transformers(self, index: int, request: Request) -> Iterator[Token]:
        device, settings = self.model.device, request.settings
        sampler = Sampler(settings, device)
        ids = torch.tensor([list(request.ids)], device=device)
        context: int = min(self.model.config.max_position_embeddings, settings.max_length or 2**62)
        room = min(settings.max_new_tokens, context - len(request.ids))
        fed, cache, tokens = ids, None, list[int]()
        with self.model.disable_adapter() if self.has_adapter and request.adapter is None else nullcontext():
            while len(tokens) < room:
                with torch.inference_mode():  # left before each yield: it must not reach the caller
                    out = self.model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    logits = out.logits[:, -1].float()
                    allowed = request.constraint.allowed() if request.constraint else None
                    tokens.append(sampler(ids, logits, allowed))
                    report = _report(logits, tokens[-1], settings.logprobs)
                cache = out.past_key_values
                ended = request.ended(tokens)
                yield Token(index, tokens[-1], ended or len(tokens) == room, ended, *report)
                if ended:
                    return
                fed = torch.tensor([tokens[-1:]], device=device)
                ids = torch.cat([ids, fed], 1)


@dataclass(frozen=True, slots=True)
class Asked:
    text: Text
    """Of the answer; it takes every token but an end token as `request.ended` is asked."""
    request: Request


def _report(logits: Tensor, token: int, likeliest: int | None) -> tuple[Any, ...]:
    if likeliest is None:
        return ()
    chosen, values, order = log_probabilities(logits, torch.tensor([token], device=logits.device), likeliest)
    return float(chosen), tuple(zip(order[0].tolist(), values[0].tolist(), strict=True))
