"""MedQA-USMLE with four options (Jin et al. 2020, arXiv:2009.13081).

Reads its JSON lines (`phrases_no_exclude_*.jsonl`) or `GBaker/MedQA-USMLE-4-options` on the hub. The letter is
scored; prompt as in lm-evaluation-harness's `medqa_4options`.
"""

from medlora.errors import DataError
from medlora.evaluate.tasks.base import LETTERS, Choice, Row, Task, choice_task, index_of, lettered, rows_of, text_of

HUB, SPLIT = "GBaker/MedQA-USMLE-4-options", "test"


def load(source: str | None, few_shot: int, limit: int | None) -> Task:
    return choice_task("medqa", rows_of(source, HUB, SPLIT), _item, few_shot, limit)


def _item(where: str, row: Row) -> Choice:
    options = row.get("options")
    if not isinstance(options, dict) or sorted(options) != list(LETTERS[: len(options)]) or len(options) < 2:
        raise DataError(f"{where}: `options` must hold the options A, B, C, D; this is not MedQA's format")
    texts = tuple(str(options[letter]) for letter in sorted(options))
    question = str(row["question"]) if text_of(where, row, "question") else ""  # its outer space is the benchmark's
    answer = index_of(where, row.get("answer_idx"), len(texts))
    group = {"step": str(row["meta_info"])} if row.get("meta_info") else {}
    prompt = f"Question: {question}\n{lettered(texts)}\nAnswer:"
    identity = str(row.get("id") or f"{where.rpartition(':')[2]}")
    return Choice(identity, question, texts, answer, group, prompt, tuple(LETTERS[: len(texts)]))
