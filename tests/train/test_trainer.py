"""The packed trainer by a memory plan: through the fused layers on a CPU, and out of memory in mid-step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from medlora.errors import ModelError, RecipeError
from medlora.model.adapter import add_lora
from medlora.model.graphs import Graphs
from medlora.model.load import load_model
from medlora.model.packed import pack, split
from medlora.model.plan import Pace, Plan, Replay, Shape, Work, plans
from medlora.recipe import load_recipe
from medlora.train.run import prepare
from medlora.train.trainer import Engine, PackedTrainer, choose_engine, make_trainer, running

Toy = Callable[..., Any]


def trainer_of(recipe: Any, folder: Path, start: Callable[[Plan], bool]) -> PackedTrainer:
    """A trainer whose engine is a GPU's: the fused layers, from the fastest plan that `start` accepts."""
    prepared = prepare(recipe)
    model = add_lora(load_model(prepared.base, recipe.base), recipe.lora, recipe.training.seed)
    found = plans(Shape.of(model.config), Work.of(recipe, prepared.corpus.train))
    engine = Engine(True, "", tuple(found), capacity=10**15)
    trainer = make_trainer(recipe, model, prepared.tokenizer, prepared.corpus.train, engine, folder, [])
    assert isinstance(trainer, PackedTrainer)
    trainer.plan = next(plan for plan in found if start(plan))
    return trainer


