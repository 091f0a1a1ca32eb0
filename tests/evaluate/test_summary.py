"""Summaries of made-up evaluations whose truth is known."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medlora.errors import DataError, RunError
from medlora.evaluate.metrics import METRICS, correct, measure
from medlora.evaluate.summary import describe, forgotten, read, summarize

Item = dict[str, Any]


def store(folder: Path, task: str, side: str, kind: str, items: list[Item], **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header = {"task": task, "side": side, "kind": kind, "settings": settings, "medlora": "0.1.0", "model": "toy"}
    lines = [json.dumps(line) for line in (header, *items)]
    (folder / f"{task}.{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def losses(nll: np.ndarray, topics: int = 0) -> list[Item]:
    group = [{"topic": f"topic {i % topics}", "qtype": "treatment"} if topics else {} for i in range(len(nll))]
    return [
        {"id": f"i{i}", "prompt": "p", "group": group[i], "nll": float(v), "tokens": 10 + i % 3, "bytes": 50}
        for i, v in enumerate(nll)
    ]


def choices(right: list[int]) -> list[Item]:
    return [
        {"id": f"q{i}", "prompt": "p", "group": {"subject": "anatomy"}, "options": ["a", "b"], "answer": 0, "acc": r,
         "acc_norm": r, "loglikelihoods": [-1.0, -2.0], "lengths": [1, 1]}
        for i, r in enumerate(right)
    ]  # fmt: skip


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Loss clearly better, accuracy equal, general loss worse."""
    folder, generator = tmp_path / "evaluation", np.random.default_rng(0)
    nll = generator.normal(30, 3, size=60)
    store(folder, "loss", "untuned", "loss", losses(nll, 20))
    store(folder, "loss", "tuned", "loss", losses(nll - generator.normal(5, 1, size=60), 20))
    store(folder, "pubmedqa", "untuned", "choice", choices([1, 0] * 40))
    store(folder, "pubmedqa", "tuned", "choice", choices([1, 0] * 38 + [0, 1] * 2))
    store(folder, "general_text", "untuned", "loss", losses(nll))
    store(folder, "general_text", "tuned", "loss", losses(nll + generator.normal(2, 1, size=60)))
    return folder


def test_verdicts_follow_the_direction_of_each_metric(evaluation: Path) -> None:
    tasks = summarize(evaluation)["tasks"]
    assert {entry["verdict"] for entry in tasks["loss"]["metrics"].values()} == {"better"}
    assert {entry["verdict"] for entry in tasks["pubmedqa"]["metrics"].values()} == {"no difference shown"}
    assert {entry["verdict"] for entry in tasks["general_text"]["metrics"].values()} == {"worse"}
    assert tasks["loss"]["metrics"]["loss"]["difference"]["value"] < 0


def test_a_loss_is_weighted_by_tokens_and_gives_perplexity_and_bits(evaluation: Path) -> None:
    metrics = summarize(evaluation)["tasks"]["loss"]["metrics"]
    lines = (evaluation / "loss.tuned.jsonl").read_text().splitlines()[1:]
    items = [json.loads(line) for line in lines]
    nll, tokens, size = (sum(item[name] for item in items) for name in ("nll", "tokens", "bytes"))
    assert metrics["loss"]["tuned"]["value"] == pytest.approx(nll / tokens)
    assert metrics["perplexity"]["tuned"]["value"] == pytest.approx(math.exp(nll / tokens))
    assert metrics["bits_per_byte"]["tuned"]["value"] == pytest.approx(nll / math.log(2) / size)
    for entry in metrics.values():
        assert entry["tuned"]["low"] < entry["tuned"]["value"] < entry["tuned"]["high"]


def test_items_of_a_topic_are_one_unit(evaluation: Path) -> None:
    """The same items without their topics would look surer than they are."""
    generator = np.random.default_rng(1)
    nll = np.tile(generator.normal(30, 5, size=20), 10)
    with_topics = measure("loss", {"tuned": losses(nll, 20)})["loss"]["tuned"]
    without = measure("loss", {"tuned": losses(nll)})["loss"]["tuned"]
    assert with_topics["high"] - with_topics["low"] > 2 * (without["high"] - without["low"])


def test_from_too_few_topics_nothing_is_concluded(tmp_path: Path) -> None:
    nll = np.linspace(28, 32, 12)
    store(tmp_path, "loss", "untuned", "loss", losses(nll, 3))
    store(tmp_path, "loss", "tuned", "loss", losses(nll - 5, 3))
    row = next(line for line in describe(summarize(tmp_path)) if "nats" in line)
    assert row.count("[too few]") == 3 and row.endswith("no difference shown")  # and no number of items that would do


