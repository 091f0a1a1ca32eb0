"""A run end to end on a toy base: what it saves, how it stops, resumes and refuses, and that its losses are TRL's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import press_ctrl_c

from medlora.errors import DataError, ModelError, RecipeError, RunError
from medlora.evaluate.loss import HeldOut, held_out_loss
from medlora.model.load import load_model
from medlora.model.packed import packed_loss, packing
from medlora.recipe import load_recipe
from medlora.train import run

Toy = Callable[..., Any]


def quiet(line: str) -> None:
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_saves_everything_that_a_user_needs(toy: Toy, tmp_path: Path) -> None:
    result = run.train(toy("training.tensorboard=true"), tmp_path / "run", quiet)
    folder = result.folder
    for name in ("recipe.yaml", "manifest.json", "metrics.jsonl", "loss.png"):
        assert (folder / name).stat().st_size > 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (folder / "adapter" / name).stat().st_size > 0
    assert list(folder.rglob("events.out.tfevents*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["steps"] == 4
    assert manifest["versions"]["torch"] == torch.__version__
    assert len(manifest["data"]["sha256"]) == 64
    assert [entry["step"] for entry in manifest["loss_history"]] == [1, 2, 3, 4]
    assert manifest["after"]["loss"] < manifest["before"]["loss"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_recipe(folder / "recipe.yaml") == toy("training.tensorboard=true")


def test_trained_tokens_are_counted_without_padding(toy: Toy, tmp_path: Path) -> None:
    packed = run.train(toy(), tmp_path / "packed", quiet).manifest
    plain = run.train(toy("training.engine=plain"), tmp_path / "plain", quiet).manifest
    assert packed["trained_tokens"] == plain["trained_tokens"] > 0


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_losses_are_those_of_a_plain_trl_script(toy: Toy, tmp_path: Path, loss_on: str) -> None:
    """20 steps against TRL + PEFT + bitsandbytes as a user would write them, with equal seed and data."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    recipe = toy(
        "training.max_steps=20", "training.learning_rate=2e-3", f"prompt.loss_on={loss_on}", "data.valid_fraction=0"
    )
    ours = run.train(recipe, tmp_path / "run", quiet).manifest["loss_history"]

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        recipe.base.model, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    tokenizer = AutoTokenizer.from_pretrained(recipe.base.model)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    rows = [json.loads(line) for line in Path(recipe.data.path).read_text().splitlines()]
    pairs = [{"prompt": f"[INST] {r['prompt']} [/INST]", "completion": f" {r['completion']} </s>"} for r in rows]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=20, learning_rate=2e-3, logging_steps=1, seed=42, use_cpu=True, bf16=False, report_to=[],
            save_strategy="no",
            lr_scheduler_type="linear", disable_tqdm=True, completion_only_loss=loss_on == "completion",
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == 20 and theirs[-1] < theirs[0] - 0.1
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(reference, rel=0.01)


