"""Your own multiple choice: JSON lines (also .gz), one question a line.

    {"question": "...", "options": ["...", "...", ...], "answer": 0, "id": "...", "group": {"topic": "..."}}

`answer` is an index from 0 or a letter; `id` (default: the line) and `group` may be left out; two options or more. The
options' texts are scored, which is where `acc_norm`, the likelihood a character, differs from `acc`.
"""

from medlora.errors import DataError
from medlora.evaluate.tasks.base import LETTERS, Choice, Row, Task, choice_task, index_of, rows_of, text_of


def load(source: str | None, few_shot: int, limit: int | None) -> Task:
    if source is None:
        raise DataError("choices: give a file of questions with --data choices=FILE.jsonl")
    return choice_task("choices", rows_of(source, source, "test"), item, few_shot, limit)


def item(where: str, row: Row) -> Choice:
    """A row of the format above. Raises DataError naming what is wrong with it."""
    question, options = text_of(where, row, "question"), row.get("options")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"{where}: `options` must be a list of two texts or more")
    if not all(isinstance(text, str) and text.strip() for text in options):
        raise DataError(f"{where}: `options` holds something that is not text")
    texts = tuple(text.strip() for text in options)
    answer = index_of(where, row.get("answer"), len(texts))
    group = row.get("group", {})
    if not isinstance(group, dict):
        raise DataError(f'{where}: `group` must be an object such as {{"topic": "Gout"}}')
    identity = str(row.get("id", where.rpartition(":")[2]))
    named = {str(key): str(value) for key, value in group.items()}
    return Choice(identity, question, texts, answer, named, f"Question: {question}\nAnswer:", texts)
