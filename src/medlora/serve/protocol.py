"""Chat completions as OpenAI's clients ask for them and read them.

A field that is not known here is refused rather than ignored: who asks for tools or two answers should hear that there
are none. Sampling fields that OpenAI does not have (`top_k`, `min_p`, `repetition_penalty`) are named as in vLLM.
"""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medlora.data.prompts import Tokenizer
from medlora.generate.request import Token
from medlora.generate.sampling import Sampling


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Schema(_Strict):
    name: str = ""
    description: str | None = None
    strict: bool | None = None
    """As written: an answer always keeps its schema."""
    schema_: dict[str, Any] = Field(alias="schema")


class Format(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class Chat(_Strict):
    """A request; `user` and `metadata` are taken and not read."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Format = Format(type="text")
    n: Literal[1] = 1
    user: str | None = None
    metadata: dict[str, Any] | None = None

    def settings(self) -> Sampling:
        """What is not given is as `medlora ask` has it."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return Sampling().override(
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, seed=self.seed, stop=tuple(stop) if stop else None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None, json_schema=self._schema(),
        )  # fmt: skip

    def _schema(self) -> str | None:
        if self.response_format.json_schema:
            return json.dumps(self.response_format.json_schema.schema_)
        return '{"type": "object"}' if self.response_format.type == "json_object" else None

    def conversation(self) -> list[tuple[str, str]]:
        return [(message.role, message.text) for message in self.messages]


class Reply:
    """Writes an answer to one request, whole or in pieces."""

    def __init__(self, model: str, prompt_tokens: int, tokenizer: Tokenizer) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.prompt_tokens, self.tokenizer = prompt_tokens, tokenizer

    def whole(self, tokens: Sequence[Token], text: str) -> dict[str, Any]:
        choice = {
            "index": 0, "message": {"role": "assistant", "content": text.strip()},
            "finish_reason": _reason(tokens[-1]), "logprobs": self._logprobs(tokens),
        }  # fmt: skip
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage(len(tokens))}

    def piece(self, token: Token, text: str, *, first: bool) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | {"content": text.lstrip() if first else text}
        choice = {
            "index": 0, "delta": delta, "logprobs": self._logprobs([token]),
            "finish_reason": _reason(token) if token.last else None,
        }  # fmt: skip
        return self._chunk([choice])

    def end(self, tokens: int) -> dict[str, Any]:
        """The usage, where `stream_options` asks for it."""
        return self._chunk([]) | {"usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": choices}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if tokens[0].logprob is None:
            return None
        return {
            "content": [
                self._told(t.id, t.logprob or 0.0) | {"top_logprobs": [self._told(i, value) for i, value in t.top]}
                for t in tokens
            ]
        }

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _reason(token: Token) -> str:
    return "stop" if token.ended else "length"
