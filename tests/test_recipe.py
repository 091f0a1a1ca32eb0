"""One error for every impossible recipe: file, line, field, value, what is allowed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from medlora.errors import RecipeError
from medlora.recipe import Recipe, load_recipe, shipped_recipes

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora:\n  rr: 4\n", ["line 2", "lora.rr", "did you mean `r`", "lora_alpha"]),
        ("loraa:\n  r: 4\n", ["line 1", "loraa", "did you mean `lora`"]),
        ("lora:\n  r: 0\n", ["line 2", "lora.r", "greater than or equal to 1", "0 given"]),
        ("lora:\n  lora_dropout: 1.5\n", ["line 2", "lora.lora_dropout", "less than 1", "1.5 given"]),
        ("training:\n  max_steps: -3\n", ["line 2", "training.max_steps", "-3 given"]),
        ("training:\n  max_steps: many\n", ["training.max_steps", "must be an integer", "'many' given"]),
        ("training:\n  max_steps: 2.5\n", ["training.max_steps", "2.5 given"]),
        ("training:\n  max_steps: true\n", ["training.max_steps", "True given"]),
        ("prompt:\n  template: lama2\n", ["prompt.template", "base, llama2", "did you mean `llama2`"]),
        ("lora: 5\n", ["lora", "section", "5 given"]),
        ("lora:\n\tr: 4\n", ["line 2", "tab", "spaces"]),
        ("lora:\n  r: 4\n  r: 8\n", ["line 3", "`r` is given twice"]),
        ("lora: [unclosed\n", ["line"]),
        ("- a\n- b\n", ["mapping", "lora"]),
        ("training: {max_steps: 5, warmup_steps: 5}\n", ["warmup_steps (5)", "max_steps (5)", "warmup_steps=0"]),
        ("training: {max_steps: 5, num_train_epochs: 2}\n", ["line 1", "max_steps or num_train_epochs, not both"]),
        ("training: {load_best_model_at_end: true}\n", ["line 1", "load_best_model_at_end needs eval_steps"]),
        ("data: {columns: {prompt: q}}\n", ["`prompt` and `completion` go together"]),
        ("data: {columns: {text: t, messages: m}}\n", ["not more than one"]),
        ("lora: {target_modules: 5}\n", ["target_modules", "all-linear", "5 given"]),
    ],
)
def test_impossible_recipes_are_explained(write: Write, text: str, parts: list[str]) -> None:
    file = write("r.yaml", text)
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    message = str(error.value)
    assert message.startswith(str(file)) and "\n" not in message
    for part in parts:
        assert part in message


def test_overrides_apply_and_are_named_in_errors(write: Write) -> None:
    file = write("r.yaml", "lora: {r: 4}\n")
    recipe = load_recipe(file, ["lora.r=8", "training.learning_rate=2e-4", "lora.target_modules=[q_proj]"])
    assert (recipe.lora.r, recipe.training.learning_rate, recipe.lora.target_modules) == (8, 2e-4, ["q_proj"])
    with pytest.raises(RecipeError, match=r"^--set lora.r=0: lora.r"):
        load_recipe(file, ["lora.r=0"])
    with pytest.raises(RecipeError, match=r"section\.field=value"):
        load_recipe(file, ["lora.r"])


def test_epochs_in_place_of_steps(write: Write) -> None:
    file = write("r.yaml", "training: {max_steps: 7, warmup_steps: 4, per_device_train_batch_size: 3}\n")
    by_epochs = load_recipe(file, ["training.num_train_epochs=1.5"])
    assert load_recipe(write("again.yaml", by_epochs.to_yaml())) == by_epochs
    for rows, steps in ((24, 6), (25, 8), (30, 8), (31, 9)):  # of six rows, the last of an epoch of fewer
        lasting = by_epochs.over(rows)
        assert (lasting.training.max_steps, lasting.training.num_train_epochs) == (steps, None)
        assert lasting == load_recipe(file, [f"training.max_steps={steps}"])
    with pytest.raises(RecipeError, match=r"warmup_steps \(4\) must be below max_steps \(3\)"):
        by_epochs.over(12)
    back = write("epochs.yaml", "training: {num_train_epochs: 2}\n")
    assert load_recipe(back, ["training.max_steps=9"]).over(1000).training.max_steps == 9
    with pytest.raises(RecipeError, match="not both"):
        load_recipe(file, ["training.num_train_epochs=2", "training.max_steps=9"])


def test_missing_and_unreadable_files(write: Write, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean `demo`"):
        load_recipe("dmo")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(write("latin.yaml", b"description: caf\xe9\n"))


def test_the_resolved_recipe_reads_back_as_itself(write: Write) -> None:
    recipe = load_recipe("llama2-medical")
    assert load_recipe(write("again.yaml", recipe.to_yaml())) == recipe
    assert set(yaml.safe_load(recipe.to_yaml())) == set(Recipe.model_fields)


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Recipe().lora.r = 3  # type: ignore[misc]


def test_the_original_script_is_written_out() -> None:
    r = load_recipe("llama2-medical")
    t = r.training
    assert r.base.model == "aboonaji/llama2finetune-v2" and r.base.quantization == "nf4"
    assert r.data.path == "aboonaji/wiki_medical_terms_llam2_format" and r.data.columns.text == "text"
    assert (r.lora.r, r.lora.lora_alpha, r.lora.lora_dropout) == (64, 16, 0.1)
    assert (t.per_device_train_batch_size, t.gradient_accumulation_steps, t.max_steps) == (2, 2, 100)
    assert (t.learning_rate, t.lr_scheduler_type, t.warmup_steps) == (5e-5, "linear", 0)
    assert t.gradient_checkpointing and t.logging_steps == 10 and t.save_steps is None
    assert r.generation.prompts == ["Please tell me about Ascariasis"] and r.generation.max_length == 300


def test_every_shipped_recipe_loads_and_begins_with_its_command() -> None:
    files = shipped_recipes()
    assert {file.stem for file in files} >= {"demo", "llama2-medical", "medquad"}
    for file in files:
        assert load_recipe(file).name == file.stem
        assert file.read_text(encoding="utf-8").startswith(f"# medlora train {file.stem}")
