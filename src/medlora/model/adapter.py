"""LoRA (Hu et al. 2021, arXiv:2106.09685) through PEFT: W x + (lora_alpha / r) B A x, with B = 0 at the start."""

import json
from pathlib import Path
from typing import Any

import torch

from medlora.errors import ModelError
from medlora.model.base import Resolved, fingerprint
from medlora.recipe import Base, Lora

MANIFEST = "medlora.json"


def add_lora(model: Any, lora: Lora, seed: int) -> Any:
    """A `PeftModel` whose adapter trains in float32. The initialisation is that of TRL's trainer at this seed.

    Raises:
        ModelError: a target module that the base does not have.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import set_seed

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
    )
    set_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linears = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        raise ModelError(
            f"lora.target_modules {lora.target_modules!r} do not fit the base: {str(error).splitlines()[0]} "
            f"Its linear modules: {', '.join(sorted(linears - {'lm_head'}))}"
        ) from None


def save_adapter(model: Any, tokenizer: Any, folder: Path, resolved: Resolved, base: Base) -> None:
    """PEFT's files, the tokenizer with its template, the generation config, and what base this belongs to."""
    model.peft_config["default"].base_model_name_or_path = resolved.path
    # "auto" would ask the hub whether the vocabulary grew; medlora never resizes it
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation.save_pretrained(folder)
    belongs = {"base": base.model_dump(), "base_fingerprint": fingerprint(resolved)}
    (folder / MANIFEST).write_text(json.dumps(belongs, indent=2) + "\n", encoding="utf-8")


def find_adapter(path: str | Path) -> Path:
    """The adapter folder at `path`, or inside the run folder `path`.

    Raises:
        ModelError: there is none.
    """
    for folder in (Path(path).expanduser(), Path(path).expanduser() / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ModelError(f"{path}: no adapter here (adapter_config.json); give a run folder or its adapter/ folder")


def base_of(adapter: Path | None) -> Base:
    """The base that an adapter was trained on, loaded as it was in training; without one the embedded base.

    Raises:
        ModelError: the adapter names none.
    """
    if adapter is None:
        return Base()
    if (adapter / MANIFEST).is_file():
        return Base.model_validate(json.loads((adapter / MANIFEST).read_text(encoding="utf-8"))["base"])
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if not config.get("base_model_name_or_path"):
        raise ModelError(f"{adapter}: adapter_config.json names no base; give it with --base")
    return Base(model=config["base_model_name_or_path"], revision=config.get("revision"))


def own_tokenizer(adapter: Path | None) -> Path | None:
    """The adapter's folder, where a tokenizer lies in it."""
    return adapter if adapter and (adapter / "tokenizer.json").is_file() else None


def only_to_answer(model: Any) -> Any:
    """A `PeftModel` with its adapters frozen, in evaluation mode and in the dtype that products run in.

    PEFT holds them in float32 for the optimizer; decoding reads the compute dtype and then needs no copy of its own.
    """
    dtype = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False).data = parameter.data.to(dtype)
    return model.eval()


def load_adapter(model: Any, adapter: Path, resolved: Resolved) -> Any:
    """The base with a saved adapter on it, as `only_to_answer` leaves it. Raises as `attach`."""
    return only_to_answer(attach(model, adapter, resolved))


def attach(model: Any, adapter: Path, resolved: Resolved) -> Any:
    """The base with a saved adapter on it, a frozen `PeftModel`, A and B in float32.

    Raises:
        ModelError: the adapter belongs to another base, or its weights are damaged.
    """
    from peft import PeftModel

    file = adapter / MANIFEST
    if file.is_file():
        belongs = json.loads(file.read_text(encoding="utf-8"))
        if belongs["base_fingerprint"] != fingerprint(resolved):
            raise ModelError(f"{adapter}: trained on another base ({belongs['base']['model']}), not on {resolved.path}")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ModelError(f"{adapter}: no adapter_model.safetensors; pickled adapters are not loaded")
    try:
        return PeftModel.from_pretrained(model, adapter, local_files_only=True)
    except Exception as error:  # PEFT raises RuntimeError, ValueError or SafetensorError, by cause
        raise ModelError(
            f"{adapter}: does not fit the base {resolved.path}: {str(error).strip().splitlines()[0]}"
        ) from None
