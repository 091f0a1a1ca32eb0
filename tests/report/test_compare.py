"""Several runs side by side."""

from collections.abc import Callable
from pathlib import Path

import pytest

from medlora.errors import RunError
from medlora.evaluate.metrics import measure
from medlora.evaluate.summary import read
from medlora.report.compare import compare, describe

Make = Callable[..., Path]


def test_each_run_is_paired_with_the_first_on_shared_items(make_run: Make) -> None:
    first, second = make_run("one"), make_run("two", seed=1)
    file = second / "evaluation" / "medquad.tuned.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-4]))  # four items fewer
    found = compare([first, second])
    pair = found["tasks"]["medquad"]["against"]["two"]
    one, two = (list(read(run / "evaluation")["medquad"]["tuned"].items.values()) for run in (first, second))
    expected = measure("loss", {"one": one[:36], "two": two})["loss"]
    assert pair["items"] == 36
    assert {key: pair["metrics"]["loss"][key] for key in expected} == expected
    assert any(line.startswith("medquad (36 items), two against one") for line in describe(found))


def test_a_run_is_not_better_than_itself(make_run: Make) -> None:
    found = compare([make_run("one"), make_run("two")])  # the same numbers under two names
    entries = [e for t in found["tasks"].values() for p in t["against"].values() for e in p["metrics"].values()]
    assert {entry["verdict"] for entry in entries if "verdict" in entry} == {"no difference shown"}


def test_what_cannot_be_paired_is_named(make_run: Make) -> None:
    first, second = make_run("one"), make_run("two")
    (second / "evaluation" / "pubmedqa.tuned.jsonl").unlink()
    other = second / "evaluation" / "medquad.tuned.jsonl"
    for file in (other, second / "evaluation" / "medquad.untuned.jsonl"):
        file.write_text(file.read_text().replace('"limit": 40', '"limit": 39', 1))
    found = compare([first, second])
    assert set(found["tasks"]) == {"answers", "general_text"}
    assert sorted(found["left_out"]) == [
        "medquad: measured differently in one and two",
        "pubmedqa: no tuned answers of two",
    ]


def test_runs_that_cannot_be_compared(make_run: Make) -> None:
    run = make_run("one")
    with pytest.raises(RunError, match="at least two"):
        compare([run])
    with pytest.raises(RunError, match="given twice"):
        compare([run, run])
    with pytest.raises(RunError, match="not evaluated yet; run `medlora evaluate"):
        compare([run, make_run("two", evaluated=False)])
