"""On a CPU the base is rounded to NF4 once: the values must be those that bitsandbytes' Linear4bit computes with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medlora.model import load as load_module
from medlora.model.base import resolve
from medlora.model.load import compute_dtype, load_model
from medlora.model.stream import Unusual
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


@pytest.mark.parametrize("double", [False, True])
def test_a_second_start_rounds_nothing(
    llama_folder: Path, double: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what either start loads is what rounding without a cache gives, down to the classes."""
    from bitsandbytes import functional as bnb

    monkeypatch.setattr("medlora.model.stream.home", lambda: tmp_path)
    base, found = Base(model=str(llama_folder), double_quant=double), []

    def load() -> Any:
        return load_model(resolve(base), base, torch.device("cpu"))

    with monkeypatch.context() as patch:
        patch.setattr(load_module, "load_nf4", unusual)
        expected = load()
    quantize = bnb.quantize_4bit
    monkeypatch.setattr(bnb, "quantize_4bit", lambda *all, **how: (found.append(1), quantize(*all, **how))[1])
    for _ in range(2):
        before, model = len(found), load()
        rounded = len(found) - before
        ours, theirs = model.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys() and all(map(torch.equal, ours.values(), theirs.values()))
        assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in expected.named_modules()}
        assert model.config.to_dict() == expected.config.to_dict()
        assert not getattr(model, "is_loaded_in_4bit", False) and not getattr(model, "is_quantized", False)
    assert found and rounded == 0


def unusual(*_: Any) -> Any:
    raise Unusual("a test asks for it")


def test_rows_that_bitsandbytes_misreads_on_some_cpus_are_rounded_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr("medlora.model.stream.home", lambda: tmp_path)
    torch.manual_seed(1)
    shape = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **shape))
    model.save_pretrained(tmp_path / "base")
    base = Base(model=str(tmp_path / "base"))
    ours: Any = load_model(resolve(base), base, torch.device("cpu"))
    expected = nearest_nf4(model.model.layers[0].mlp.up_proj.weight.data)
    torch.testing.assert_close(ours.model.layers[0].mlp.up_proj.weight.data.float(), expected, rtol=1e-2, atol=1e-3)
    assert not capsys.readouterr().err and not (tmp_path / "quantised").exists()


def test_the_loaded_base_is_frozen_without_cache(llama_folder: Path) -> None:
    base = Base(model=str(llama_folder))
    model: Any = load_model(resolve(base), base, torch.device("cpu"))
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.use_cache is False
    assert model.dtype == compute_dtype(base, torch.device("cpu"))
