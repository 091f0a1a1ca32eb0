"""What the page says and does not say, and what it may not do."""

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from medlora import cli
from medlora.errors import RunError
from medlora.evaluate.summary import summarize
from medlora.report.page import facts, mark, write_report
from medlora.report.run import Pair, read_run, spread

Make = Callable[..., Path]


class Elements(HTMLParser):
    """Every start tag with its attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: Path) -> Elements:
    return Elements(page.read_text(encoding="utf-8"))


def test_it_needs_nothing_else_and_runs_nothing(make_run: Make) -> None:
    page = write_report(make_run())
    names = {tag for tag, _ in read(page).tags}
    assert "svg" in names and not names & {"script", "link", "img", "iframe", "object", "embed", "base"}
    targets = [
        value for _, attrs in read(page).tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")
    ]
    assert targets and all(str(target).startswith("#") for target in targets)
    assert not re.search(r"@import|url\((?!#)", page.read_text(encoding="utf-8"))


def test_ids_are_unique_and_references_resolve(make_run: Make) -> None:
    elements = read(write_report(make_run()))
    ids = [attrs["id"] for _, attrs in elements.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = {str(v)[1:] for _, attrs in elements.tags for k, v in attrs.items() if k in ("href", "xlink:href")}
    assert used <= set(ids)


def test_what_a_model_wrote_is_text(make_run: Make) -> None:
    assert "<script>alert(0)</script> & rest." in read(write_report(make_run())).text


def test_figures_of_the_summary_stand_on_the_page(make_run: Make) -> None:
    run = make_run()
    text = read(write_report(run)).text
    entry = summarize(run / "evaluation")["tasks"]["medquad"]["metrics"]["loss"]
    assert entry["difference"]["value"] < 0 and entry["verdict"] == "better"
    for side in ("untuned", "tuned", "difference"):
        assert f"{entry[side]['value']:.3f} [{entry[side]['low']:.3f}, {entry[side]['high']:.3f}]" in text
    assert "5 of 40 items share at least 8 words" in text
    assert (run / "figures" / "forest.png").is_file() and (run / "figures" / "forest.svg").is_file()


def test_each_group_of_items_has_its_own_line(make_run: Make) -> None:
    run = make_run()
    entry = summarize(run / "evaluation")["tasks"]["medquad"]["groups"]["qtype"]["symptoms"]
    text = read(write_report(run)).text
    assert "medquad by qtype" in text and entry["items"] == 40
    assert f"{entry['tuned']['value']:.3f} [{entry['tuned']['low']:.3f}, {entry['tuned']['high']:.3f}]" in text


def test_training_ends_with_a_report_and_names_it(
    toy: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "resolved.yaml"
    recipe.write_text(toy("training.max_steps=2").to_yaml())
    monkeypatch.setattr(sys, "argv", ["medlora", "train", str(recipe), "--output", str(tmp_path / "run")])
    cli.main()
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path / 'run' / 'report.html'}"
    text = read(tmp_path / "run" / "report.html").text
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert f"{manifest['after']['loss']:.3f}" in text and manifest["data"]["sha256"] in text
    assert manifest["after"]["answers"][0]["prompt"] in text
    assert (tmp_path / "run" / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_right_of_the_line_is_better(make_run: Make) -> None:
    from medlora.report.figures import forest_rows

    run = make_run()
    rows = {label: (value, low, high) for label, value, low, high in forest_rows(summarize(run / "evaluation"))}
    value, low, high = rows["medquad: loss (nats a token)"]  # falls from 2.4 to 2.1
    assert value == pytest.approx(100 * 0.3 / 2.4, abs=1.5) and 0 < low < value < high


def test_a_run_that_was_not_evaluated_says_so_and_shows_its_own_answers(make_run: Make) -> None:
    run = make_run(evaluated=False)
    text = read(write_report(run)).text
    assert f"medlora evaluate {run}" in text and "no verdict" in text
    assert "A joint disease." in text and "cut at the length limit" in text
    assert "Verdicts at" not in text


def test_what_the_device_did_not_report_is_not_made_up(make_run: Make) -> None:
    manifest = json.loads((make_run() / "manifest.json").read_text())
    assert dict(facts(manifest))["Energy"] == dict(facts(manifest))["Peak memory"] == "not reported by this device"
    told = dict(facts(manifest | {"energy_joules": 7200.0, "peak_memory_bytes": 2**31}))
    assert told["Energy"] == "2.0 Wh" and told["Peak memory"] == "2.00 GiB"


def test_rows_that_chose_the_adapter_are_said_to_flatter_it(make_run: Make) -> None:
    assert "flatters" not in read(write_report(make_run())).text
    text = read(write_report(make_run("best", best_step=30))).text
    assert "40, best at 30" in text and "which the held-out rows chose: their own loss flatters it" in text


def test_the_worst_are_those_with_the_lowest_overlap(make_run: Make) -> None:
    data = read_run(make_run())
    scores = [pair.tuned["rougeL"] for pair in data.worst if pair.tuned]
    stored = (data.folder / "evaluation" / "answers.tuned.jsonl").read_text().splitlines()[1:]
    assert scores == sorted(json.loads(line)["rougeL"] for line in stored)[:10]
    assert len(data.pairs) == 20


def test_a_sample_is_spread_over_all_pairs() -> None:
    pairs = [Pair(str(i), None, None, None) for i in range(45)]
    assert [int(pair.prompt) for pair in spread(pairs, 20)] == [i * 45 // 20 for i in range(20)]
    assert spread(pairs[:5], 20) == pairs[:5]


@pytest.mark.parametrize(
    ("text", "claims", "expected"),
    [
        ("Take Aspirin daily.", ["aspirin"], [("Take ", ""), ("Aspirin", "x"), (" daily.", "")]),
        ("uric acid, uric", ["uric", "uric acid"], [("uric acid", "x"), (", ", ""), ("uric", "x")]),
        ("5 mg of 15 mg", ["5 mg"], [("5 mg", "x"), (" of 15 mg", "")]),
        ("plain", [], [("plain", "")]),
    ],
)
def test_claims_are_marked_as_whole_words(text: str, claims: list[str], expected: list[tuple[str, str]]) -> None:
    assert mark(text, claims, "x") == expected


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no manifest\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "not searched"),
        ({"rows": 0, "dropped": False}, "0"),
        ({"rows": 3, "dropped": False, "date": 2, "name": 1}, "3 (date 2, name 1)"),
        ({"rows": 3, "dropped": True, "date": 3}, "3 (date 3), left out"),
    ],
)
def test_the_page_says_what_was_found_of_identifiers(make_run: Make, found: dict[str, Any], said: str) -> None:
    folder = make_run(evaluated=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"]["identifiers"] = found
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text = "".join(read(write_report(folder)).text.split("\n"))
    assert f"Rows that look as if they held identifiers{said}Fingerprint" in text
