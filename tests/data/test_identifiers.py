"""What looks as if it told who a patient is, and what does not; and what a recipe does about it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MEDQUAD, TEXTS

from medlora.data.build import build, read_records
from medlora.data.identifiers import kinds_in, search
from medlora.errors import DataError
from medlora.recipe import Recipe, load_recipe

TELLING = {
    "e-mail address": ["Write to jane.doe+x@clinic.example.org today", "<a_b@c.de>"],
    "telephone number": [
        "call 301-496-5248.", "Tel. (617) 555-0123", "+1 617 555 0123", "1-800-411-1222", "617.555.0123",
        "ring +49 30 123 45 67", "+44 20 7946 0958", "(617)555-0123",
    ],
    "social security number": ["SSN 078-05-1120", "078-05-1120"],
    "record number": [
        "MRN 00482913", "MRN: A-482913", "Patient ID: 48291", "patient no. 482913", "Case #20931",
        "medical record number 88-12-345", "NHS number: 9434765919", "Account number = 12345",
    ],
    "date": [
        "seen on 03/14/2019", "born 3.1.1954", "admitted 2021-07-30", "on March 4, 2018", "Sept. 21st, 1999",
        "4 July 2011", "the 2nd Feb. 1960", "12. Dezember".replace("Dezember", "Dec 1950"),
    ],
    "age over 89": ["a 93-year-old woman", "He is 101 years old", "aged 94"],
    "name": ["Mrs. Miller fell", "Dr Watson saw him", "Patient: John Smith", "NAME: Ada Lovelace", "Mr. Jones"],
    "street address": ["12 Old Mill Road", "221 Baker Street", "lives at 80 Maiden Lane"],
}  # fmt: skip
INNOCENT = [
    *TEXTS,
    "1,000 mg, then 120-180 mg every 6-8 hours for 2019 patients", "In 2019, 40-50% of 1200 cases", "ISO 8601-1:2019",
    "a ratio of 3/4 or 12/24/48 hours", "version 1.2.2019x", "89 years old", "aged 90% of the time", "May 2018",
    "p < 0.001 (95% CI 1.2-3.4)", "chromosome 22q11.2 and 46,XX", "Drug resistance", "Drive safely on the road",
    "in case 2 of 3", "the patient 2018 cohort", "hospital 2015", "10 mg Street drugs", "user@ and @home", "@ 5 pm",
    "rs123-45-67890", "doi:10.1001/jama.2019.1234", "a patient: male, 45", "Name: aspirin",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in TELLING.items() for text in texts])
def test_what_has_the_form_of_an_identifier_is_found_and_called_by_its_name(kind: str, text: str) -> None:
    assert kinds_in(text) == (kind,)


@pytest.mark.parametrize("text", INNOCENT)
def test_what_medicine_is_full_of_is_not_taken_for_one(text: str) -> None:
    assert kinds_in(text) == ()


@pytest.fixture
def recipe(write: Callable[[str, str | bytes], Path]) -> Callable[..., Recipe]:
    rows = [{"prompt": f"Question {i}?", "completion": "An answer without anyone in it."} for i in range(10)]
    rows[2]["completion"] = "Ask Dr. Watson, 301-496-5248."
    rows[7]["prompt"] = "Is jane@example.org well?"
    file = write("rows.jsonl", "\n".join(map(json.dumps, rows)))

    def make(**data: object) -> Recipe:
        return Recipe.model_validate({"name": "toy", "data": {"path": str(file), "valid_fraction": 0.0, **data}})

    return make


def test_a_recipe_reports_drops_refuses_or_ignores_them(recipe: Callable[..., Recipe], embedded: Path) -> None:
    from medlora.data.prompts import prepare_tokenizer
    from medlora.model.base import load_tokenizer, resolve

    base = resolve(recipe().base)
    tokenizer = prepare_tokenizer(load_tokenizer(base), recipe().prompt)
    reported = build(recipe(), tokenizer)
    assert len(reported.train) == 10
    assert reported.identifiers.kinds == {"telephone number": 1, "name": 1, "e-mail address": 1}
    said = next(line for line in reported.summary() if "identifiers" in line)
    assert (
        said.startswith("rows that look as if they held identifiers: 2 (")
        and "rows.jsonl:3" in said
        and "data.on_identifiers" in said
    )
    assert "Watson" not in said and "496" not in said  # a log is read by more people than the data
    dropped = build(recipe(on_identifiers="drop"), tokenizer)
    assert len(dropped.train) == 8 and "left out rows that look as if they held identifiers: 2" in "\n".join(
        dropped.summary()
    )
    assert [r.where.rpartition(":")[2] for r in read_records(recipe(on_identifiers="drop", max_rows=3)).train] == [
        "1", "2", "4",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"identifiers: 2 .*rows.jsonl:3, .*set data.on_identifiers to"):
        build(recipe(on_identifiers="error"), tokenizer)
    ignored = build(recipe(on_identifiers="ignore"), tokenizer)
    assert len(ignored.train) == 10 and not any("identifiers" in line for line in ignored.summary())


def test_rows_are_searched_on_either_side_of_the_split(
    recipe: Callable[..., Recipe], write: Callable[[str, str | bytes], Path]
) -> None:
    held = write("held.jsonl", json.dumps({"prompt": "Who?", "completion": "Mrs. Miller of 12 Old Mill Road."}))
    assert len(read_records(recipe(valid_path=str(held))).valid) == 1
    records = read_records(recipe(valid_path=str(held), on_identifiers="drop"))
    assert not records.valid and len(records.dropped.rows) == 3


def test_data_of_nothing_else_is_refused(write: Callable[[str, str | bytes], Path]) -> None:
    file = write("a.jsonl", "\n".join(json.dumps({"prompt": f"{i}?", "completion": "a@b.org"}) for i in range(3)))
    data = {"path": str(file), "valid_fraction": 0.0, "on_identifiers": "drop"}
    with pytest.raises(DataError, match="no row is left: rows that look as if they held identifiers: 3"):
        read_records(Recipe.model_validate({"name": "toy", "data": data}))


@pytest.mark.skipif(not MEDQUAD.is_dir(), reason="the shared data is not here")
def test_a_public_set_has_few_and_those_are_offices() -> None:
    train = read_records(load_recipe("medquad", [f"data.path={MEDQUAD / 'train.jsonl.gz'}"])).train
    found = search(train)
    assert 0 < len(found.rows) < 0.01 * len(train)
    assert "social security number" not in found.kinds and "record number" not in found.kinds
