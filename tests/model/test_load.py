"""On a CPU the base is rounded to NF4 once: the values must be those that bitsandbytes' Linear4bit computes with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medlora.model.base import resolve
from medlora.model.load import compute_dtype, load_model
from medlora.recipe import Base

# The 16 quantiles of a standard normal, scaled to [-1, 1] (QLoRA, arXiv:2305.14314, appendix E)
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)  # fmt: skip


def nearest_nf4(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    codes = (blocks / absmax).unsqueeze(-1).sub(NF4).abs().argmin(-1)
    return (NF4[codes] * absmax).view(weight.shape)


@pytest.mark.parametrize("shape", [(64, 64), (96, 96), (40, 80)])
def test_rounding_is_nearest_nf4_in_blocks_of_64(shape: tuple[int, int]) -> None:
    from medlora.model.load import round_to_nf4

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(*shape, bias=False), nn.Linear(*shape, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    torch.manual_seed(0)
    toy = Toy()
    before, head = toy.inner.weight.data.clone(), toy.head.weight.data.clone()
    round_to_nf4(toy)
    assert torch.equal(toy.head.weight, head)
    torch.testing.assert_close(toy.inner.weight.data, nearest_nf4(before), rtol=1e-5, atol=1e-6)


def test_weights_and_logits_are_those_of_transformers_with_bitsandbytes(llama_folder: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = Base(model=str(llama_folder), compute_dtype="bfloat16")
    ours: Any = load_model(resolve(base), base, torch.device("cpu"))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    for ours_layer, their_layer in zip(ours.model.layers, theirs.model.layers, strict=True):
        packed = their_layer.mlp.up_proj.weight
        assert torch.equal(ours_layer.mlp.up_proj.weight, dequantize_4bit(packed.data, packed.quant_state))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits.to(torch.bfloat16), rtol=2e-2, atol=1e-2)


def test_the_loaded_base_is_frozen_without_cache(llama_folder: Path) -> None:
    base = Base(model=str(llama_folder))
    model: Any = load_model(resolve(base), base, torch.device("cpu"))
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.use_cache is False
    assert model.dtype == compute_dtype(base, torch.device("cpu"))
