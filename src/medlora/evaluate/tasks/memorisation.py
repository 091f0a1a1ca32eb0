"""Does the tuned model give away the rows that it was trained on?

Two signs, each beside rows of the same kind that were held out, since text may also be predicted because it is plain:

- word for word (extractable memorisation, Carlini et al. 2023, arXiv:2202.07646): after the question and the first HINT
  tokens of an answer, are the TARGET tokens that follow the likeliest, each of them? A shorter answer is not judged.
- membership: how well a row's gain, by how much its loss fell with the tuning, tells trained rows from held-out ones
  (`membership.py`).

Low figures do not show that nothing was memorised: other questions, or a longer beginning, may bring more out.
"""

from collections.abc import Sequence

from medlora.data.build import read_records
from medlora.data.sources import Record
from medlora.errors import DataError
from medlora.evaluate.metrics import TARGET
from medlora.evaluate.tasks.base import Passage, Task, make_task, spread
from medlora.evaluate.tasks.heldout import row_id
from medlora.recipe import Recipe

TRAINED, CONTROL = "memorisation", "memorisation_control"
ROWS = 100  # of each, one of a group at most
HINT = 16  # tokens of the answer


def load_trained(recipe: Recipe, source: str | None, limit: int | None) -> Task:
    """Kind `memory`: rows that were trained on, spread evenly."""
    records = read_records(recipe).train
    seen = min(1.0, recipe.training.max_steps * recipe.training.samples / len(records))
    note = "" if seen > 0.95 else f"the run saw only {seen:.0%} of its training rows; any of them may be asked"
    return _task(TRAINED, recipe, source, records, recipe.data.path, limit, note)


def load_control(recipe: Recipe, source: str | None, limit: int | None) -> Task:
    """The same of rows that were held out. Raises DataError where none were."""
    records = read_records(recipe).valid
    return _task(CONTROL, recipe, source, records, recipe.data.valid_path or recipe.data.path, limit, "")


def _task(
    name: str, recipe: Recipe, source: str | None, records: Sequence[Record], path: str, limit: int | None, note: str
) -> Task:
    if source:
        raise DataError(f"--data {name}={source}: its rows are those of the run; leave it out")
    independent = list({record.group: record for record in reversed(records)}.values())[::-1]  # the first of each group
    passages = [Passage(row_id(record.where, path), record) for record in spread(independent, ROWS)]
    rule = {"max_length": recipe.data.max_length, "hint": HINT, "target": TARGET}
    return make_task(name, "memory", passages, path, limit, rows=rule, **({"notes": note} if note else {}))
