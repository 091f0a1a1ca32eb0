"""The command line as a new user meets it: help, one-sentence errors with exit codes, JSON, chat."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medlora import doctor
from medlora.cli.imports import importing
from medlora.errors import MedloraError
from medlora.generate.answer import NOTICE
from medlora.train import run

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def medlora(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: Cli) -> Cli:
    """`call`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture(scope="module")
def adapter(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, trained on the toy base."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [json.dumps({"prompt": f"Question {i}?", "completion": "An answer."}) for i in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "r.yaml").write_text(
        f"name: toy\nbase: {{model: {llama_folder}}}\nprompt: {{template: llama2}}\n"
        f"data: {{path: {folder / 'rows.jsonl'}, valid_fraction: 0.3, max_length: 128}}\n"
        "training: {max_steps: 2}\ngeneration: {max_new_tokens: 4}\n"
    )
    from medlora.recipe import load_recipe

    return run.train(load_recipe(folder / "r.yaml"), folder / "run", lambda line: None).folder


def test_help_starts_fast_because_nothing_heavy_is_imported() -> None:
    heavy = "('torch', 'transformers', 'pydantic', 'rich')"
    code = f"import sys, medlora.cli; sys.exit(any(module in sys.modules for module in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("command", [[], ["train"], ["ask"], ["chat"], ["recipes"], ["recipes", "show"], ["doctor"]])
def test_every_command_has_help(medlora: Cli, command: list[str]) -> None:
    code, out, _ = medlora(*command, "--help")
    assert code == 0 and "Usage:" in out and len(out) > 100


def test_recipes_list_and_show(medlora: Cli) -> None:
    assert "llama2-medical" in medlora("recipes", "list")[1]
    assert set(json.loads(medlora("recipes", "list", "--json")[1])) >= {"demo", "medquad"}
    assert "# medlora train demo" in medlora("recipes", "show", "demo")[1]
    shown = json.loads(medlora("recipes", "show", "demo", "--set", "lora.r=3", "--json")[1])
    assert shown["lora"]["r"] == 3 and shown["training"]["seed"] == 42


def test_doctor_reports_versions_and_what_fits(medlora: Cli) -> None:
    code, out, _ = medlora("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["versions"]["torch"] and report["device"]["free_bytes"] > 0
    sizes = [entry["estimated_bytes"] for entry in report["can_train"]]
    assert sizes == sorted(sizes) and report["can_train"][0]["fits"]
    assert "Llama-2-7B" in medlora("doctor")[1]


def test_doctor_says_where_python_compiles_anew(medlora: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = tmp_path / "torch" / "__pycache__" / "__init__.pyc"
    assert not doctor.compiles_anew(None)
    for forbidden in (True, False):
        monkeypatch.setattr(sys, "dont_write_bytecode", forbidden)
        assert doctor.compiles_anew(str(compiled)) == forbidden
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert not doctor.compiles_anew(str(compiled))
    for anew in (True, False):
        monkeypatch.setattr(doctor, "compiles_anew", lambda _, anew=anew: anew)
        assert ("PYTHONPYCACHEPREFIX" in medlora("doctor")[1]) == anew


def test_doctor_plans_a_recipe_without_training(medlora: Cli, toy: Callable[..., Any], tmp_path: Path) -> None:
    toy()
    code, out, _ = medlora("doctor", "--recipe", "toy.yaml", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["rows"] == 1 and 0 < plan["peak_bytes"] < plan["capacity_bytes"]
    larger = ("--set", "training.per_device_train_batch_size=8", "--set", "data.max_length=256")
    assert (
        json.loads(medlora("doctor", "--recipe", "toy.yaml", "--json", *larger)[1])["peak_bytes"] > plan["peak_bytes"]
    )
    assert medlora("doctor", "--recipe", "toy.yaml")[1].startswith("Plan: 1 row of up to")
    assert medlora("doctor", "--recipe", "toy.yaml", "--set", "training.engine=plain")[0] == 2
    shared = json.loads(medlora("doctor", "--recipe", "toy.yaml", "--gpus", "2", "--json")[1])
    assert (
        plan["row_tokens"] / 2 <= shared["row_tokens"] < plan["row_tokens"]
        and shared["peak_bytes"] < plan["peak_bytes"]
    )
    assert medlora("doctor", "--gpus", "2")[2] == "error: --gpus is about a recipe; give it with --recipe\n"
    assert medlora("doctor", *larger)[0] == 2 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["train", "nowhere.yaml"], 2, "no such recipe file"),
        (["train"], 2, "give a RECIPE, or --resume"),
        (["train", "demo", "--set", "lora.r=0"], 2, "--set lora.r=0"),
        (["train", "demo", "--set", "data.path=missing.csv"], 3, "missing.csv: no such file"),
        (["train", "demo", "--set", "base.model=./missing"], 4, "no such folder or file"),
        (["train", "--resume", "nowhere"], 6, "not a run of medlora"),
        (["ask", "hi", "--adapter", "nowhere"], 4, "no adapter here"),
        (["ask", "hi", "--base", "nobody/nothing", "--offline"], 4, "--offline forbids"),
        (["ask"], 2, "Missing argument 'QUESTION'"),
        (["trian"], 2, "No such command"),
    ],
)
def test_errors_are_one_sentence_with_an_exit_code(
    medlora: Cli, arguments: list[str], code: int, part: str, embedded: Path
) -> None:
    got, out, err = medlora(*arguments)
    assert got == code and part in err and "Traceback" not in err + out


