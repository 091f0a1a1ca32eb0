"""Scoring by a generated letter: ask as a user would, read a letter off the answer; none found is wrong."""

import re
from collections.abc import Sequence

from medlora.evaluate.tasks.base import LETTERS, Choice, lettered

MAX_NEW_TOKENS = 24


def letter_prompt(item: Choice) -> str:
    """The question as one user message."""
    last = LETTERS[len(item.texts) - 1]
    return f"{item.question}\n\n{lettered(item.texts)}\n\nReply with the letter of the right answer only (A to {last})."


def parse_letter(answer: str, texts: Sequence[str]) -> int | None:
    """Index of the option that an answer names, or None.

    In this order: a letter that stands first and alone ("B", "(B)", "B.", "B: ..."), so never the article in "A
    patient"; one letter after "answer is", "answer:" or "option"; an answer that is an option's text.
    """
    text, letters = answer.strip(), LETTERS[: len(texts)]
    first = re.match(rf"[\"'*(\[]*([{letters}])(?:[)\].:,*\"']|\s*$|\s*\n)", text)
    if first:
        return letters.index(first[1])
    named = set(
        re.findall(
            rf"(?:\b[Aa]nswer(?:\s+is)?\s*:?|\b[Oo]ption)\s*\**\(?([{letters}])\b(?!\s+(?!or\b|and\b)[a-z])", text
        )
    )
    if len(named) == 1:
        return letters.index(named.pop())
    plain = [option.strip().rstrip(".").lower() for option in texts]
    said = text.rstrip(".").lower()
    return plain.index(said) if plain.count(said) == 1 else None
