"""The tasks, one file each: what is asked and what is right. Bad data is refused here, before a model loads."""

from medlora.errors import DataError
from medlora.evaluate.tasks import choices, general, heldout, medmcqa, medqa, memorisation, mmlu, pubmedqa
from medlora.evaluate.tasks.base import Task
from medlora.recipe import Recipe

CHOICES = {
    "pubmedqa": pubmedqa.load,
    "medqa": medqa.load,
    "medmcqa": medmcqa.load,
    "mmlu": mmlu.load,
    "choices": choices.load,
    "general_questions": general.load_questions,
}
HELD = ("heldout", "answers", memorisation.CONTROL)
"""What needs rows that the run held out."""
OWN = ("heldout", "answers", memorisation.TRAINED, memorisation.CONTROL, "general_text", "general_questions")
"""What needs no data beside the run's; measured where no tasks are named."""
NAMES = (*(name for name in OWN if name not in CHOICES), *CHOICES)


def load_task(name: str, recipe: Recipe, source: str | None, few_shot: int, limit: int | None) -> Task:
    """A task by name, its data from `source`, the run or the hub.

    Raises:
        DataError: no such task, or data that is missing, of another format, or wrong in a row.
    """
    if name in CHOICES:
        return CHOICES[name](source, few_shot, limit)
    if name == "heldout":
        return heldout.load_loss(recipe, source, limit)
    if name == "answers":
        return heldout.load_answers(recipe, source, limit)
    if name == memorisation.TRAINED:
        return memorisation.load_trained(recipe, source, limit)
    if name == memorisation.CONTROL:
        return memorisation.load_control(recipe, source, limit)
    if name == "general_text":
        return general.load_text(source, limit)
    raise DataError(f"{name}: no such task; there are {', '.join(NAMES)}")
