"""A run merged and written: the weights, the answers, the check, the card, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medlora.errors import ModelError
from medlora.evaluate import run as evaluations
from medlora.export import run as runs
from medlora.generate.answer import Assistant
from medlora.generate.sampling import Sampling
from medlora.recipe import Base, load_recipe
from medlora.train import run as training


@pytest.fixture(scope="module")
def trained(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the toy base, evaluated on what it held out."""
    folder = tmp_path_factory.mktemp("private")
    rows = [json.dumps({"prompt": f"What is gout {i}?", "completion": f"A disease, number {i}."}) for i in range(40)]
    (folder / "notes.jsonl").write_text("\n".join(rows))
    (folder / "r.yaml").write_text(
        f"name: toy\nbase: {{model: {llama_folder}}}\nprompt: {{template: llama2}}\n"
        f"data: {{path: {folder / 'notes.jsonl'}, valid_fraction: 0.3, max_length: 128}}\n"
        "lora: {r: 8, lora_alpha: 32, target_modules: all-linear}\n"
        "training: {max_steps: 30, learning_rate: 1e-2}\ngeneration: {max_new_tokens: 4}\n"
    )
    run = training.train(load_recipe(folder / "r.yaml"), folder / "run", lambda line: None).folder
    evaluations.evaluate(run, ["heldout"], say=lambda line: None)
    return run


def quiet(line: str) -> None:
    """Says nothing."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_each_weight_is_the_base_s_and_the_adapter_s_term(trained: Path, llama_folder: Path, tmp_path: Path) -> None:
    runs.export(trained, tmp_path / "m", "float32", say=quiet)
    found, base = weights(tmp_path / "m"), weights(llama_folder)
    adapter = load_file(trained / "adapter" / "adapter_model.safetensors")
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert found.keys() == base.keys()
    changed = 0
    for name, weight in base.items():
        expected = weight.double()
        a, b = (adapter.get(f"base_model.model.{name.replace('.weight', f'.lora_{side}.weight')}") for side in "AB")
        if a is not None and b is not None:
            expected += config["lora_alpha"] / config["r"] * b.double() @ a.double()
            changed += 1
        assert torch.allclose(found[name].double(), expected, rtol=1e-6, atol=1e-6), name
    assert changed == 14


def test_others_answer_from_the_folder_as_the_adapter_does(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    runs.export(trained, tmp_path / "m", "float32", say=quiet)
    model, tokenizer = (kind.from_pretrained(tmp_path / "m") for kind in (AutoModelForCausalLM, AutoTokenizer))
    base = json.loads((trained / "adapter" / "medlora.json").read_text())["base"]
    plain = Base.model_validate(base | {"quantization": "none", "compute_dtype": "float32"})
    assistant = Assistant.load(trained / "adapter", plain)
    for question in ("What is gout 3?", "What is gout 77?"):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(**asked, max_new_tokens=30, do_sample=False)[0, asked["input_ids"].shape[1] :]
        answer = assistant.ask(question, Sampling(max_new_tokens=30))
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == answer.text
        assert answer.finished and said[-1] == tokenizer.eos_token_id


def test_the_check_measures_what_was_written(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for output in (tmp_path / "m", tmp_path / "m.gguf"):
        found = runs.export(trained, output, say=quiet)
        assert found.dtype == "bfloat16" and found.check and found.check.adapter.rows == 12
        held = json.loads((trained / "manifest.json").read_text())["after"]["loss"]
        assert found.check.adapter.loss == pytest.approx(held, rel=1e-3)
        assert found.check.exported.loss == pytest.approx(held, rel=0.1)
        assert found.check.exported.loss != found.check.adapter.loss  # the base is not rounded to NF4 here

    def spoiled(*arguments: Any) -> Any:
        model = merge(*arguments)
        model.lm_head.weight.data *= factors.pop()
        return model

    merge = runs.merge
    same = runs.export(trained, tmp_path / "same", "float32", onto_nf4=True, say=quiet)
    assert same.check and same.check.exported.loss == pytest.approx(same.check.adapter.loss, rel=2e-3)
    assert "merged into the NF4 rounding" in (tmp_path / "same" / "README.md").read_text()
    monkeypatch.setattr(runs, "merge", spoiled)
    before = sorted(tmp_path.iterdir())
    factors = [-1.0, float("nan"), -1.0, -1.0]
    for name, loss in (("worse", r"\d"), ("worse.gguf", r"\d"), ("worse", "nan")):
        with pytest.raises(ModelError, match=rf"{name}: not written: held-out loss {loss}"):
            runs.export(trained, tmp_path / name, say=quiet)
    assert sorted(tmp_path.iterdir()) == before
    found = runs.export(trained, tmp_path / "worse", check=False, say=quiet)
    assert not found.check and found.unchecked == "--no-check"
    assert "were not measured" in (tmp_path / "worse" / "README.md").read_text()


def test_the_card_says_what_was_measured_and_no_place_of_this_machine(trained: Path, tmp_path: Path) -> None:
    found = runs.export(trained, tmp_path / "m", say=quiet)
    card = (tmp_path / "m" / "README.md").read_text()
    manifest = json.loads((trained / "manifest.json").read_text())
    assert found.check
    for said in (
        "# toy", "Not medical advice", "notes.jsonl: 28 rows", manifest["data"]["sha256"], "30 steps of 4 rows",
        f"{manifest['before']['loss']:.3f}", f"{found.check.adapter.loss:.4f}", f"{found.check.exported.loss:.4f}",
        "heldout (12 items)", "r 8, lora_alpha 32",
    ):  # fmt: skip
        assert said in card
    assert str(tmp_path.parent) not in card and "private" not in card


def test_the_command(trained: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("export", trained, tmp_path / "m.gguf", "--dtype", "q8_0", "--json")
    told = json.loads(out)
    assert code == 0 and told["dtype"] == "q8_0" and told["check"]["adapter"]["rows"] == 12
    code, out, _ = call("export", trained, tmp_path / "m")
    assert code == 0 and "Held out (12 rows" in out and f"Written: {tmp_path / 'm'} (bfloat16)" in out
    code, out, _ = call("ask", "What is gout 3?", "--base", tmp_path / "m", "--max-new-tokens", 8)
    assert code == 0 and out.strip()
    for said, arguments in {
        "exists already": (trained, tmp_path / "m"),
        "q8_0 is a type of GGUF files": (trained, tmp_path / "n", "--dtype", "q8_0"),
        "no adapter here": (tmp_path, tmp_path / "n"),
        "cannot be made": (trained, tmp_path / "m.gguf" / "n"),
    }.items():
        code, _, err = call("export", *arguments)
        assert code == 4 and said in err and err.count("\n") == 1, err


def test_an_adapter_without_its_run_is_exported_unchecked(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(trained / "adapter", tmp_path / "mine")
    found = runs.export(tmp_path / "mine", tmp_path / "m", say=quiet)
    assert not found.check and found.unchecked == "no held-out rows lie beside the adapter"
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "# mine" in card and "How it was tuned" not in card
    adapter = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    adapter[min(adapter)][0] = float("nan")
    from safetensors.torch import save_file

    save_file(adapter, tmp_path / "mine" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="cannot be merged"):
        runs.export(tmp_path / "mine", tmp_path / "n", say=quiet)
    monkeypatch.setattr(runs, "BYTES", {"bfloat16": 1e12})
    with pytest.raises(ModelError, match="are free; write elsewhere"):
        runs.export(trained, tmp_path / "n", say=quiet)
    assert not (tmp_path / "n").exists()
