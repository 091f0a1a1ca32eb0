"""TRL's SFTTrainer over rows that are already tokenized, with an optional packed step.

Plain: TRL's own padded micro-batches and loss. Packed: the samples of a step become rows without padding (one row on
a CPU, one a micro-batch on a GPU) and the loss is the token mean over the whole step, the same mathematics.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from medlora.data.build import to_dataset
from medlora.data.prompts import Example, Tokenizer
from medlora.model.load import compute_dtype
from medlora.model.packed import pack, packed_loss, packing, unsupported
from medlora.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Engine:
    packed: bool
    why: str
    """One line for the user: which path runs, and why."""


def choose_engine(model: Any, recipe: Recipe) -> Engine:
    wanted = recipe.training.engine
    if wanted == "plain":
        return Engine(False, "plain: TRL's padded micro-batches, as training.engine asks")
    obstacle = unsupported(model, recipe.data.max_length)
    if not obstacle and int(torch.distributed.is_initialized()):
        obstacle = "several processes"
    if obstacle:
        return Engine(False, f"plain: TRL's padded micro-batches, since {obstacle}")
    return Engine(True, "packed: rows without padding, attention kept inside each document")


class PackedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose step is a packed row."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.model.parameters():  # TRL casts adapters of 4-bit bases to bfloat16: small steps vanish
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss, predicted = packed_loss(self.model, inputs)
        return loss / (predicted if num_items_in_batch is None else num_items_in_batch).to(loss.device)


def make_trainer(
    recipe: Recipe,
    model: Any,
    tokenizer: Tokenizer,
    train: Sequence[Example],
    engine: Engine,
    folder: Path,
    callbacks: Sequence[Any],
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
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


@contextmanager
def running(trainer: SFTTrainer) -> Iterator[None]:
    """What must hold while a step is computed."""
    with packing(trainer.model) if isinstance(trainer, PackedTrainer) else nullcontext():
        yield


def _arguments(recipe: Recipe, model: Any, engine: Engine, folder: Path) -> SFTConfig:
    training = recipe.training
    on_cpu = model.device.type == "cpu"
    dtype = compute_dtype(recipe.base, model.device)
    one_row = engine.packed and on_cpu
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch * accumulation if one_row else batch,
        gradient_accumulation_steps=1 if one_row else accumulation,
        max_steps=training.max_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=training.logging_steps,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or training.max_steps,
        seed=training.seed,
        bf16=dtype == torch.bfloat16 and not engine.packed,
        fp16=dtype == torch.float16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        report_to=[],
        disable_tqdm=True,
        max_length=None,  # rows are already fitted
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