def test_a_full_gpu_is_one_sentence_and_other_runtime_errors_are_ours(
    medlora: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("a fault")]
    monkeypatch.setattr(run, "train", lambda *_: (_ for _ in ()).throw(raised.pop(0)))
    code, out, err = medlora("train", "demo")
    assert code == 4 and "memory is full" in err and "Traceback" not in err + out
    with pytest.raises(RuntimeError, match="a fault"):
        medlora("train", "demo")


def test_each_kind_of_error_has_its_own_exit_code() -> None:
    codes = [kind.exit_code for kind in MedloraError.__subclasses__()]
    assert len(set(codes)) == len(codes) == 5 and 0 not in codes


def test_preview_shows_each_token_with_its_mask(medlora: Cli, toy: Callable[..., Any], tmp_path: Path) -> None:
    toy()
    code, out, _ = medlora("train", "toy.yaml", "--preview")
    assert code == 0 and "|" in out and "</s>" in out and "rows to train on" in out
    lines = out.splitlines()
    assert lines[1].startswith("  <s>") and any(line == "| </s>" for line in lines)
    assert not (tmp_path / "runs").exists()


def test_ask_streams_with_a_notice_and_compare_shows_both(medlora: Cli, adapter: Path) -> None:
    code, out, _ = medlora("ask", "Question 1?", "--adapter", adapter, "--max-new-tokens", "4", "--compare")
    assert code == 0 and "untuned:" in out and "tuned:" in out and out.rstrip().endswith(NOTICE)
    assert NOTICE not in medlora("ask", "Question 1?", "--adapter", adapter, "--max-new-tokens", "4", "--no-notice")[1]


def test_json_answers_carry_no_notice(medlora: Cli, adapter: Path) -> None:
    code, out, _ = medlora("ask", "Question 1?", "--adapter", adapter, "--max-new-tokens", "4", "--compare", "--json")
    answer = json.loads(out)
    assert code == 0 and set(answer) == {"question", "untuned", "tuned"} and answer["tuned"]["tokens"] <= 4
    assert NOTICE not in out


def test_ask_finds_the_newest_run(medlora: Cli, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(adapter)
    code, _, err = medlora("ask", "hi", "--max-new-tokens", "2")
    assert code == 0 and "(adapter: runs/toy)" in err


def test_chat_keeps_history_resets_and_switches(medlora: Cli, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, bool]] = []

    def stream(self: Any, messages: Any, settings: Any, *, tuned: bool) -> Any:
        heard.append((len(messages), tuned))
        yield "fine"

    monkeypatch.setattr("medlora.generate.answer.Assistant.stream", stream)
    said = "one\ntwo\n/base\nthree\n/reset\nfour\n/what\n/exit\n"
    code, out, _ = medlora("chat", "--adapter", adapter, stdin=said)
    assert code == 0 and heard == [(1, True), (3, True), (5, False), (1, False)]
    assert "(forgotten)" in out and "(untuned model answers)" in out and "no command /what" in out
    assert out.count(NOTICE) == 1


def test_the_adapter_of_another_base_is_refused(medlora: Cli, adapter: Path, embedded: Path) -> None:
    code, _, err = medlora("ask", "hi", "--adapter", adapter, "--base", embedded)
    assert code == 4 and "trained on another base" in err


def test_a_base_without_a_chat_template_is_given_one_and_no_other_model_is(
    medlora: Cli, adapter: Path, llama_folder: Path
) -> None:
    asked = ("ask", "hi", "--max-new-tokens", "2")
    code, _, err = medlora(*asked, "--base", llama_folder)
    assert code == 2 and "--template llama2" in err
    assert medlora(*asked, "--base", llama_folder, "--template", "llama2")[0] == 0
    code, _, err = medlora(*asked, "--adapter", adapter, "--template", "llama2")
    assert code == 2 and "leave out --template" in err


def test_train_prints_the_manifest_as_json(medlora: Cli, toy: Callable[..., Any]) -> None:
    toy()
    code, out, _ = medlora("train", "toy.yaml", "--set", "training.max_steps=1", "--json", "--output", "out")
    assert code == 0 and json.loads(out)["status"] == "finished"


def test_ctrl_c_saves_and_says_how_to_go_on(
    medlora: Cli, toy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from medlora.train.callbacks import Watch

    toy()
    saves: list[bool] = []
    on_step_begin, on_step_end = Watch.on_step_begin, Watch.on_step_end

    def ended(self: Watch, args: Any, state: Any, control: Any, **rest: Any) -> None:
        saves.append(control.should_save)
        on_step_end(self, args, state, control, **rest)

    def interrupted(self: Watch, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        on_step_begin(self, args, state, control, **rest)

    monkeypatch.setattr(Watch, "on_step_begin", interrupted)
    monkeypatch.setattr(Watch, "on_step_end", ended)
    code, _, err = medlora("train", "toy.yaml", "--output", "out")
    assert saves == [False, True]  # its clock stops for a checkpoint that Ctrl-C asks for
    assert code == 130 and "go on with: medlora train --resume out" in err
    monkeypatch.setattr(Watch, "on_step_begin", on_step_begin)
    code, out, _ = medlora("train", "--resume", "out")
    assert code == 0 and "Going on from out/checkpoints/checkpoint-2" in out


def test_garbage_is_looked_for_again_after_imports() -> None:
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
