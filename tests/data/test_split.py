"""Groups never straddle the split; a row's side does not depend on the other rows."""

import random

import pytest

from medlora.data.sources import Record
from medlora.data.split import fingerprint, refuse_overlap, split
from medlora.errors import DataError


def record(i: int, group: str) -> Record:
    return Record(f"r:{i}", f"text {i}", (), group)


RECORDS = [record(i, f"patient {i % 40}") for i in range(200)]


def test_groups_stay_whole_and_the_share_is_about_right() -> None:
    train, valid = split(RECORDS, 0.25, seed=0)
    assert len(train) + len(valid) == 200
    assert not {r.group for r in train} & {r.group for r in valid}
    assert 4 <= len({r.group for r in valid}) <= 16


def test_a_row_keeps_its_side_whatever_else_comes_or_goes() -> None:
    _, valid = split(RECORDS, 0.25, seed=0)
    fewer = RECORDS[::3]
    random.Random(1).shuffle(fewer)
    _, again = split(fewer, 0.25, seed=0)
    assert {r.where for r in again} == {r.where for r in valid} & {r.where for r in fewer}
    assert {r.where for r in split(RECORDS, 0.25, seed=1)[1]} != {r.where for r in valid}


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 usable row in 1 group cannot be split"):
        split(RECORDS[:1], 0.1, seed=0)
    assert split(RECORDS[:1], 0, seed=0) == (RECORDS[:1], [])


def test_held_out_groups_that_were_trained_on_are_refused() -> None:
    with pytest.raises(DataError, match="1 group of data.valid_path also in data.path, for example 'patient 3'"):
        refuse_overlap(RECORDS, [record(999, "patient 3"), record(1000, "patient new")])


def test_the_fingerprint_follows_content_and_order() -> None:
    assert fingerprint(RECORDS) == fingerprint(list(RECORDS))
    assert fingerprint(RECORDS) != fingerprint(RECORDS[::-1])
