"""MMLU's six medical subjects (Hendrycks et al. 2021, arXiv:2009.03300).

Reads the published folder (`test/*_test.csv`, else `val/*_val.csv`; examples from `dev/*_dev.csv`) or `cais/mmlu` on
the hub. The letter is scored; prompt as in lm-evaluation-harness's `mmlu_*`.
"""

from pathlib import Path

from medlora.errors import DataError
from medlora.evaluate.tasks.base import (
    LETTERS,
    Choice,
    Task,
    hub_rows,
    index_of,
    lettered,
    make_task,
    read_csv,
    with_examples,
)

HUB = "cais/mmlu"
SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)


def load(source: str | None, few_shot: int, limit: int | None) -> Task:
    """Of each subject the first `few_shot` items of `dev` are the examples; `limit` counts over all subjects.

    Raises:
        DataError: no such folder or file, or a row that is not MMLU's.
    """
    split = _split(Path(source).expanduser()) if source else "test"
    items = [item for subject in SUBJECTS for item in _subject(source, subject, split, few_shot)]
    subjects = sorted({item.group["subject"] for item in items})
    return make_task("mmlu", "choice", items, source or HUB, limit, few_shot=few_shot, split=split, subjects=subjects)


def _split(folder: Path) -> str:
    found = [split for split in ("test", "val") if any(folder.glob(f"{split}/*_{split}.csv"))]
    if not found:
        raise DataError(f"{folder}: no test/*_test.csv or val/*_val.csv; give MMLU's `data` folder")
    return found[0]


def _subject(source: str | None, subject: str, split: str, few_shot: int) -> tuple[Choice, ...]:
    items = _read(source, subject, split)
    examples = _read(source, subject, "dev") if few_shot and items else []
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return with_examples(items, examples, few_shot if items else 0, head)


def _read(source: str | None, subject: str, split: str) -> list[Choice]:
    if source is None:
        rows = hub_rows(HUB, split, subject)
        cells = [(where, [row["question"], *row["choices"], LETTERS[row["answer"]]]) for where, row in rows]
    else:
        file = Path(source).expanduser() / split / f"{subject}_{split}.csv"
        cells = read_csv(file) if file.is_file() else []
    return [_item(where, row, subject, number) for number, (where, row) in enumerate(cells, 1)]


def _item(where: str, cells: list[str], subject: str, number: int) -> Choice:
    if len(cells) != 6:
        raise DataError(f"{where}: {len(cells)} cells; MMLU's rows are a question, four options and a letter")
    question, texts = cells[0].strip(), tuple(cells[1:5])
    answer = index_of(where, cells[5], 4)
    prompt = f"{question}\n{lettered(texts)}\nAnswer:"
    return Choice(f"{subject}-{number}", question, texts, answer, {"subject": subject}, prompt, tuple("ABCD"))
