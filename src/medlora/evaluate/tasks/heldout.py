"""The run's own held-out rows: their loss, perplexity and bits per byte, and the answers to their questions.

The rows are those that training held out (the recipe's `valid_path`, or its pinned split), or a file given with
`--data` in the recipe's columns. Each is grouped by topic and question type where the rows name them.
"""

from pathlib import Path

from medlora.data.build import read_records
from medlora.data.sources import TERMS, Record, load, raw_rows
from medlora.errors import DataError
from medlora.evaluate.tasks.base import Passage, Task, make_task
from medlora.recipe import EMBEDDED, Recipe

GROUPS = {"qtype": "qtype", "category": "category", "focus": "topic"}  # column -> group


def load_loss(recipe: Recipe, source: str | None, limit: int | None) -> Task:
    """Kind `loss`. Raises DataError where the run held nothing out."""
    data = recipe.data
    passages, name = _held_out(recipe, source)
    rule = {"max_length": data.max_length, "on_long_row": data.on_long_row, "loss_on": recipe.prompt.loss_on}
    return make_task("heldout", "loss", passages, name, limit, rows=rule)


def load_answers(recipe: Recipe, source: str | None, limit: int | None) -> Task:
    """Kind `answer`: rows with a question and one answer. Raises DataError where there are none."""
    passages, name = _held_out(recipe, source)
    asked = [passage for passage in passages if len(passage.record.messages) >= 2]
    if not asked:
        raise DataError(f"{name}: answers: the rows are plain text; there is no question to ask")
    generation = recipe.generation.model_dump(exclude={"prompts"})
    return make_task("answers", "answer", asked, name, limit, generation=generation)


def _held_out(recipe: Recipe, source: str | None) -> tuple[list[Passage], str]:
    name = source or recipe.data.valid_path or recipe.data.path
    records = load(recipe.data, source).records if source else read_records(recipe).valid
    if not records:
        raise DataError(
            f"{name}: the run held no rows out; give some with --data heldout=FILE, in the recipe's columns"
        )
    rows = {raw.where: raw.row or {} for raw in raw_rows(name, recipe.data)}
    grouped = bool(recipe.data.group)
    return [Passage(row_id(r.where, name), r, _group(r, rows.get(r.where, {}), grouped)) for r in records], name


def row_id(where: str, source: str) -> str:
    """Where the row stands, inside the file or folder."""
    root = str(TERMS if source == EMBEDDED else Path(source).expanduser())
    return where.removeprefix(root).lstrip("/:") if where.startswith(root) else where


def _group(record: Record, row: dict[str, object], grouped: bool) -> dict[str, str]:
    found = {group: str(row[column]) for column, group in GROUPS.items() if row.get(column)}
    return found | ({"topic": record.group} if grouped else {})
