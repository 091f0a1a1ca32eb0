"""Multiple choice by log-likelihood: medlora beside lm-evaluation-harness, same model, same items, equal results.

    python bench/evaluation.py --data ori_pqal.json.gz --items 100

Both sides score PubMedQA on the embedded base in float32, one after the other in this process. The clock runs over
scoring alone, for both from prompts to scores; lm-evaluation-harness's search for its batch size is part of that, as a
user has it with `--batch-size auto`; `--batch-size 4` shows it without the search.
"""

import argparse
import csv
import gzip
import json
import time
from pathlib import Path
from typing import Any

from medlora.privacy import quiet

Row = dict[str, Any]
DEFINITIONS = {  # lm-evaluation-harness's own task files
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
    "medqa": "medqa/medqa.yaml",
    "medmcqa": "medmcqa/medmcqa.yaml",
    "mmlu_anatomy": "mmlu/default/mmlu_anatomy.yaml",
}


def published_rows(task: str, source: Path, count: int) -> list[Row]:
    """Local rows in the shape of the hub data set that lm-evaluation-harness's own task definition reads."""
    if task == "mmlu_anatomy":
        cells = list(csv.reader(source.read_text(encoding="utf-8").splitlines()))[:count]
        return [{"question": q, "choices": options, "answer": "ABCD".index(letter)} for q, *options, letter in cells]
    content = source.read_bytes()
    text = (gzip.decompress(content) if source.suffix == ".gz" else content).decode()
    if task == "pubmedqa":
        return list(json.loads(text).values())[:count]
    rows = [json.loads(line) for line in text.splitlines()[:count]]
    if task == "medmcqa":
        return [row | {"cop": row["cop"] - 1} for row in rows]
    return [
        {"sent1": row["question"], "label": "ABCD".index(row["answer_idx"])}
        | {f"ending{i}": row["options"][letter] for i, letter in enumerate("ABCD")}
        for row in rows
    ]


def harness(lm: Any, task: str, rows: list[Row], shots: list[Row]) -> list[Row]:
    """lm-evaluation-harness on its own definition of `task`, fed with `rows`: its samples, in order."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / DEFINITIONS[task])
    for name in ("training_split", "validation_split", "tag", "task_alias", "dataset_name", "group"):
        config.pop(name, None)
    splits = {"test": datasets.Dataset.from_list(rows), "dev": datasets.Dataset.from_list(shots or rows)}
    config |= {"custom_dataset": lambda **_: splits, "test_split": "test"}
    config["metric_list"] = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    found = lm_eval.simple_evaluate(
        lm, tasks=[config], num_fewshot=len(shots), task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    return sorted(next(iter(found["samples"].values())), key=lambda sample: int(sample["doc_id"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="PubMedQA's ori_pqal.json, also .gz")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--batch-size", default="auto", help="lm-evaluation-harness's; `auto` or a number")
    parser.add_argument("--max-batch-size", type=int, default=64, help="where its search begins; 64 is its default")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet(offline=True, compiler=True)
    from lm_eval.models.huggingface import HFLM

    from medlora.evaluate.score import choice_lines
    from medlora.evaluate.tasks import pubmedqa
    from medlora.generate.answer import Assistant
    from medlora.recipe import Base

    assistant = Assistant.load(base=Base(compute_dtype="float32"))
    items: Any = pubmedqa.load(str(arguments.data), 0, arguments.items).items
    started = time.perf_counter()
    ours = list(choice_lines(assistant, items, tuned=False))
    seconds = {"medlora": time.perf_counter() - started}

    lm = HFLM(
        pretrained=assistant.model, tokenizer=assistant.tokenizer, batch_size=arguments.batch_size,
        max_batch_size=arguments.max_batch_size,
    )  # fmt: skip
    rows = published_rows("pubmedqa", arguments.data, arguments.items)
    started = time.perf_counter()
    theirs = harness(lm, "pubmedqa", rows, [])
    seconds["lm-evaluation-harness"] = time.perf_counter() - started
    report(ours, theirs, seconds, arguments)


def report(ours: list[Row], theirs: list[Row], seconds: dict[str, float], arguments: argparse.Namespace) -> None:
    """Both sides' accuracy and speed, and whether they agree item by item."""
    same = sum((a["acc"], a["acc_norm"]) == (b["acc"], b["acc_norm"]) for a, b in zip(ours, theirs, strict=True))
    apart = max(
        abs(value - float(response[0][0]))
        for a, b in zip(ours, theirs, strict=True)
        for value, response in zip(a["loglikelihoods"], b["resps"], strict=True)
    )
    print(f"{'side':<24} {'acc':>6} {'acc_norm':>9} {'seconds':>8} {'items/s':>8}")
    for (side, taken), lines in zip(seconds.items(), (ours, theirs), strict=True):
        acc, norm = (sum(line[name] for line in lines) / len(lines) for name in ("acc", "acc_norm"))
        print(f"{side:<24} {acc:6.3f} {norm:9.3f} {taken:8.1f} {len(lines) / taken:8.2f}")
    times = seconds["lm-evaluation-harness"] / seconds["medlora"]
    print(f"{same} of {len(ours)} items equal, log-likelihoods at most {apart:.1e} apart; {times:.1f} times as fast")
    if arguments.out:
        found = {"items": len(ours), "equal": same, "apart": apart, "seconds": seconds, "times": times}
        arguments.out.write_text(json.dumps(found | {"batch_size": arguments.batch_size}, indent=2) + "\n")


if __name__ == "__main__":
    main()
