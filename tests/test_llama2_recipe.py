"""The original script's recipe on a LLaMA-2-style checkpoint and data set, with the hub offline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS

from medlora.recipe import load_recipe
from medlora.train import run


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    """A folder as the hub lays it: data/train-00000-of-00001.parquet with one `text` column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [f"<s>[INST] Tell me about number {i} [/INST] {TEXTS[i % len(TEXTS)]} </s>" for i in range(40)]
    (tmp_path / "wiki" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": rows}), tmp_path / "wiki" / "data" / "train-00000-of-00001.parquet")
    return tmp_path / "wiki"


def test_the_original_script_runs_to_the_letter(llama_folder: Path, wiki: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        "recipes/llama2-medical.yaml",
        [f"base.model={llama_folder}", f"data.path={wiki}", "data.max_length=200", "training.max_steps=12",
         "data.valid_fraction=0.2", "generation.max_length=60", "training.logging_steps=5"],
    )  # fmt: skip
    result = run.train(recipe, tmp_path / "run", say=lambda line: None)

    assert result.finished
    config = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["task_type"]) == (
        64,
        16,
        0.1,
        "CAUSAL_LM",
    )
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    tokenizer_config = json.loads((result.folder / "adapter" / "tokenizer_config.json").read_text())
    assert tokenizer_config["pad_token"] == tokenizer_config["eos_token"] == "</s>"
    assert [entry["step"] for entry in result.manifest["loss_history"]] == [5, 10]
    assert not (result.folder / "checkpoints").exists()
    assert result.manifest["after"]["loss"] != result.manifest["before"]["loss"]


def test_rows_have_one_bos_and_a_trained_eos(llama_folder: Path, wiki: Path) -> None:
    recipe = load_recipe(
        "recipes/llama2-medical.yaml",
        [f"base.model={llama_folder}", f"data.path={wiki}", "data.max_length=200", "data.valid_fraction=0"],
    )
    prepared = run.prepare(recipe)
    bos, eos = prepared.tokenizer.bos_token_id, prepared.tokenizer.eos_token_id
    assert bos != eos
    for example in prepared.corpus.train:
        assert example.input_ids.count(bos) == 1 and example.input_ids[0] == bos
        assert example.labels[-1] == eos and example.input_ids.count(eos) == 1
        assert example.labels[1:] == example.input_ids[1:]  # loss on all


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_base_stays_in_four_bits(llama_folder: Path, wiki: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        "recipes/llama2-medical.yaml",
        [f"base.model={llama_folder}", f"data.path={wiki}", "data.max_length=200", "training.max_steps=4",
         "data.valid_fraction=0.1"],
    )  # fmt: skip
    prepared = run.prepare(recipe)
    from medlora.model.load import load_model

    model: Any = load_model(prepared.base, recipe.base)
    assert model.is_loaded_in_4bit
    assert run.train(recipe, tmp_path / "run", say=lambda line: None).finished
