"""The embedded data is what its card says."""

import json
from collections import Counter

from medlora.data.build import read_records
from medlora.data.sources import TERMS
from medlora.recipe import load_recipe

ROWS = [json.loads(line) for line in TERMS.read_text(encoding="utf-8").splitlines()]


def test_at_least_240_distinct_terms_of_every_kind() -> None:
    assert len(ROWS) == len({row["term"].lower() for row in ROWS}) >= 240
    kinds = Counter(row["category"] for row in ROWS)
    assert set(kinds) == {"disease", "symptom", "drug", "procedure", "test", "anatomy"} and min(kinds.values()) >= 20
    assert {"Ascariasis", "Malaria", "Schistosomiasis", "Giardiasis"} <= {row["term"] for row in ROWS}


def test_each_is_one_paragraph_of_60_to_140_words() -> None:
    for row in ROWS:
        assert 60 <= len(row["text"].split()) <= 140, row["term"]
        assert "\n" not in row["text"] and row["text"].endswith("."), row["term"]
        assert row["term"].lower() in row["text"].lower()[:80], row["term"]


def test_no_term_is_both_trained_and_held_out_and_ascariasis_is_trained() -> None:
    train, valid, bad, *_ = read_records(load_recipe("demo"))
    assert not bad and len(train) + len(valid) == len(ROWS)
    assert not {r.group for r in train} & {r.group for r in valid} and len(valid) >= 15
    assert "Ascariasis" in {r.group for r in train}