def test_a_resumed_run_equals_an_unbroken_one(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy("training.max_steps=6", "lora.lora_dropout=0.1")
    unbroken = run.train(recipe, tmp_path / "unbroken", quiet)

    with monkeypatch.context() as patch:
        press_ctrl_c(3, patch)
        broken = run.train(recipe, tmp_path / "broken", quiet)
    assert not broken.finished and broken.manifest["status"] == "interrupted" and broken.manifest["steps"] == 3
    assert weights(broken.folder)  # what there is, is saved

    resumed = run.resume(broken.folder, quiet)
    assert resumed.finished and resumed.manifest["trained_tokens"] == unbroken.manifest["trained_tokens"]
    losses = [[e["loss"] for e in r.manifest["loss_history"]] for r in (unbroken, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, weight in weights(unbroken.folder).items():
        torch.testing.assert_close(weights(resumed.folder)[name], weight, rtol=1e-6, atol=1e-8)
    with pytest.raises(RunError, match="this run is finished"):
        run.resume(resumed.folder, quiet)


@pytest.mark.parametrize("engine", ["packed", "plain"])
def test_the_adapter_of_the_lowest_held_out_loss_is_kept(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Which is said to be that of the third step; also after an interruption, and measuring changes no step."""
    given = ["lora.lora_dropout=0.1", "training.max_steps=8", f"training.engine={engine}"]
    bare = run.train(toy(*given), tmp_path / "bare", quiet)
    measure, within = run.held_out_loss, []

    def third_is_lowest(model: Any, rows: Any, title: str | None, **how: Any) -> HeldOut:
        found = measure(model, rows, title, **how)
        if title is None:
            within.append(found.loss)
        return replace(found, loss=found.loss - (len(within) == 1))

    monkeypatch.setattr(run, "held_out_loss", third_is_lowest)
    recipe = toy(*given, "training.eval_steps=3", "training.load_best_model_at_end=true")
    with monkeypatch.context() as patch:
        press_ctrl_c(5, patch)
        broken = run.train(recipe, tmp_path / "best", quiet)
    assert broken.manifest["best_step"] == 3
    said: list[str] = []
    best = run.resume(broken.folder, said.append)

    history, plain = best.manifest["loss_history"], bare.manifest["loss_history"]
    assert [e["loss"] for e in history] == pytest.approx([e["loss"] for e in plain], rel=1e-6)
    held = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
    assert list(held) == [3, 6, 8] and held[8] == pytest.approx(bare.manifest["after"]["loss"], rel=1e-6)
    assert best.manifest["best_step"] == 3 and f"Kept the adapter of step 3, held-out loss {held[3]:.4f}" in said
    assert best.manifest["after"]["loss"] == pytest.approx(within[0], rel=1e-6) != within[2]


def test_on_a_gpu_that_a_run_has_filled_rows_are_measured_by_themselves(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = run.prepare(toy())
    model, rows = load_model(prepared.base, prepared.recipe.base), prepared.corpus.valid
    expected = held_out_loss(model, rows, None)

    def full(model: Any, batch: Any) -> Any:
        if len(batch["borders"]) > 2:
            raise torch.OutOfMemoryError
        return packed_loss(model, batch)

    monkeypatch.setattr("medlora.evaluate.loss.packed_loss", full)
    with packing(model):
        found = held_out_loss(model, rows, None, routed=True)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6) and found.tokens == expected.tokens
    with pytest.raises(torch.OutOfMemoryError):  # where nothing else has filled it, it is too small
        held_out_loss(model, rows, None)


def test_resume_refuses_what_is_no_run_or_has_other_data(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="not a run of medlora"):
        run.resume(tmp_path, quiet)
    recipe = toy("training.save_steps=2")
    monkeypatch.setattr(run, "_measure", lambda *a, **k: (_ for _ in ()).throw(RuntimeError) if k["tuned"] else {})
    with pytest.raises(RuntimeError):  # a crash after training
        run.train(recipe, tmp_path / "run", quiet)
    rows = Path(recipe.data.path)
    rows.write_text(rows.read_text().replace("Question 1:", "Question one:"))
    with pytest.raises(RunError, match="the data has changed since this run began"):
        run.resume(tmp_path / "run", quiet)


def test_epochs_are_counted_in_steps_before_the_run_begins(toy: Toy, tmp_path: Path) -> None:
    said: list[str] = []
    result = run.train(toy("training.num_train_epochs=0.5"), tmp_path / "run", said.append)
    assert result.manifest["data"]["train_rows"] == 21  # six steps an epoch, the last of one row
    assert result.manifest["steps"] == 3 and "3 steps of 4 rows, 0.5 epochs" in said
    assert load_recipe(result.folder / "recipe.yaml").training.max_steps == 3


def test_a_folder_that_holds_a_run_is_never_overwritten(toy: Toy, tmp_path: Path) -> None:
    run.train(toy("training.max_steps=1"), tmp_path / "run", quiet)
    before = (tmp_path / "run" / "manifest.json").read_text()
    with pytest.raises(RunError, match=r"already holds files.*--resume"):
        run.train(toy("training.max_steps=1"), tmp_path / "run", quiet)
    assert (tmp_path / "run" / "manifest.json").read_text() == before


def test_without_an_output_runs_are_numbered(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [run.train(toy("training.max_steps=1"), None, quiet).folder for _ in range(2)]
    assert folders == [Path("runs/toy"), Path("runs/toy-2")]


@pytest.mark.parametrize(
    ("overrides", "rows", "error", "part"),
    [
        (["data.max_length=300"], 24, RecipeError, "more than the base's context of 256"),
        (["data.max_length=8"], 24, DataError, "longer than data.max_length"),
        (["data.on_long_row=error", "data.max_length=12"], 24, DataError, "tokens, more than data.max_length"),
        ([], 1, DataError, "cannot be split"),
        (["training.eval_steps=2", "data.valid_fraction=0"], 24, RecipeError, "no rows are held out"),
        (["data.path=/nowhere.jsonl"], 24, DataError, "no such file"),
        (["lora.target_modules=[q_prj]"], 24, ModelError, "q_proj"),
    ],
)
def test_what_cannot_work_is_refused(
    toy: Toy, tmp_path: Path, overrides: list[str], rows: int, error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part) as raised:
        run.train(toy(*overrides, rows=rows), tmp_path / "run", quiet)
    assert "\n" not in str(raised.value)


def test_nothing_is_written_before_the_data_is_accepted(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run.train(toy("data.path=/nowhere.jsonl"), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_no_number(toy: Toy, tmp_path: Path) -> None:
    runs = [
        run.train(toy(f"training.gradient_checkpointing={on}", "lora.lora_dropout=0.1"), tmp_path / on, quiet)
        for on in ("true", "false")
    ]
    first, second = (weights(r.folder) for r in runs)
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=1e-5, atol=1e-7)
