"""Every shipped recipe runs at toy size: two steps on a toy base, before and after."""

import json
from pathlib import Path

import pytest

from medlora.recipe import load_recipe
from medlora.train import run


@pytest.mark.parametrize("name", ["demo", "medquad"])
def test_a_shipped_recipe_runs(name: str, llama_folder: Path, tmp_path: Path) -> None:
    overrides = [f"base.model={llama_folder}", "prompt.template=llama2", "training.max_steps=2", "data.max_length=256",
                 "training.warmup_steps=0", "data.on_long_row=truncate", "generation.max_new_tokens=4"]  # fmt: skip
    if name == "medquad":
        rows = [
            {"focus": f"topic {i // 2}", "question": f"What is topic {i // 2}?", "answer": "A disease."}
            for i in range(60)
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        overrides.append(f"data.path={tmp_path / 'rows.jsonl'}")
    result = run.train(load_recipe(name, overrides), tmp_path / "run", lambda line: None)
    assert result.finished and {"before", "after"} <= result.manifest.keys()
    assert len(result.manifest["after"]["answers"]) == len(load_recipe(name).generation.prompts)
