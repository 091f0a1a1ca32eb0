"""A toy LLaMA with grouped keys and two adapters that matter, in float32."""

from typing import Any

import pytest
import torch


def tiny(config_of: Any, causal: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = config_of(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(causal(config), LoraConfig(r=4, lora_alpha=6, target_modules=every), "all")
    model.add_adapter("some", LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def toy_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return tiny(LlamaConfig, LlamaForCausalLM)


@pytest.fixture(scope="session")
def toy_qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return tiny(Qwen2Config, Qwen2ForCausalLM)