def test_the_summary_is_written_beside_the_items_and_says_the_same(evaluation: Path) -> None:
    summary = summarize(evaluation)
    assert json.loads((evaluation / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary == summarize(evaluation)  # seeded
    assert not list(evaluation.glob(".*"))


def test_the_correction_runs_over_every_test_of_the_evaluation(evaluation: Path) -> None:
    summary = summarize(evaluation)
    assert summary["tests"] == 3 + 2 + 3
    entries = [entry for task in summary["tasks"].values() for entry in task["metrics"].values()]
    assert all(entry["p_holm"] >= entry["p"] for entry in entries)
    assert min(entry["p_holm"] for entry in entries) == pytest.approx(8 * min(entry["p"] for entry in entries))


def test_what_overlaps_with_training_is_also_left_out(evaluation: Path) -> None:
    overlap = {"pubmedqa": {f"q{i}": (0.4 if i < 70 else 0.0) for i in range(80)}}
    (evaluation / "overlap.json").write_text(json.dumps(overlap))
    tasks = summarize(evaluation)["tasks"]
    clean = tasks["pubmedqa"]["clean"]
    assert tasks["pubmedqa"]["overlapping"] == 70 and clean["items"] == 10
    assert clean["metrics"]["acc"]["untuned"]["value"] == 0.5 and clean["metrics"]["acc"]["items"] == 10
    assert clean["metrics"]["acc"]["verdict"] == "no difference shown"
    assert "overlapping" not in tasks["loss"]


def test_groups_have_their_own_intervals_and_no_verdict(evaluation: Path) -> None:
    groups = summarize(evaluation)["tasks"]["loss"]["groups"]
    assert groups["qtype"]["treatment"]["items"] == 60 and "verdict" not in groups["qtype"]["treatment"]
    assert "topic" not in groups  # three items each


def test_an_undefined_value_leaves_the_item_out_on_both_sides() -> None:
    def answer(i: int, precision: float | None) -> Item:
        claims = {"precision": precision, "recall": 0.5, "missing": [], "extra": [], "matched": []}
        shared = {"rougeL": 0.2, "chrf": 20.0, "repetition": 0.0, "finished": True, "tokens": 9}
        return {"id": f"a{i}", "group": {}, "claims": claims, **shared}

    first = [answer(i, None if i == 3 else 0.5) for i in range(10)]
    second = [answer(i, None if i == 4 else 0.75) for i in range(10)]
    metrics = measure("answer", {"untuned": first, "tuned": second})
    assert metrics["claims_precision"]["items"] == 8 and metrics["claims_recall"]["items"] == 10
    assert metrics["claims_precision"]["difference"]["value"] == pytest.approx(0.25)
    assert correct([("answer", metrics)]) == len(METRICS["answer"]) - 1  # length has no better direction
    assert "verdict" not in metrics["tokens"]


def test_one_side_alone_is_scored_without_a_difference(evaluation: Path) -> None:
    (evaluation / "pubmedqa.tuned.jsonl").unlink()
    entry = summarize(evaluation)["tasks"]["pubmedqa"]["metrics"]["acc"]
    assert entry["untuned"]["value"] == 0.5 and "difference" not in entry and "verdict" not in entry


def test_an_interrupted_side_is_compared_on_what_both_have(evaluation: Path) -> None:
    file = evaluation / "pubmedqa.tuned.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:41]) + "\n" + lines[41][:20])  # 40 items, and a line cut short
    task = summarize(evaluation)["tasks"]["pubmedqa"]
    assert task["items"] == {"untuned": 80, "tuned": 40} and task["metrics"]["acc"]["items"] == 40


def test_the_terminal_shows_intervals_verdicts_and_forgetting(evaluation: Path) -> None:
    summary = summarize(evaluation)
    text = "\n".join(describe(summary))
    assert forgotten(summary) == ["general_text"]
    assert "warning: general_text: the tuned model is worse at general text" in text
    assert "0.500 [0.393, 0.607]" in text  # 40 of 80
    assert text.index("pubmedqa (80 items)") < text.index("Forgetting") < text.index("general_text (60 items)")
    assert "over 8 tests" in text


@pytest.mark.parametrize(
    ("damage", "error", "part"),
    [
        (lambda f: [g.unlink() for g in f.glob("*.jsonl")], RunError, "nothing was evaluated"),
        (lambda f: (f / "loss.tuned.jsonl").write_text("{}\n"), DataError, r"loss\.tuned\.jsonl: not the item lines"),
        (lambda f: (f / "loss.tuned.jsonl").write_text("no\n{}\n"), DataError, r"loss\.tuned\.jsonl: not the item"),
        (lambda f: store(f, "loss", "tuned", "lost", [{"id": "i1"}]), DataError, "line 1: kind 'lost' is none of"),
        (lambda f: store(f, "loss", "tuned", "loss", losses(np.ones(3)) * 2), DataError, "3 item ids stand twice"),
        (lambda f: store(f, "loss", "tuned", "loss", losses(np.ones(3)), limit=3), DataError, "different settings"),
    ],
)
def test_a_damaged_evaluation_is_refused_in_one_sentence(
    evaluation: Path, damage: Callable[[Path], Any], error: type[Exception], part: str
) -> None:
    damage(evaluation)
    with pytest.raises(error, match=part) as raised:
        read(evaluation)
    assert "\n" not in str(raised.value)