def losses(trainer: SFTTrainer) -> list[float]:
    with running(trainer):
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def runs_out(trainer: PackedTrainer, monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Out of memory in these backward passes, when the gradients have already been added to."""
    backward, count = trainer.accelerator.backward, [0]

    def failing(loss: torch.Tensor) -> None:
        backward(loss)
        count[0] += 1
        if count[0] in calls:
            raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(trainer.accelerator, "backward", failing)


def one_row(plan: Plan) -> bool:
    return plan.rows == 1 and plan.recompute == "none"


def replayed(plan: Plan) -> Plan:
    return replace(plan, replay=Replay(8, 0, 0, Pace(0, 0)), replayed=plan.row_tokens)


def test_out_of_memory_goes_on_without_losing_the_step(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy("lora.lora_dropout=0.1", "training.max_steps=5")
    unbroken = losses(trainer_of(recipe, tmp_path, one_row))
    trainer = trainer_of(recipe, tmp_path, one_row)
    smaller = next(p for p in trainer.engine.plans if p.rows == 1 and p.recompute == "full")
    monkeypatch.setattr("medlora.train.trainer.fall_back", lambda *_: smaller)
    runs_out(trainer, monkeypatch, {1, 4})
    assert losses(trainer) == unbroken and len(unbroken) == 5
    assert trainer.plan is smaller and trainer.fused is not None and trainer.fused.recompute == "full"
    assert "out of memory; going on with 1 row" in capsys.readouterr().err


def test_out_of_memory_down_to_more_rows(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy("training.max_steps=4")
    unbroken = losses(trainer_of(recipe, tmp_path, one_row))
    trainer = trainer_of(recipe, tmp_path, one_row)
    rows = next(p for p in trainer.engine.plans if p.recompute == "offload")
    rows = replace(rows, rows=4, row_tokens=50)
    monkeypatch.setattr("medlora.train.trainer.fall_back", lambda *_: rows)
    cut: list[int] = []

    def counted(batch: Any, limit: int) -> Any:
        found = split(batch, limit)
        cut.append(len(found))
        return found

    monkeypatch.setattr("medlora.train.trainer.split", counted)
    runs_out(trainer, monkeypatch, {2})
    assert losses(trainer) == pytest.approx(unbroken, rel=1e-5)
    assert cut[:2] == [1, 1] and all(n > 1 for n in cut[2:])


def test_a_step_goes_through_no_module_tree(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose hundreds of modules take longer than a short step's launches; what Transformers makes of it is the same."""
    trainer = trainer_of(toy("training.max_steps=3"), tmp_path, one_row)
    walks: list[int] = []
    wholes = trainer.model, trainer.model.get_base_model()
    named = torch.nn.Module.named_modules

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self in wholes and trainer.state.global_step > 0:
            walks.append(trainer.state.global_step)
        return named(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    every = list(trainer.model.parameters())
    with running(trainer):
        trainer.train()
        assert all(a is b for a, b in zip(trainer.model.parameters(), every, strict=True))
    assert not walks and "parameters" not in vars(trainer.model)
    assert not any(p.grad is not None for p in every) and trainer.state.log_history[0]["grad_norm"] > 0
    inputs = {"input_ids": torch.ones(1, 100)}
    assert trainer.floating_point_ops(inputs) == SFTTrainer.floating_point_ops(trainer, inputs) > 0


def test_no_row_is_longer_than_the_plan_allows() -> None:
    step = pack([{"input_ids": [5] * 1024, "labels": [5] * 1024} for _ in range(4)])
    for limit, rows in ((4096, 1), (2048, 2), (1408, 4), (1024, 4)):
        cut = split(step, limit)
        assert len(cut) == rows and max(row["borders"][-1] for row in cut) <= limit


def test_replayed_steps_are_those_launched_and_go_on_after_out_of_memory(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy("lora.lora_dropout=0.1", "training.max_steps=6", "base.compute_dtype=float32")
    unbroken = losses(trainer_of(recipe, tmp_path, one_row))
    replays: list[int] = []
    own = Graphs.own_gradients
    monkeypatch.setattr(Graphs, "own_gradients", lambda graphs: (replays.append(graphs.turn), own(graphs))[1])
    whole = [1, 2, 3, 4, 5]  # the first step is launched
    for calls, again, turns in (set(), True, whole), ({3}, False, [1, 2]), ({3}, True, [1, 2, 1, 2, 3, 4]):
        trainer = trainer_of(recipe, tmp_path, one_row)
        assert trainer.plan
        smaller = replayed(trainer.plan) if again else trainer.plan  # more rows would draw other dropout
        monkeypatch.setattr("medlora.train.trainer.fall_back", lambda *_, smaller=smaller: smaller)
        trainer.plan = replayed(trainer.plan)
        runs_out(trainer, monkeypatch, calls)
        assert losses(trainer) == pytest.approx(unbroken, rel=1e-5)
        assert replays == turns
        replays.clear()


@pytest.mark.parametrize("limit", [0.4, 1e-3])
def test_gradients_end_to_end_are_clipped_as_torch_clips_them(
    limit: float, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In some of the steps, and in all; the first is launched, and has its gradients apart."""
    recipe = toy("training.max_steps=5", "base.compute_dtype=float32", f"training.max_grad_norm={limit}")
    end_to_end: list[bool] = []
    clip = PackedTrainer._clip_grad_norm

    def noted(trainer: PackedTrainer, model: Any) -> Any:
        assert trainer.fused is not None and trainer.fused.graphs is not None
        end_to_end.append(trainer.fused.graphs.gradients is not None)
        return clip(trainer, model)

    found: list[list[float]] = []
    for ours, scaled in (SFTTrainer._clip_grad_norm, False), (noted, False), (noted, True):
        trainer = trainer_of(recipe, tmp_path, one_row)
        assert trainer.plan
        trainer.plan = replayed(trainer.plan)
        monkeypatch.setattr(PackedTrainer, "_clip_grad_norm", ours)
        if scaled:  # as float16's gradients are
            monkeypatch.setattr(trainer.accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=4096.0))
            monkeypatch.setattr(trainer.accelerator, "native_amp", True)
            monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
        found.append(losses(trainer))
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert min(norms) < limit < max(norms) or limit < min(norms)
        found[-1] += norms
    for each in found[1:]:
        assert each == pytest.approx(found[0], rel=1e-5) and len(each) == 10
    assert end_to_end == 2 * [False, True, True, True, True]


def test_a_resumed_run_replays_at_once(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its optimizer has its state."""
    recipe = toy("training.max_steps=4", "training.save_steps=2")
    steps: list[int] = []
    own = Graphs.own_gradients
    for checkpoint, expected in (None, [1, 2, 3]), (str(tmp_path / "checkpoint-2"), [2, 3]):
        trainer = trainer_of(recipe, tmp_path, one_row)
        assert trainer.plan
        trainer.plan = replayed(trainer.plan)

        def counting(graphs: Graphs, trainer: PackedTrainer = trainer) -> None:
            steps.append(trainer.state.global_step)
            own(graphs)

        monkeypatch.setattr(Graphs, "own_gradients", counting)
        with running(trainer):
            trainer.train(resume_from_checkpoint=checkpoint)
        assert steps == expected
        steps.clear()


def test_out_of_memory_at_the_smallest_plan_says_what_to_change(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(toy(), tmp_path, one_row)
    runs_out(trainer, monkeypatch, set(range(100)))
    with pytest.raises(ModelError, match="lower data.max_length"):
        losses(trainer)


def test_the_recipe_reaches_the_optimizer(toy: Toy, tmp_path: Path) -> None:
    trainer = trainer_of(toy("training.optim=paged_adamw_8bit"), tmp_path, one_row)
    assert trainer.args.optim == "paged_adamw_8bit" and trainer.args.per_device_train_batch_size == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused without a GPU")
def test_fp8_is_refused_where_it_cannot_run(toy: Toy) -> None:
    recipe = toy("training.fp8=true")
    model: Any = load_model(prepare(toy()).base, recipe.base, torch.device("cpu"))
    with pytest.raises(RecipeError, match=r"training\.fp8: not possible here.*GPU"):
        choose_engine(model, recipe)
    with pytest.raises(RecipeError, match=r"training\.fp8: needs a GPU"):
        prepare(recipe)
    with pytest.raises(RecipeError, match="fp8 needs the packed engine"):
        load_recipe("demo", ["training.fp8=true", "training.engine=plain"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_as_on_cards_before_ampere_trains_as_the_plain_engine_does(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import driver

    found: list[list[float]] = []
    for engine in "plain", "packed":
        if engine == "packed":
            driver.active.get_current_target()  # Triton goes on compiling for the card that is there
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        recipe = toy(
            f"training.engine={engine}", "base.compute_dtype=float16", "training.max_steps=12",
            "training.max_grad_norm=0.3",
        )  # fmt: skip
        prepared = prepare(recipe)
        model = add_lora(load_model(prepared.base, recipe.base), recipe.lora, recipe.training.seed)
        rows = prepared.corpus.train
        chosen = choose_engine(model, recipe, rows)
        trainer = make_trainer(recipe, model, prepared.tokenizer, rows, chosen, tmp_path, [])
        assert chosen.packed == bool(chosen.plan) == (engine == "packed") and trainer.accelerator.scaler is not None
        found.append(losses(trainer))
        assert trainer.accelerator.scaler.get_scale() > 1
    plain, packed = found
    assert len(plain) == 12 and packed == pytest.approx(plain, rel=0.01) and packed[-1] < 0.97 * packed[0]
