"""Claims, letters, similarity, calibration, overlap and the store, against values worked out by hand or by others."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from medlora.errors import DataError
from medlora.evaluate import calibration, claims, similarity
from medlora.evaluate.letters import parse_letter
from medlora.evaluate.overlap import overlap
from medlora.evaluate.store import Store


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Take 0.5 g, that is 500 mg.", {"500 mg"}),
        ("250 mcg", {"0.25 mg"}),
        ("from 5 to 10 years; a 60-year-old man", {"5-10 years", "60 years"}),
        ("five percent, 5% and 5 per cent", {"5 %"}),
        ("1 in 5,000 people, three times a day", {"1 in 5000", "3 times a day"}),
        ("5 mg/kg, 38.5 °C, 140 mm Hg", {"5 mg/kg", "38.5 °C", "140 mmHg"}),
        ("chapter 7 of 12, in 1998", set()),
    ],
)
def test_quantities_are_normalised(text: str, found: set[str]) -> None:
    assert claims.quantities(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Chest pain and fevers", {"chest pain", "fever"}),
        ("There is no fever, but a cough.", {"not fever", "cough"}),
        ("It doesn't cause pain.", {"not pain"}),
        ("Amoxicillin treats bronchitis.", {"amoxicillin", "bronchitis"}),
        ("The program made a diagnosis with sympathy.", set()),
        ("Crohn's disease", {"crohn disease"}),
    ],
)
def test_entities_with_their_denial(text: str, found: set[str]) -> None:
    assert claims.claims(text) == found


def test_precision_and_recall_of_claims() -> None:
    found = claims.compare("Gout brings fever. Take 5 mg.", "Gout brings no fever. Take 5 mg for 3 days.")
    assert found["matched"] == ["5 mg", "gout"] and found["extra"] == ["fever"]
    assert found["missing"] == ["3 days", "not fever"]
    assert found["precision"] == pytest.approx(2 / 3, abs=1e-6) and found["recall"] == 0.5
    assert claims.compare("Hello.", "Gout.") | {"missing": []} == {
        "precision": None, "recall": 0.0, "missing": [], "extra": [], "matched": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1), ("(C)", 2), ("b", None), ("D. aspirin", 3), ("**A**", 0), ("A patient with gout", None),
        ("The answer is B.", 1), ("Answer: C", 2), ("The correct answer is (D)", 3), ("The answer is a drug", None),
        ("answer is A or the answer is B", None), ("Aspirin.", 1), ("", None), ("E", None), ("I think so", None),
    ],
)  # fmt: skip
def test_a_letter_is_read_only_where_one_stands(answer: str, index: int | None) -> None:
    assert parse_letter(answer, ["insulin", "aspirin", "heparin", "iron"]) == index


def test_rouge_and_chrf_are_those_of_hand_counts() -> None:
    found = similarity.scorer()("the cat sat", "the cat lay down")
    assert found["rougeL"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4), abs=1e-5)
    assert similarity.scorer()("same words", "same words")["chrf"] == 100
    assert similarity.repetition("a b c d e") == 0 and similarity.repetition("a b") == 0
    assert similarity.repetition("a b c d " * 3) == pytest.approx(1 - 4 / 9)


def line(identity: str, likelihoods: list[float], acc: int) -> dict[str, object]:
    return {"id": identity, "loglikelihoods": likelihoods, "acc": acc}


def test_calibration_against_numpy() -> None:
    rng = np.random.default_rng(0)
    items = [line(str(i), list(rng.normal(size=4) * 3 - 5), int(rng.random() < 0.5)) for i in range(300)]
    values = np.array([item["loglikelihoods"] for item in items])
    p = np.exp(values - values.max(1, keepdims=True))
    top, acc = (p / p.sum(1, keepdims=True)).max(1), np.array([item["acc"] for item in items])
    bins = np.minimum((top * 10).astype(int), 9)
    ece = sum((bins == b).mean() * abs(acc[bins == b].mean() - top[bins == b].mean()) for b in set(bins))
    assert calibration.expected_calibration_error(items) == pytest.approx(ece)
    order = np.argsort(-top, kind="stable")
    assert calibration.accuracy_at_coverage(items)[0.5] == pytest.approx(acc[order[:150]].mean())
    wrong = calibration.confident_errors(items, 0.9)
    assert len(wrong) == int(((top >= 0.9) & (acc == 0)).sum())
    assert calibration.confidence(line("x", [math.log(0.2), math.log(0.6)], 1)) == pytest.approx(0.75)


def test_overlap_is_the_share_of_an_items_n_grams() -> None:
    training = ["Nothing here.", "The quick brown fox, jumps over the lazy dog today"]
    items = {
        "same": "the quick brown fox jumps over the lazy dog",
        "new": " ".join(f"w{i}" for i in range(20)),
        "short": "a",
    }
    items["half"] = "the quick brown fox jumps over the lazy cat"
    assert overlap(items, training) == {"same": 1.0, "new": 0.0, "short": 0.0, "half": 0.5}


HEADER = {"task": "t", "side": "tuned", "kind": "choice", "settings": {"few_shot": 0}}


def test_the_store_goes_on_after_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    with Store(tmp_path, HEADER) as store:
        store.add({"id": "a"})
        store.add({"id": "b"})
    file = tmp_path / "t.tuned.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    with Store(tmp_path, HEADER) as store:
        assert store.done == {"a"}
        store.add({"id": "b"})
    assert [json.loads(text) for text in file.read_text().splitlines()] == [HEADER, {"id": "a"}, {"id": "b"}]


def test_the_store_refuses_other_settings_and_foreign_files(tmp_path: Path) -> None:
    Store(tmp_path, HEADER).__exit__(None, None, None)
    with pytest.raises(DataError, match=r"t.tuned.jsonl: was scored with settings.few_shot 0, now 5; remove the file"):
        Store(tmp_path, HEADER | {"settings": {"few_shot": 5}})
    (tmp_path / "t.tuned.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match="t.tuned.jsonl:1: not a line of an evaluation"):
        Store(tmp_path, HEADER)
