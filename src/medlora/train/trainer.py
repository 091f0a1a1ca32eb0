"""TRL's SFTTrainer over rows that are already tokenized, with an optional packed step.

Plain: TRL's own padded micro-batches and loss. Packed: the samples of a step become rows without padding (one on
a CPU, and on a GPU as many as the memory plan says) and the loss is the token mean over the whole step, the same
mathematics. A step that runs out of memory is computed again by a smaller plan.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from medlora.data.build import to_dataset
from medlora.data.prompts import Example, Tokenizer
from medlora.errors import ModelError, RecipeError
from medlora.model.fused import Fused
from medlora.model.graphs import Rows
from medlora.model.load import compute_dtype
from medlora.model.packed import Batch, pack, packed_loss, packing, split, unfused, unsupported
from medlora.model.plan import Plan, Shape, Work, capacity_of, choose, fall_back, plans, resources
from medlora.recipe import Recipe
from medlora.train.parallel import Team


@dataclass(frozen=True, slots=True)
class Engine:
    packed: bool
    why: str
    """One line for the user: which path runs, and why."""
    plans: tuple[Plan, ...] = ()
    """How the fused layers may run, fastest first; empty where others run."""
    fp8: bool = False
    capacity: int = 0
    """Bytes of the device's memory that a plan may take."""

    @property
    def plan(self) -> Plan | None:
        return choose(self.plans, self.capacity) if self.plans else None


def choose_engine(model: Any, recipe: Recipe, train: Sequence[Example] = (), gpus: int = 1) -> Engine:
    """Which path trains this model, and how it fits the memory, by the longest of the rows that it will see.

    Args:
        gpus: how many share every step.

    Raises:
        RecipeError: training.fp8 where it cannot run.
    """
    fp8 = recipe.training.fp8
    if recipe.training.engine == "plain":
        return Engine(False, "plain: TRL's padded micro-batches, as training.engine asks")
    obstacle = unsupported(model, recipe.data.max_length)
    if not obstacle and int(torch.distributed.is_initialized()):
        obstacle = "several processes"
    slower = obstacle or unfused(model, fp8)
    if fp8 and slower:
        raise RecipeError(f"training.fp8: not possible here, since {slower}; set training.fp8: false")
    if obstacle:
        return Engine(False, f"plain: TRL's padded micro-batches, since {obstacle}")
    why = "packed: rows without padding, attention kept inside each document"
    if slower:
        on_gpu = model.device.type == "cuda"
        return Engine(True, f"{why}; Transformers' layers rather than fused ones, since {slower}" if on_gpu else why)
    work = Work.of(recipe, train, gpus, **resources(model.device, model.get_input_embeddings().weight.element_size()))
    return Engine(True, why, tuple(plans(Shape.of(model.config), work)), fp8, _capacity(recipe, model.device))


def takes_whole_steps(engine: Engine, device: torch.device) -> bool:
    """Whether the samples of a step pass together, rather than micro-batch by micro-batch."""
    return engine.packed and (device.type == "cpu" or engine.plan is not None)


def _capacity(recipe: Recipe, device: torch.device) -> int:
    """Bytes that a run may take on a GPU, the model that lies there included."""
    if device.type != "cuda":
        return 0
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return capacity_of(recipe, free)


class PackedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose step is one packed row, or several by the memory plan."""

    engine: Engine
    plan: Plan | None = None
    fused: Fused | None = None
    team: Team | None = None
    """The processes that share every step, where there are several."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.train()  # whole: a new adapter over a base in evaluation would itself say that it trains

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A whole optimizer step; also without Transformers' walk over every module, which a short step on a GPU
        waits for. Out of memory, it is computed again from the same draws by the next smaller plan.

        Raises:
            ModelError: the smallest plan does not fit.
        """
        if not model.training:
            model.train()
        if self.fused:  # graphs would take what the optimizer's state needs, which is not there before its first step
            self.fused.replays = bool(self.optimizer.state)
        if self.team is None:
            return self._passed(model, inputs, num_items_in_batch)
        self.team.gradients = None  # of the last step
        mine, total = self.team.share(inputs), _labelled(inputs, num_items_in_batch)
        with self.team.draws():
            loss = self._passed(model, mine, total) if mine else torch.zeros((), device=self.model.device)
        return self.team.added_up([p for p in model.parameters() if p.requires_grad], loss)

    def _passed(self, model: Any, inputs: Batch, num_items_in_batch: Any) -> Tensor:
        while True:
            draws = torch.get_rng_state()
            try:
                return self._rows(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError:
                pass  # what the rows held is freed only once the exception is gone
            torch.set_rng_state(draws)
            model.zero_grad(set_to_none=True)
            self._fall_back()

    def _rows(self, model: Any, inputs: Batch, num_items_in_batch: Any) -> Tensor:
        """Forward and backward of each row; the summed loss."""
        losses, total = [], _labelled(inputs, num_items_in_batch, self.current_gradient_accumulation_steps)
        for row in split(inputs, self.plan.row_tokens if self.plan else inputs["borders"][-1]):
            loss = self.compute_loss(model, row, num_items_in_batch=total)
            self.accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @cached_property
    def _weights(self) -> int:
        return int(self.model.num_parameters(exclude_embeddings=True))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As Transformers counts them, which counts the weights again in every step."""
        tokens: int = inputs["input_ids"].numel()
        return 6 * tokens * self._weights

    def _clip_grad_norm(self, model: Any) -> Any:
        """As torch does, but in one piece where gradients lie end to end: hundreds take the host longer than a short
        row's passes."""
        graphs = self.fused.graphs if self.fused else None
        gradients = self.team.gradients if self.team else graphs.gradients if graphs else None
        if gradients is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        norm = torch.linalg.vector_norm(gradients)
        gradients.mul_((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _fall_back(self) -> None:
        smaller = fall_back(self.engine.plans, self.plan) if self.plan else None
        if smaller is None or self.fused is None:
            raise ModelError(
                "the GPU's memory does not hold a step, even by the smallest plan that the recipe allows; lower "
                "data.max_length or training.per_device_train_batch_size, or set training.gradient_checkpointing=auto"
            )
        self.plan = smaller
        self.fused.change(**_way(smaller, self.args.per_device_train_batch_size))
        sys.stderr.write(f"out of memory; going on with {smaller.describe(self.engine.capacity)}\n")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss, predicted = packed_loss(self.model, inputs)
        return loss / (predicted if num_items_in_batch is None else num_items_in_batch)


def _labelled(inputs: Batch, counted: Any, accumulated: int = 1) -> Any:
    """How many tokens the loss is the mean of; Transformers counts none where a model takes no such number."""
    return sum(inputs["labelled"]) * accumulated if counted is None else counted


def make_trainer(
    recipe: Recipe,
    model: Any,
    tokenizer: Tokenizer,
    train: Sequence[Example],
    engine: Engine,
    folder: Path,
    callbacks: Sequence[Any],
    team: Team | None = None,
) -> SFTTrainer:
    """The trainer of a run; checkpoints go below `folder`."""
    from transformers import PrinterCallback, ProgressCallback

    trainer = (PackedTrainer if engine.packed else SFTTrainer)(
        model=model,
        args=_arguments(recipe, model, engine, folder),
        train_dataset=to_dataset(train),
        processing_class=tokenizer,
        data_collator=pack if engine.packed else None,
        callbacks=list(callbacks),
    )
    if engine.packed or trainer.args.fp16:
        _widen(trainer.model)
    if isinstance(trainer, PackedTrainer):
        trainer.engine, trainer.plan, trainer.team = engine, engine.plan, team
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _widen(model: Any) -> None:
    """TRL casts adapters of 4-bit bases to bfloat16, in which small steps vanish, and which float16's loss scaling does
    not take."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def running(trainer: SFTTrainer) -> Iterator[None]:
    """What must hold while a step is computed."""
    with _listed(trainer.model), _routed(trainer):
        yield


@contextmanager
def _listed(model: Any) -> Iterator[None]:
    """`model.parameters()` without its walk over every module: Transformers asks for it twice a step, and a short step
    on a GPU waits for that."""
    every = list(model.parameters())
    model.parameters = lambda recurse=True: iter(every)
    try:
        yield
    finally:
        del model.parameters


@contextmanager
def _routed(trainer: SFTTrainer) -> Iterator[None]:
    if isinstance(trainer, PackedTrainer) and trainer.plan:
        way = _way(trainer.plan, trainer.args.per_device_train_batch_size)
        with packing(trainer.model, True, fp8=trainer.engine.fp8, **way) as trainer.fused:
            yield
        return
    with packing(trainer.model) if isinstance(trainer, PackedTrainer) else nullcontext():
        yield


def _way(plan: Plan, documents: int) -> dict[str, Any]:
    """How the fused layers go by this plan, with so many documents a step."""
    replayed = Rows(plan.replayed, documents, plan.replay.parts) if plan.replay and plan.replayed else None
    return {"kept": plan.kept, "recompute": plan.recompute, "held": plan.held, "replayed": replayed}


def _arguments(recipe: Recipe, model: Any, engine: Engine, folder: Path) -> SFTConfig:
    training = recipe.training
    on_cpu = model.device.type == "cpu"
    dtype = compute_dtype(recipe.base, model.device)
    whole_step = takes_whole_steps(engine, model.device)
    recompute = training.gradient_checkpointing is True and engine.plan is None
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=training.samples if whole_step else training.per_device_train_batch_size,
        gradient_accumulation_steps=1 if whole_step else training.gradient_accumulation_steps,
        max_steps=training.max_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=engine.plan.optim if engine.plan else training.optim.replace("auto", "adamw_torch_fused"),
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=training.logging_steps,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or training.max_steps,
        seed=training.seed,
        bf16=dtype == torch.bfloat16 and not engine.packed,
        fp16=dtype == torch.float16,
        logging_nan_inf_filter=not engine.packed,  # it would have the host wait for the GPU at every step
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        report_to=[],
        disable_tqdm=True,
        max_length=None,  # rows are already fitted
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several Transformers would make replicas, which TRL refuses
    return arguments
