"""MedMCQA (Pal et al. 2022, arXiv:2203.14371): Indian medical entrance questions, four options.

Reads its JSON lines (`dev.json`) or `openlifescienceai/medmcqa` on the hub. The answer index `cop` counts from 1 in
the published files and from 0 on the hub: any 4 means from 1, any 0 from 0, and the task's settings say which. A file
that holds neither or both is refused.
"""

from functools import partial
from typing import Any

from medlora.errors import DataError
from medlora.evaluate.tasks.base import Choice, Row, Task, choice_task, index_of, lettered, rows_of, text_of

HUB, SPLIT = "openlifescienceai/medmcqa", "validation"
LETTERS = ("A", "B", "C", "D")


def load(source: str | None, few_shot: int, limit: int | None) -> Task:
    found = rows_of(source, HUB, SPLIT)
    first = first_index(found[0], [row.get("cop") for _, row in found[1]])
    note = f"answer index counts from {first}"
    return choice_task("medmcqa", found, partial(_item, first), few_shot, limit, notes=note)


def first_index(source: str, answers: list[Any]) -> int:
    """0 or 1: what the answer index counts from.

    Raises:
        DataError: indices of both kinds, or of neither.
    """
    seen = {answer for answer in answers if isinstance(answer, int)}
    if 4 in seen and 0 in seen:
        raise DataError(
            f"{source}: the answer index `cop` is 0 in some rows and 4 in others; it counts from 0 or from 1"
        )
    if not seen & {0, 4}:
        raise DataError(f"{source}: `cop` never is 0 or 4, so whether it counts from 0 or 1 is unknown; add rows")
    return 1 if 4 in seen else 0


def _item(first: int, where: str, row: Row) -> Choice:
    texts = tuple(str(row.get(name)) for name in ("opa", "opb", "opc", "opd"))
    if any(name not in row for name in ("opa", "opb", "opc", "opd")):
        raise DataError(f"{where}: no fields opa, opb, opc, opd; this is not MedMCQA's format")
    given = row.get("cop")
    if not isinstance(given, int) or not first <= given < first + 4:
        raise DataError(f"{where}: the answer index `cop` is {given!r}; it must be {first} to {first + 3}")
    question = str(row["question"]) if text_of(where, row, "question") else ""
    prompt = f"Question: {question}\nChoices:\n{lettered(texts)}\nAnswer:"
    group = {"subject": str(row["subject_name"])} if row.get("subject_name") else {}
    identity = str(row.get("id") or where.rpartition(":")[2])
    return Choice(identity, question, texts, index_of(where, given - first, 4), group, prompt, LETTERS)
