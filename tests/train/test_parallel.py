"""Several processes that share every step: on a CPU by gloo, started as those of GPUs are."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import press_ctrl_c
from safetensors.torch import load_file
from torch import distributed

from medlora.data.prompts import Example
from medlora.errors import DataError, ModelError, RunError
from medlora.model.packed import PER_TOKEN, pack
from medlora.model.plan import Work
from medlora.train import parallel, run
from medlora.train.parallel import Team

Toy = Callable[..., Any]


def quiet(line: str) -> None:
    """Swallow progress lines."""


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that says it has two GPUs."""
    monkeypatch.setattr(parallel, "_visible", lambda: ["0", "1"])
    yield
    assert not distributed.is_initialized()


def test_two_train_what_one_does(toy: Toy, tmp_path: Path, two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over epochs, each of which ends with a step of one document; stopped on the way, and taken up by one alone."""
    recipe = toy("training.max_steps=14", rows=25)
    alone = run.train(recipe, tmp_path / "one", quiet)
    assert alone.manifest["data"]["train_rows"] % 4 == 1
    started: list[subprocess.Popen[bytes]] = []
    share = Team.share

    def told_to_end(team: Team, batch: Any) -> Any:
        """As a scheduler tells every process; the first alone has something to save."""
        started[:] = team.others
        for process in started:
            process.terminate()
        return share(team, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Team, "share", told_to_end)
        press_ctrl_c(9, patch)
        broken = run.train(recipe, tmp_path / "two", quiet, gpus=2)
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert not broken.finished and broken.manifest["steps"] == 9
    both = run.resume(broken.folder, quiet)

    losses = [[entry["loss"] for entry in each.manifest["loss_history"]] for each in (alone, both)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[1]) == 14
    assert both.manifest["trained_tokens"] == alone.manifest["trained_tokens"]
    assert both.manifest["after"]["loss"] == pytest.approx(alone.manifest["after"]["loss"], rel=1e-5)
    assert broken.manifest["device"].startswith("2 x ")
    one, other = (load_file(each.folder / "adapter" / "adapter_model.safetensors") for each in (alone, both))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-5)
    assert not list(both.folder.glob("*.log"))


def test_a_step_is_shared_out_whole() -> None:
    rows = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate((9, 2, 3, 4, 2))]
    batch = pack(rows)
    shares = [Team(rank, 3, Path()).share(batch) for rank in range(3)]
    assert [share["borders"][-1] for share in shares if share] == [9, 6, 5]
    for name in PER_TOKEN[:2]:
        found = torch.cat([share[name][0] for share in shares if share])
        assert sorted(found.tolist()) == sorted(batch[name][0].tolist())
    assert sum(sum(share["labelled"]) for share in shares if share) == sum(batch["labelled"])
    assert Team(1, 2, Path()).share(pack(rows[:1])) is None


def test_each_drops_out_by_itself_and_all_shuffle_alike() -> None:
    own, after = [], []
    for rank in range(2):
        torch.manual_seed(3)
        with Team(rank, 2, Path()).draws():
            own.append(torch.rand(rank + 3)[:3].tolist())
        after.append(torch.rand(3).tolist())
    assert own[0] != own[1] and after[0] == after[1] not in own


def test_gradients_that_cannot_be_shared_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise distributed.DistBackendError("NCCL error: no space left in /dev/shm\nLast error:")

    monkeypatch.setattr(distributed, "all_reduce", full)
    with pytest.raises(ModelError, match=r"no space left in /dev/shm \(NCCL_DEBUG=INFO"):
        Team(0, 2, Path()).added_up([torch.nn.Parameter(torch.zeros(3))], torch.zeros(()))


def test_the_plan_is_for_a_share(toy: Toy) -> None:
    rows = [Example("", [0] * n, [0] * n) for n in (900, 500, 300, 200, 100, 100, 100, 100)]
    recipe = toy()
    whole, half = Work.of(recipe, rows), Work.of(recipe, rows, 2)
    assert (whole.tokens, whole.steps, whole.samples) == (1900, (400, 1900), 4)
    assert (half.tokens, half.steps, half.samples) == (1000, (200, 1000), 2)


@pytest.mark.parametrize(
    ("gpus", "world", "message"),
    [(3, 1, "shows 2 GPUs"), (5, 1, "shows 2 GPUs"), (1, 2, "start it once, with --gpus N")],
)
def test_refuses_what_is_not_there(
    toy: Toy, tmp_path: Path, two: None, gpus: int, world: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(RunError, match=message):
        run.train(toy(), tmp_path / "run", quiet, gpus)
    assert not (tmp_path / "run").exists()


def test_refuses_what_two_cannot_share(toy: Toy, tmp_path: Path, two: None) -> None:
    with pytest.raises(RunError, match="a step has 1 samples; set training.gradient_accumulation_steps"):
        run.train(toy("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=1"), gpus=2)
    with pytest.raises(RunError, match="one GPU trains this, by the engine plain"):
        run.train(toy("training.engine=plain"), tmp_path / "run", quiet, 2)


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_one_that_ends_by_itself_ends_the_run(
    tmp_path: Path, exits: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "gpu-1.log"
    log.write_text("Loading\nerror: rows.jsonl: changed while the run began\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    parallel._watch(process, 1, log, threading.Event())  # type: ignore[arg-type]
    assert exits == [4]
    said = capsys.readouterr().err
    assert said == f"error: the process of GPU 1 ended: rows.jsonl: changed while the run began; see {log}\n"
    over = threading.Event()
    over.set()
    parallel._watch(process, 1, log, over)  # type: ignore[arg-type]
    assert exits == [4]


def test_none_outlives_the_first(exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    parallel._end_with_parent()
    assert exits == [1]


def test_other_rows_than_the_first_read_are_an_error(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(toy().to_yaml())
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while the run began"):
        parallel.follow(tmp_path, 1, 2, tmp_path / "meeting", "other", "auto", "")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("graphs", [False, True])
def test_two_gpus_train_what_one_does(toy: Toy, tmp_path: Path, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a GPU that is visible and not used, at first; with two, stopped and taken up again."""
    recipe = toy("base.compute_dtype=bfloat16", "training.max_steps=12", f"training.cuda_graphs={json.dumps(graphs)}")
    alone = run.train(recipe, tmp_path / "one", quiet)
    with monkeypatch.context() as patch:
        press_ctrl_c(5, patch)
        run.train(recipe, tmp_path / "two", quiet, gpus=2)
    both = run.resume(tmp_path / "two", quiet, gpus=2)
    one, two = ([entry["loss"] for entry in each.manifest["loss_history"]] for each in (alone, both))
    assert two == pytest.approx(one, rel=2e-3) and len(two) == 12
    assert both.manifest["energy_joules"] > 0
