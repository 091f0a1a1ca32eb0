"""A run folder with an evaluation of every kind, made up by a seed."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MANIFEST: dict[str, Any] = {
    "status": "finished", "name": "made-up", "started": "2026-01-01T10:00:00+0000", "ended": "2026-01-01T10:05:00+0000",
    "versions": {"python": "3.11", "medlora": "0.1.0", "torch": "2.13.0"},
    "base": {"model": "embedded", "path": "/models/small"},
    "data": {"path": "rows.jsonl", "sha256": "ab" * 32, "train_rows": 900, "train_tokens": 200_000, "valid_rows": 100,
             "bad_rows": ["rows.jsonl:7: column `answer` is empty"], "long_rows": 3},
    "seed": 42, "trainable_parameters": 4_884_480, "device": "CPU, 2 threads", "engine": "packed: rows without padding",
    "steps": 40, "training_seconds": 300.0, "trained_tokens": 60_000, "tokens_per_second": 200.0,
    "before": {"loss": 2.4, "perplexity": 11.0, "rows": 100, "tokens": 20_000,
               "answers": [{"prompt": "What is gout?", "answer": "A gas.", "finished": True}]},
    "after": {"loss": 2.1, "perplexity": 8.2, "rows": 100, "tokens": 20_000,
              "answers": [{"prompt": "What is gout?", "answer": "A joint disease.", "finished": False}]},
}  # fmt: skip


def loss_item(i: int, side: str, draw: random.Random) -> dict[str, Any]:
    return {"nll": (2.1 if side == "tuned" else 2.4) * 100 + draw.gauss(0, 5), "tokens": 100, "bytes": 400}


def choice_item(i: int, side: str, draw: random.Random) -> dict[str, Any]:
    values = [draw.gauss(-10, 2) for _ in range(3)]
    right = max(range(3), key=values.__getitem__) == i % 3
    return {
        "options": ["yes", "no", "maybe"], "loglikelihoods": values, "lengths": [3, 2, 5], "answer": i % 3,
        "acc": int(right), "acc_norm": int(right),
    }  # fmt: skip


def answer_item(i: int, side: str, draw: random.Random) -> dict[str, Any]:
    claims = {"precision": 0.5, "recall": 0.5, "missing": ["uric acid"], "extra": ["aspirin"], "matched": ["gout"]}
    return {
        "reference": f"Gout {i} comes from uric acid in the joints.",
        "answer": f"Gout is cured by aspirin <script>alert({i})</script> & rest.", "finished": i % 2 == 0,
        "tokens": 12, "rougeL": draw.random(), "chrf": 30 + draw.random(), "repetition": 0.1, "claims": claims,
    }  # fmt: skip


KINDS = {
    "loss": ("medquad", loss_item), "choice": ("pubmedqa", choice_item), "answer": ("answers", answer_item),
    "general": ("general_text", loss_item),
}  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Make a run folder, with an evaluation or without."""

    def make(name: str = "made-up", *, evaluated: bool = True, seed: int = 0, **manifest: Any) -> Path:
        run = tmp_path / name
        (run / "evaluation").mkdir(parents=True) if evaluated else run.mkdir(parents=True)
        (run / "manifest.json").write_text(json.dumps(MANIFEST | manifest))
        (run / "recipe.yaml").write_text("name: made-up\nlora: {r: 16}\n")
        steps = [{"step": s, "loss": 2.5 - s / 100, "learning_rate": 1e-3 * (1 - s / 50)} for s in range(1, 41)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        if evaluated:
            _evaluate(run / "evaluation", random.Random(seed))
        return run

    yield make


def _evaluate(folder: Path, draw: random.Random) -> None:
    for kind, (task, item) in KINDS.items():
        for side in ("untuned", "tuned"):
            stored = {"task": task, "side": side, "kind": kind.replace("general", "loss"), "settings": {"limit": 40}}
            lines = [stored]
            lines += [
                {"id": f"q{i}", "prompt": f"Question {i}?", "group": {"topic": f"t{i % 12}", "qtype": "symptoms"}}
                | item(i, side, draw)
                for i in range(40)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{task}.{side}.jsonl").write_text(text)
    (folder / "overlap.json").write_text(json.dumps({"medquad": {f"q{i}": 0.2 * (i < 5) for i in range(40)}}))
