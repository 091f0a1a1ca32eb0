"""PubMedQA, expert-labelled part (Jin et al. 2019, arXiv:1909.06146): yes, no or maybe, from an abstract.

Reads `ori_pqal.json` as published (also .gz) or `qiaojin/PubMedQA` on the hub. Prompt as in lm-evaluation-harness's
`pubmedqa`.
"""

from medlora.errors import DataError
from medlora.evaluate.tasks.base import Choice, Row, Task, choice_task, rows_of, text_of

HUB, SUBSET, SPLIT = "qiaojin/PubMedQA", "pqa_labeled", "train"
OPTIONS = ("yes", "no", "maybe")


def load(source: str | None, few_shot: int, limit: int | None) -> Task:
    return choice_task("pubmedqa", rows_of(source, HUB, SPLIT, SUBSET), _item, few_shot, limit)


def _item(where: str, row: Row) -> Choice:
    held = row.get("context")
    contexts = row.get("CONTEXTS") or (held.get("contexts") if isinstance(held, dict) else None)
    if not isinstance(contexts, list) or not all(isinstance(part, str) for part in contexts):
        raise DataError(f"{where}: no list of texts `CONTEXTS`; this is not PubMedQA's format")
    decision = text_of(where, row, "final_decision")
    if decision not in OPTIONS:
        raise DataError(f"{where}: final_decision is {decision!r}, not one of {', '.join(OPTIONS)}")
    question = text_of(where, row, "QUESTION", "question")
    shown = "Abstract: {}\nQuestion: {}".format("\n".join(contexts), question)
    identity = str(row.get("id") or row.get("pubid") or where)
    group = {"year": str(row["YEAR"])} if row.get("YEAR") else {}
    return Choice(identity, shown, OPTIONS, OPTIONS.index(decision), group, f"{shown}\nAnswer:", OPTIONS)
