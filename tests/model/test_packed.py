"""A packed row against the same documents in padded micro-batches through Transformers and PEFT."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from medlora.data.prompts import IGNORE
from medlora.model.fused import Fused
from medlora.model.packed import pack, packed_loss, packing, trial, unfused, unsupported

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "attn_implementation": "eager",
}  # fmt: skip


def make(targets: list[str] | str = "all-linear", *, family: str = "llama", lora: Any = None, **shape: Any) -> Any:
    """A tiny float32 causal LM with LoRA whose B is random: at zero, A would have no gradient to compare."""
    torch.manual_seed(0)
    config, causal = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    base = causal(config(**SHAPE | shape))
    model = get_peft_model(
        base,
        LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": targets, "task_type": "CAUSAL_LM"} | (lora or {})),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def documents(lengths: tuple[int, ...] = (9, 17, 5, 12), seed: int = 1) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 97, (length,), generator=draw).tolist()
        prompt = length // 3
        rows.append({"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]})
    return rows


def reference(model: Any, rows: list[dict[str, list[int]]], batch: int = 2) -> Tensor:
    """Token mean over the whole step, accumulated over padded micro-batches."""
    labelled = sum(label != IGNORE for row in rows for label in row["labels"][1:])
    total = torch.zeros(())
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        longest = max(len(row["input_ids"]) for row in part)
        ids, labels, mask = (torch.zeros(len(part), longest, dtype=torch.long) for _ in range(3))
        labels += IGNORE
        for i, row in enumerate(part):
            n = len(row["input_ids"])
            ids[i, :n], labels[i, :n], mask[i, :n] = (
                torch.tensor(row["input_ids"]),
                torch.tensor(row["labels"]),
                1,
            )
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
        (loss / labelled).backward()
        total += loss.detach()
    return total / labelled


def packed(model: Any, rows: list[dict[str, list[int]]], fuse: bool | None = None) -> Tensor:
    with packing(model, fuse):
        loss, count = packed_loss(model, pack(rows))
        (loss / count).backward()
    return loss.detach() / count


def gradients(model: Any) -> dict[str, Tensor]:
    """Take the adapters' gradients off the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.norm() > 0, name
        assert (ours[name] - expected).norm() <= within * expected.norm(), name


@pytest.mark.parametrize("lengths", [(9, 17, 5, 12), (5, 2, 1, 9)], ids=["long", "labelled from the first token on"])
@pytest.mark.parametrize(
    ("targets", "family"), [(ALL, "llama"), (["q_proj", "v_proj"], "llama"), (ALL, "qwen2")], ids=["all", "qv", "qwen2"]
)
def test_a_packed_row_equals_padded_micro_batches(targets: list[str], family: str, lengths: tuple[int, ...]) -> None:
    model, rows = make(targets, family=family), documents(lengths)
    expected = reference(model, rows)
    theirs = gradients(model)
    assert torch.allclose(packed(model, rows), expected, rtol=1e-5)
    assert_equal(gradients(model), theirs)


def test_documents_do_not_see_each_other() -> None:
    model = make().eval()
    rows = documents()
    other = [*documents(seed=2)[:2], rows[2], rows[3]]
    with packing(model), torch.no_grad():
        one, two = (
            model.get_base_model()
            .model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                use_cache=False,
                borders=batch["borders"],
            )
            .last_hidden_state
            for batch in (pack(rows), pack(other))
        )
    border = pack(rows)["borders"][2]
    assert torch.equal(one[:, border:], two[:, border:])
    assert not torch.equal(one[:, :border], two[:, :border])


def test_pack_lays_documents_end_to_end() -> None:
    batch = pack([{"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3]}, {"input_ids": [4, 5], "labels": [IGNORE, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["borders"] == [0, 3, 5]
    assert batch["labelled"] == [2, 1]


def test_packing_puts_everything_back() -> None:
    model = make()
    before = {name: module.forward for name, module in model.named_modules()}
    for fuse in (False, True):
        with packing(model, fuse):
            pass
        assert all(before[name] == module.forward for name, module in model.named_modules())
    assert model.config._attn_implementation == "eager"


def test_a_cpu_runs_the_unfused_path_and_says_why() -> None:
    assert "GPU" in (unfused(make()) or "")


def test_a_trial_finds_layers_that_fail_or_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert trial(model) is None
    attend = Fused._attention
    monkeypatch.setattr(Fused, "_attention", lambda *how: (1.3 * (found := attend(*how))[0], found[1]))
    assert "off" in (trial(model) or "")
    monkeypatch.setattr(Fused, "_attention", None)
    assert "TypeError: 'NoneType' object is not callable" in (trial(model) or "")
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_there_is_no_trial_of_what_does_not_serve() -> None:
    assert trial(make(hidden_act="gelu")) is None


def test_a_trial_of_a_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().get_base_model().requires_grad_(False).eval()
    with torch.no_grad():
        assert trial(model) is None
        embed = Fused._hidden
        monkeypatch.setattr(Fused, "_hidden", lambda *how: 1.5 * embed(*how))
        assert "off" in (trial(model) or "")
    assert not model.training


def test_a_short_attention_window_is_refused() -> None:
    model = make(family="mistral", sliding_window=16)
    assert "window" in (unsupported(model, 32) or "")
    assert unsupported(model, 16) is None
