"""The fused layers: on a CPU through the kernels' references in float32, on a GPU through the kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_packed import ALL, assert_equal, documents, gradients, make, packed, reference
from torch import Tensor, nn

from medlora.kernels import attention
from medlora.kernels import reference as plain
from medlora.model import fused as fused_module
from medlora.model.fused import Fused, Unfusable, base_bytes, row_bytes
from medlora.model.packed import pack, packed_loss, packing

CASES: dict[str, Callable[[], Any]] = {
    "all": lambda: make(ALL),
    "q, v": lambda: make(["q_proj", "v_proj"]),
    "down and k": lambda: make(["down_proj", "k_proj"]),
    "no grouped queries": lambda: make(ALL, num_key_value_heads=4),
    "biases": lambda: make(ALL, attention_bias=True, mlp_bias=True),
    "tied": lambda: make(ALL, tie_word_embeddings=True),
    "rslora": lambda: make(ALL, lora={"use_rslora": True}),
    "mistral": lambda: make(ALL, family="mistral", head_dim=24, sliding_window=None),
    "ranks": lambda: make(ALL, lora={"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 6}}),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_equals_padded_micro_batches(case: str) -> None:
    model, rows = CASES[case](), documents()
    expected = reference(model, rows)
    theirs = gradients(model)
    assert torch.allclose(packed(model, rows, fuse=True), expected, rtol=1e-5)
    assert_equal(gradients(model), theirs)


def test_fused_equals_unfused() -> None:
    model, rows = make(), documents()
    expected = packed(model, rows, fuse=False)
    theirs = gradients(model)
    assert torch.allclose(packed(model, rows, fuse=True), expected, rtol=1e-5)
    assert_equal(gradients(model), theirs)


def test_nf4_weights_are_dequantised_on_the_way() -> None:
    from bitsandbytes import functional as bnb

    for double in (False, True):
        model, rows = make(), documents()
        for name, module in model.named_modules():
            if name.endswith("base_layer"):
                codes, state = bnb.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=double)
                module.weight.data = bnb.dequantize_4bit(codes, state).view(module.weight.shape)
                module.codes, module.state = codes, state
        expected = packed(model, rows, fuse=True)
        theirs = gradients(model)
        for name, module in model.named_modules():
            if name.endswith("base_layer"):
                module.weight = nn.Parameter(module.codes, requires_grad=False)
                module.weight.quant_state = module.state
        assert torch.allclose(packed(model, rows, fuse=True), expected, rtol=1e-6)
        assert_equal(gradients(model), theirs)
        with packing(model, fuse=True, keep=True):
            assert torch.allclose(packed_loss(model, pack(rows))[0] / pack(rows)["labelled"], expected, rtol=1e-6)


@pytest.fixture
def dropping() -> Any:
    return make(lora={"lora_dropout": 0.3})


def seeded(model: Any, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    return packed(model, documents(), fuse=True), gradients(model)


def test_a_seed_decides_the_dropout(dropping: Any) -> None:
    loss, grads = seeded(dropping, 3)
    again, same = seeded(dropping, 3)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], same[name]) for name in grads)
    assert seeded(dropping, 4)[0] != loss
    dropping.eval()
    assert seeded(dropping, 3)[0] == seeded(dropping, 4)[0]


def test_recompute_gives_the_same_gradients(dropping: Any) -> None:
    loss, grads = seeded(dropping, 3)
    dropping.gradient_checkpointing_enable({"use_reentrant": False})
    again, same = seeded(dropping, 3)
    assert torch.allclose(loss, again, rtol=1e-6)
    assert_equal(same, grads)


def test_gradients_of_dropout_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch, dropping: Any) -> None:
    """The same masks in plain differentiable operations."""
    _, ours = seeded(dropping, 3)

    def unfused_linear(self: Any, x: Tensor, scratch: Tensor, row: Any, seed: int) -> Tensor:
        inner = plain.swiglu(*x.chunk(2, 1)) if self.gated else x
        dropped = plain.dropout(inner, self.dropout, row.seed + seed)
        parts = [
            inner @ base.weight.t() + adapter.scaling * (dropped @ adapter.a.t()) @ adapter.b.t()
            for base, adapter in zip(self.bases, self.adapters, strict=True)
        ]
        return torch.cat(parts, 1)

    monkeypatch.setattr(fused_module.Group, "__call__", unfused_linear)
    assert_equal(ours, seeded(dropping, 3)[1])


def test_a_disabled_adapter_takes_no_part() -> None:
    model, batch = make().eval(), pack(documents())
    with packing(model, fuse=True), torch.no_grad():
        tuned = packed_loss(model, batch)[0]
        with model.disable_adapter():
            untuned = packed_loss(model, batch)[0]
        again = packed_loss(model, batch)[0]
    with torch.no_grad(), model.disable_adapter(), packing(model, fuse=False):
        expected = packed_loss(model, batch)[0]
    assert torch.allclose(untuned, expected, rtol=1e-5)
    assert tuned == again != untuned


def test_a_base_without_adapters_passes() -> None:
    model = make().unload().requires_grad_(False)
    rows = pack(documents())
    with torch.no_grad(), packing(model, fuse=True):
        loss = packed_loss(model, rows)[0]
    with torch.no_grad(), packing(model, fuse=False):
        assert torch.allclose(loss, packed_loss(model, rows)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (lambda: make(lora={"use_dora": True}), "variant"),
        (lambda: make(lora={"lora_bias": True}), "variant"),
        (lambda: make(hidden_act="gelu"), "gelu"),
        (lambda: make(attention_dropout=0.1), "attention"),
        (lambda: make(lora={"alpha_pattern": {"v_proj": 32}}), "scaling"),
        (lambda: make(lora={"modules_to_save": ["embed_tokens"]}), "embedding"),
    ],
)
def test_what_it_does_not_know_it_refuses_with_a_reason(make_model: Callable[[], Any], reason: str) -> None:
    with pytest.raises(Unfusable, match=reason):
        Fused(make_model().get_base_model())


def test_the_base_is_counted_by_its_shape() -> None:
    model = make()
    weights = [module.weight.numel() for name, module in model.named_modules() if name.endswith("base_layer")]
    assert base_bytes(model.config) == 2 * sum(weights)


def test_recompute_needs_less_memory() -> None:
    config = make().config
    kept, again = (row_bytes(config, 100_000, recompute=recompute) for recompute in (False, True))
    assert again < kept < row_bytes(config, 200_000, recompute=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"]], ids=["all", "qv"])
@pytest.mark.parametrize("way", ["kept", "recomputed", "document by document", "no grouped queries"])
def test_on_a_gpu_the_kernels_give_the_float32_gradients(
    monkeypatch: pytest.MonkeyPatch, targets: list[str], way: str
) -> None:
    """bfloat16 through Triton and flash attention, against float32 through the references."""
    shape = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_key_value_heads": 4 if "queries" in way else 2,
    }
    if "document" in way:
        monkeypatch.setattr(attention, "_flash_takes", lambda *_: False)
    rows = documents((90, 170, 50, 120))
    cpu = make(targets, **shape, max_position_embeddings=256)
    expected = packed(cpu, rows, fuse=True)
    theirs = gradients(cpu)
    model = make(targets, **shape, max_position_embeddings=256).cuda()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    if way == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = packed(model, rows)
    assert torch.allclose(loss.cpu(), expected, rtol=1e-3)
    assert_equal({name: grad.cpu() for name, grad in gradients(model).items()}, theirs, within=0.03)
