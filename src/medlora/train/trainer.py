"""TRL's SFTTrainer over rows that are already tokenized, with an optional packed step.

Plain: TRL's own padded micro-batches and loss. Packed: the samples of a step become rows without padding
(one row on a CPU, and on a GPU whose memory holds it; else one a micro-batch) and the loss is the token
mean over the whole step, the same mathematics.
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
from medlora.model.fused import base_bytes, row_bytes
from medlora.model.load import compute_dtype
from medlora.model.packed import pack, packed_loss, packing, unfused, unsupported
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
    why = "packed: rows without padding, attention kept inside each document"
    slower = unfused(model) if model.device.type == "cuda" else None
    return Engine(True, f"{why}; Transformers' layers rather than fused ones, since {slower}" if slower else why)


class PackedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose step is a packed row."""

    keep_base = False
    """Whether a GPU's memory also holds the base dequantised."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.model.parameters():  # TRL casts adapters of 4-bit bases to bfloat16: small steps vanish
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Transformers' step without its walk over every module, which a short step on a GPU waits for."""
        if not model.training:
            model.train()
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is None:
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

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
    spare = model.device.type == "cuda" and not recipe.training.gradient_checkpointing
    if isinstance(trainer, PackedTrainer) and spare:
        trainer.keep_base = _step_fits(recipe, model, keep_base=True)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


@contextmanager
def running(trainer: SFTTrainer) -> Iterator[None]:
    """What must hold while a step is computed."""
    packed = isinstance(trainer, PackedTrainer)
    with packing(trainer.model, keep=trainer.keep_base) if packed else nullcontext():
        yield


def _arguments(recipe: Recipe, model: Any, engine: Engine, folder: Path) -> SFTConfig:
    training = recipe.training
    on_cpu = model.device.type == "cpu"
    dtype = compute_dtype(recipe.base, model.device)
    one_row = engine.packed and (on_cpu or _step_fits(recipe, model))
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
        logging_nan_inf_filter=not engine.packed,  # it would have the host wait for the GPU at every step
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        report_to=[],
        disable_tqdm=True,
        max_length=None,  # rows are already fitted
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )


def _step_fits(recipe: Recipe, model: Any, *, keep_base: bool = False) -> bool:
    """Whether a GPU's free memory holds a whole optimizer step as one row, were every sample of full length; with
    `keep_base`, beside the dequantised base."""
    if unfused(model):
        return False
    training, config = recipe.training, model.config
    tokens = training.per_device_train_batch_size * training.gradient_accumulation_steps * recipe.data.max_length
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = row_bytes(config, tokens, recompute=training.gradient_checkpointing) + 14 * trained
    return bool(needed + keep_base * base_bytes(config) <= torch.cuda.mem_get_info(model.device)[0])
