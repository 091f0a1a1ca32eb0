"""What a medical tuning may cost elsewhere: general paragraphs and general questions (card: ../general/README.md)."""

from pathlib import Path

from medlora.data.sources import Record
from medlora.evaluate.tasks import choices
from medlora.evaluate.tasks.base import Task, Text, choice_task, make_task, read_rows, text_of

FOLDER = Path(__file__).parents[1] / "general"
TEXTS, QUESTIONS = FOLDER / "paragraphs.jsonl", FOLDER / "questions.jsonl"


def load_text(source: str | None, limit: int | None) -> Task:
    """Kind `loss`, over every token of each paragraph (`{"id", "text", "topic"}` a line)."""
    rows = read_rows(Path(source or TEXTS).expanduser())
    texts = [
        Text(str(row.get("id", where.rpartition(":")[2])), Record(where, text_of(where, row, "text"), (), ""))
        for where, row in rows
    ]
    return make_task("general_text", "loss", texts, source or "embedded", limit)


def load_questions(source: str | None, few_shot: int, limit: int | None) -> Task:
    """Kind `choice`, in the format of `choices`."""
    rows = read_rows(Path(source or QUESTIONS).expanduser())
    return choice_task("general_questions", (source or "embedded", rows), choices.item, few_shot, limit)
