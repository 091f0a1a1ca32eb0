"""An adapter added into its base's weights, W + (lora_alpha / r) B A.

The sum is PEFT's, and is not rounded to 4 bits again, which would lose what was learned (peft issues 1043 and 2321). It
is made onto the base's own 16-bit weights, which are better ones, or onto their NF4 rounding, which is what the adapter
was trained on and may make up for. `run.export` measures held-out rows by the adapter and by the sum.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from medlora.data.prompts import Tokenizer
from medlora.errors import ModelError
from medlora.model.adapter import attach
from medlora.model.base import Resolved
from medlora.model.load import load_model
from medlora.model.memory import free_bytes
from medlora.recipe import Base

CPU = torch.device("cpu")


def stored_dtype(config: Any) -> str:
    """Name of the dtype that a base's files have; bfloat16 where its configuration names none."""
    return str(config.dtype).removeprefix("torch.") if isinstance(config.dtype, torch.dtype) else "bfloat16"


def merge(adapter: Path, base: Base, resolved: Resolved, tokenizer: Tokenizer, dtype: str, onto_nf4: bool) -> Any:
    """A `PreTrainedModel` on the CPU with the adapter in its weights, set to end its answers as the adapter's tokenizer
    says.

    Args:
        dtype: of the weights; the sum is made in float32 and rounded to it.
        onto_nf4: onto the weights that the adapter was trained on.

    Raises:
        ModelError: as `load_model` and `attach`; too little memory; or weights that are not finite afterwards.
    """
    held, free = sum(file.stat().st_size for file in resolved.files), free_bytes(CPU)
    if held > free:
        raise ModelError(
            f"{resolved.path}: merging takes {held / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free; "
            "export on a machine with more"
        )
    quantization = base.quantization if onto_nf4 else "none"
    onto = Base.model_validate(base.model_dump() | {"quantization": quantization, "compute_dtype": dtype})
    model = attach(load_model(resolved, onto, CPU), adapter, resolved)
    try:
        model = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"{adapter}: cannot be merged: {str(error).splitlines()[0]}") from None
    if (adapter / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(adapter, local_files_only=True)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        config.update(ids | {"pad_token_id": tokenizer.pad_token_id, "use_cache": True})
    return model
