"""Tasks read the published formats, ask as lm-evaluation-harness asks, and name what is wrong with a file."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medlora.errors import DataError
from medlora.evaluate.tasks import load_task
from medlora.evaluate.tasks.base import Choice
from medlora.recipe import Recipe

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
Write = Callable[[str, str | bytes], Path]
published = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")


def load(name: str, source: object, few_shot: int = 0, limit: int | None = None) -> Any:
    return load_task(name, Recipe(), str(source), few_shot, limit)


@published
@pytest.mark.parametrize(
    ("name", "source", "count"),
    [("pubmedqa", "pubmedqa/ori_pqal_dev.json.gz", 500), ("medqa", "medqa/phrases_no_exclude_sample.jsonl", 150),
     ("medmcqa", "medmcqa/dev_sample.json", 400), ("mmlu", "mmlu", 123)],
)  # fmt: skip
def test_published_files_are_read_whole(name: str, source: str, count: int) -> None:
    task = load(name, DATA / source)
    assert len(task.items) == count == task.settings["items"]
    assert all(0 <= item.answer < len(item.options) for item in task.items)


@published
def test_the_first_published_items_have_the_answers_that_a_reader_finds() -> None:
    item: Choice = load("medqa", DATA / "medqa/phrases_no_exclude_sample.jsonl").items[0]
    assert item.texts[item.answer] == "Tell the attending that he cannot fail to disclose this mistake"
    item = load("medmcqa", DATA / "medmcqa/dev_sample.json").items[0]
    assert item.texts[item.answer] == "Impulse through myelinated fibers is slower than non-myelinated fibers"


def mcq(**fields: object) -> str:
    row = {"question": "Q?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "subject_name": "Anatomy"}
    return json.dumps(row | fields)


@pytest.mark.parametrize(("indices", "right", "first"), [((1, 4), ("a", "d"), 1), ((0, 3), ("a", "d"), 0)])
def test_medmcqa_says_what_its_answer_index_counts_from(
    write: Write, indices: tuple[int, int], right: tuple[str, str], first: int
) -> None:
    task = load("medmcqa", write("dev.json", "\n".join(mcq(cop=cop) for cop in indices)))
    assert tuple(item.texts[item.answer] for item in task.items) == right
    assert task.settings["notes"] == f"answer index counts from {first}"


QUESTION = {"question": "Which?", "options": ["one", "two"], "answer": 0}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("choices", json.dumps(QUESTION | {"answer": 2}), "f:1: the answer 2 names none of the 2 options"),
        ("choices", json.dumps(QUESTION | {"answer": "C"}), "the answer 'C' names none"),
        ("choices", json.dumps(QUESTION | {"answer": -1}), "the answer -1 names none"),
        ("choices", json.dumps(QUESTION | {"options": ["one"]}), "a list of two texts or more"),
        ("choices", json.dumps({"options": ["a", "b"], "answer": 0}), "no field `question`"),
        ("choices", "\n".join([json.dumps(QUESTION | {"id": "x"})] * 2), "the id 'x' stands on several items"),
        ("choices", json.dumps(QUESTION) + "\n{broken", "f:2: not valid JSON"),
        ("choices", "[]", "no items for choices"),
        ("choices", "[1, 2]", "a JSON object is expected, found int"),
        ("pubmedqa", json.dumps({"1": {"QUESTION": "Q"}}), "no list of texts `CONTEXTS`"),
        ("pubmedqa", json.dumps({"1": {"QUESTION": "Q", "CONTEXTS": ["a"], "final_decision": "perhaps"}}), "'perhaps'"),
        ("medqa", json.dumps({"question": "Q", "options": ["a"], "answer_idx": "A"}), "this is not MedQA's format"),
        ("medqa", json.dumps({"question": "Q", "options": {"A": "a", "B": "b"}, "answer_idx": "E"}), "'E' names none"),
        ("medmcqa", mcq(cop=5) + "\n" + mcq(cop=4), "`cop` is 5; it must be 1 to 4"),
        ("medmcqa", mcq(cop=0) + "\n" + mcq(cop=4), "it counts from 0 or from 1"),
        ("medmcqa", mcq(cop=2), "whether it counts from 0 or 1 is unknown"),
    ],
)
def test_one_sentence_for_what_is_wrong_with_a_file(write: Write, name: str, content: str, said: str) -> None:
    file = write("f", content)
    with pytest.raises(DataError) as caught:
        load(name, file)
    assert said in str(caught.value) and str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_missing_files_unknown_tasks_and_too_many_examples_are_refused(write: Write) -> None:
    with pytest.raises(DataError, match="no such file"):
        load("pubmedqa", "nowhere/deep/file.json")
    with pytest.raises(DataError, match="no test/"):
        load("mmlu", write("x/y.csv", "").parent)
    with pytest.raises(DataError, match="no such task; there are heldout"):
        load("chess", "x")
    with pytest.raises(DataError, match="--few-shot 3: there are only 2 examples"):
        load("choices", write("two.jsonl", "\n".join([json.dumps(QUESTION)] * 2)), few_shot=3)


def test_mmlu_rows_and_letters_are_checked(write: Write) -> None:
    folder = write("mmlu/val/anatomy_val.csv", "Q,a,b,c,d,E\n").parents[1]
    with pytest.raises(DataError, match="the answer 'E' names none of the 4 options"):
        load("mmlu", folder)
    write("mmlu/val/anatomy_val.csv", '"Q, with a comma",a,b,c\n')
    with pytest.raises(DataError, match="4 cells"):
        load("mmlu", folder)


def test_few_shot_examples_stand_before_the_question_and_are_not_scored(write: Write) -> None:
    rows = [QUESTION | {"question": f"Q{i}?", "answer": i % 2} for i in range(4)]
    file = write("q.jsonl.gz", gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    task = load("choices", file, few_shot=2)
    assert [item.id for item in task.items] == ["3", "4"]
    shots = "Question: Q0?\nAnswer: one\n\nQuestion: Q1?\nAnswer: two\n\n"
    assert task.items[0].prompt == shots + "Question: Q2?\nAnswer:"


def test_the_general_questions_have_four_different_options_and_spread_answers() -> None:
    items = load_task("general_questions", Recipe(), None, 0, None).items
    assert len(items) == 40 and all(len(set(item.options)) == 4 for item in items)  # type: ignore[union-attr]
    assert all(sum(item.answer == i for item in items) >= 5 for i in range(4))  # type: ignore[union-attr]
    assert len(load_task("general_text", Recipe(), None, 0, None).items) == 20


def test_held_out_rows_keep_their_ids_topics_and_question_types(write: Write) -> None:
    rows = [{"focus": f"T{i // 2}", "qtype": "treatment", "question": "Q?", "answer": f"A{i}"} for i in range(40)]
    file = write("rows.jsonl", "\n".join(map(json.dumps, rows)))
    recipe = Recipe.model_validate({"data": {"path": str(file), "group": "focus", "valid_fraction": 0.3}})
    items = load_task("heldout", recipe, None, 0, None).items
    assert items and all(
        item.group == {"qtype": "treatment", "topic": rows[int(item.id) - 1]["focus"]} for item in items
    )
    assert [i.id for i in load_task("answers", recipe, None, 0, 3).items] == [i.id for i in items[:3]]
    nothing = Recipe.model_validate({"data": {"path": str(file), "valid_fraction": 0}})
    with pytest.raises(DataError, match="held no rows out"):
        load_task("heldout", nothing, None, 0, None)
