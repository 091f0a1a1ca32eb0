"""Decode with a key-value cache, token by token, streaming text as it becomes certain.

The template and the end tokens are those that lie beside the adapter; nothing here knows another.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medlora.data.prompts import Tokenizer, prepare_tokenizer, prompt_ids
from medlora.errors import ModelError
from medlora.generate.sampling import Sampler, Sampling
from medlora.model.adapter import base_of, load_adapter
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
    finished: bool
    """True where the model ended by itself; False where the length limit cut it."""


class Assistant:
    """One loaded base that answers untuned and, where an adapter is on it, tuned."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.has_adapter = hasattr(model, "disable_adapter")

    @classmethod
    def load(cls, adapter: Path | None = None, base: Base | None = None, prompt: Prompt | None = None) -> "Assistant":
        """From an adapter folder (its base is known), or an untuned base.

        Raises:
            ModelError: as `resolve`, `load_model` and `load_adapter`.
        """
        base = base or (base_of(adapter) if adapter else Base())
        resolved = resolve(base)
        tokenizer = load_tokenizer(resolved, adapter if adapter and (adapter / "tokenizer.json").is_file() else None)
        if adapter is None or not tokenizer.chat_template:
            tokenizer = prepare_tokenizer(tokenizer, prompt or Prompt())
        model = load_model(resolved, base).eval()
        return cls(load_adapter(model, adapter, resolved) if adapter else model, tokenizer)

    def stream(self, messages: Messages, settings: Sampling, *, tuned: bool = True) -> Iterator[str]:
        """Pieces of the answer's text, as they are decoded.

        Raises:
            ModelError: the conversation leaves no room in the model's context.
        """
        ids: list[int] = []
        shown = ""
        for token in self._tokens(messages, settings, tuned):
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("�"):  # an unfinished UTF-8 sequence
                yield text[len(shown) :]
                shown = text

    def answer(self, messages: Messages, settings: Sampling, *, tuned: bool = True) -> Answer:
        """The whole answer at once."""
        started = time.monotonic()
        ids = list(self._tokens(messages, settings, tuned))
        finished = bool(ids) and ids[-1] in self._ends()
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(text, len(ids), time.monotonic() - started, finished)

    def ask(self, question: str, settings: Sampling, *, tuned: bool = True) -> Answer:
        return self.answer([("user", question)], settings, tuned=tuned)

    def _ends(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        return {self.tokenizer.eos_token_id, *ends} - {None}

    def _tokens(self, messages: Messages, settings: Sampling, tuned: bool) -> Iterator[int]:
        prompt = prompt_ids(self.tokenizer, messages)
        room = self._room(len(prompt), settings)
        device = self.model.device
        sampler, ends = Sampler(settings, device), self._ends()
        ids = torch.tensor([prompt], device=device)
        fed, cache = ids, None
        with self.model.disable_adapter() if self.has_adapter and not tuned else nullcontext():
            for _ in range(room):
                with torch.inference_mode():  # left before each yield: it must not reach the caller
                    out = self.model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token = sampler(ids, out.logits[:, -1])
                cache = out.past_key_values
                yield token
                if token in ends:
                    return
                fed = torch.tensor([[token]], device=device)
                ids = torch.cat([ids, fed], 1)

    def _room(self, prompt: int, settings: Sampling) -> int:
        context: int = self.model.config.max_position_embeddings
        limit: int = min(settings.max_length or context, context)
        if prompt >= limit:
            raise ModelError(f"the conversation has {prompt} tokens and the limit is {limit}; shorten or /reset it")
        return min(settings.max_new_tokens, limit - prompt)
