"""Answers that must match a JSON schema or a regular expression, through llguidance.

The grammar knows before each token which tokens keep the answer matchable; the others get probability zero.
"""

from typing import Any

import torch
from torch import Tensor

from medlora.data.prompts import Tokenizer
from medlora.errors import RecipeError
from medlora.generate.sampling import Sampling

# json.dumps's; where any space is allowed, a small model can go on with spaces for ever
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """One answer's way through a grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self.matcher, self.vocabulary = matcher, vocabulary

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [V]."""
        packed = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        return bits.flatten()[: self.vocabulary].bool()

    def accept(self, token: int) -> bool:
        """Take a chosen token; whether nothing can follow it."""
        self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped())


class Grammars:
    """Makes grammars for one tokenizer.

    Args:
        vocabulary: V, the model's, which may have more tokens than the tokenizer.
        ends: the tokens that end an answer.

    Raises:
        RecipeError: llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: frozenset[int]) -> None:
        try:
            import llguidance.hf
        except ImportError:
            raise RecipeError("a JSON schema or regex needs llguidance; pip install 'medlora[constrained]'") from None
        self.vocabulary = vocabulary
        try:
            self.tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(ends))
        except (ValueError, AttributeError) as error:
            raise RecipeError(f"llguidance cannot read this base's tokenizer: {error}") from None

    def grammar(self, settings: Sampling) -> Grammar:
        """Of `settings.json_schema` or `settings.regex`.

        Raises:
            RecipeError: both are given, or the one given cannot be read.
        """
        from llguidance import LLMatcher

        if settings.json_schema and settings.regex:
            raise RecipeError("a JSON schema and a regex are given; an answer can follow one of them")
        kind = "JSON schema" if settings.json_schema else "regex"
        try:
            source = _source(settings)
            problem = LLMatcher.validate_grammar(source, self.tokenizer)
        except ValueError as error:  # the schema is not JSON
            problem = str(error)
        if problem:
            raise RecipeError(f"the {kind} cannot be used: {problem.splitlines()[0]}")
        return Grammar(LLMatcher(self.tokenizer, source), self.vocabulary)


def _source(settings: Sampling) -> str:
    from llguidance import LLMatcher

    if settings.json_schema:
        return LLMatcher.grammar_from_json_schema(settings.json_schema, overrides=LAYOUT)
    return LLMatcher.grammar_from_regex(settings.regex or "")
