"""The fused layers: on a CPU through the kernels' references in float32, on a GPU through the kernels."""

import gc
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_packed import ALL, assert_equal, documents, gradients, make, packed, reference
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from medlora.kernels import attention, cross_entropy, dropout, embedding, rms_norm, swiglu
from medlora.kernels import reference as plain
from medlora.model import fused as fused_module
from medlora.model import graphs
from medlora.model import group as group_module
from medlora.model.fused import Fused
from medlora.model.graphs import Rows
from medlora.model.group import Group
from medlora.model.modules import Unfusable
from medlora.model.offload import Offload
from medlora.model.packed import pack, packed_loss, packing, trial

CASES: dict[str, Callable[[], Any]] = {
    "all": lambda: make(ALL),
    "q, v": lambda: make(["q_proj", "v_proj"]),
    "down and k": lambda: make(["down_proj", "k_proj"]),
    "no grouped queries": lambda: make(ALL, num_key_value_heads=4),
    "biases": lambda: make(ALL, attention_bias=True, mlp_bias=True),
    "tied": lambda: make(ALL, tie_word_embeddings=True),
    "rslora": lambda: make(ALL, lora={"use_rslora": True}),
    "qwen2": lambda: make(ALL, family="qwen2"),
    "mistral": lambda: make(ALL, family="mistral", head_dim=24, sliding_window=None),
    "ranks": lambda: make(ALL, lora={"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 6}}),
    # ranks whose terms SwiGLU adds
    "16": lambda: make(ALL, mlp_bias=True, lora={"r": 16}),
    "16 and 32": lambda: make(
        ALL, lora={"r": 16, "rank_pattern": {"down_proj": 32}, "alpha_pattern": {"down_proj": 24}}
    ),
    "16, gate and up": lambda: make(["gate_proj", "up_proj"], lora={"r": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_equals_padded_micro_batches(case: str) -> None:
    model, rows = CASES[case](), documents()
    expected = reference(model, rows)
    theirs = gradients(model)
    assert torch.allclose(packed(model, rows, fuse=True), expected, rtol=1e-5)
    assert_equal(gradients(model), theirs)


def test_before_ampere_swiglu_takes_no_adapters_along(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = CASES["16"](), documents()
    expected = packed(model, rows, fuse=True)
    theirs = gradients(model)
    monkeypatch.setattr(swiglu, "_check", None)  # where Triton's products are due
    with pytest.raises(TypeError):
        packed(model, rows, fuse=True)
    monkeypatch.setattr(group_module, "multiplies", lambda _: False)
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
        for kept in (1, 2):
            with packing(model, fuse=True, kept=kept):
                loss = packed_loss(model, pack(rows))[0] / sum(pack(rows)["labelled"])
                assert torch.allclose(loss, expected, rtol=1e-6)


@pytest.fixture
def dropping() -> Any:
    return make(ALL, lora={"r": 16, "lora_dropout": 0.3})


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


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["down_proj"], ["o_proj"]], ids="_".join)
@pytest.mark.parametrize(("way", "held"), [("selective", 0), ("full", 0), ("full", 2), ("offload", 0), ("offload", 1)])
def test_what_is_recomputed_gives_the_same_gradients(way: Any, held: int, targets: list[str]) -> None:
    model, batch = make(targets, lora={"r": 16, "lora_dropout": 0.3}), pack(documents())

    def step(recompute: Any) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        with packing(model, fuse=True, recompute=recompute, held=held):
            loss = packed_loss(model, batch)[0]
            loss.backward()
        return loss.detach(), gradients(model)

    loss, grads = step("none")
    again, same = step(way)
    assert torch.equal(loss, again)
    assert all(torch.equal(same[name], grad) for name, grad in grads.items())


def test_nothing_is_fetched_that_no_gradient_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an adapter in attention the first layer's attention half has no backward pass."""
    made: list[Offload] = []
    monkeypatch.setattr(fused_module, "Offload", lambda stream: made.append(Offload(stream)) or made[-1])
    model = make(["gate_proj", "up_proj", "down_proj"])
    with packing(model, fuse=True, recompute="offload"):
        packed_loss(model, pack(documents()))[0].backward()
    assert len(made) == 1 and not made[0].back and not made[0].host


def test_rows_of_one_step_keep_their_inputs_apart() -> None:
    """Two rows before either's backward pass, and one whose backward pass broke off before."""
    model, batches = make(), [pack(documents(lengths)) for lengths in ((40, 60), (30, 50))]
    with packing(model, fuse=True):
        for batch in batches:
            packed_loss(model, batch)[0].backward()
    expected = gradients(model)
    with packing(model, fuse=True, recompute="offload"):
        broken = packed_loss(model, batches[0])[0]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(Offload, "fetch", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
            broken.backward()
        model.zero_grad()
        losses = [packed_loss(model, batch)[0] for batch in batches]
        for loss in losses:
            loss.backward()
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("way", ["none", "selective", "full", "offload"])
def test_a_row_that_breaks_off_holds_nothing(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until garbage is looked for: the smaller plan that goes on needs the memory."""
    made: list[StorageWeakRef] = []
    forward = Group.forward

    def noted(self: Group, *args: Any) -> Any:
        found = forward(self, *args)
        made.extend(StorageWeakRef(x.untyped_storage()) for x in found if x is not None)
        return found

    monkeypatch.setattr(Group, "forward", noted)
    model = make(lora={"r": 16})
    gc.collect()
    gc.disable()
    try:
        with packing(model, fuse=True, recompute=way):
            loss = packed_loss(model, pack(documents()))[0]
            assert not all(x.expired() for x in made)
            del loss
            assert all(x.expired() for x in made)
    finally:
        gc.enable()


def saved_bytes(model: Any, recompute: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that autograd holds between forward and backward, outside of the host's copies."""
    held: dict[int, int] = {}

    def pack_hook(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    sent: list[Tensor] = []
    send = Offload.send
    monkeypatch.setattr(Offload, "send", lambda self, x: (sent.append(x), send(self, x))[1])
    with packing(model, fuse=True, recompute=recompute) as fused:
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
            loss = packed_loss(model, pack(documents((128,))))[0]
        loss.backward()
    model.zero_grad()
    assert len(sent) == (2 * len(fused.groups) - 1 if recompute == "offload" else 0)
    return sum(held.values())


def test_a_recomputed_layer_keeps_its_input_and_an_offloaded_one_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    kept = {way: saved_bytes(model, way, monkeypatch) for way in ("none", "full", "offload")}
    assert kept["offload"] < kept["full"] < kept["none"]


def test_selective_saves_neither_norms_nor_the_widest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    save = fused_module._Cheap.pack
    monkeypatch.setattr(fused_module._Cheap, "pack", lambda self, x: (kept.append(save(self, x)), kept[-1])[1])
    model = make()
    with packing(model, fuse=True, recompute="selective"):
        packed_loss(model, pack(documents()))[0].backward()
    assert sum(not isinstance(x, Tensor) for x in kept) == 2 * 3
    widest = 2 * model.config.intermediate_size
    assert not any(isinstance(x, Tensor) and x.shape[-1] == widest for x in kept)


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"]], ids=["all", "qv"])
@pytest.mark.parametrize(
    ("way", "held", "others"),
    [("full", 0, 2 * 3 + 3), ("offload", 0, 5 + 4), ("full", 2, 3 + 3), ("offload", 1, 5 + 3)],
)
def test_what_is_recomputed_leaves_its_last_product_out(
    monkeypatch: pytest.MonkeyPatch, way: Any, held: int, others: int, targets: list[str]
) -> None:
    """Down is computed once, and o too where halves are recomputed apart; held layers compute nothing twice, nor does
    what comes last."""
    model, calls = make(targets), []
    product = Group.product

    def counting(self: Group, *args: Any, back: bool = False) -> Tensor:
        calls.append((self.gated is not None, back))
        return product(self, *args, back=back)

    monkeypatch.setattr(Group, "product", counting)
    with packing(model, fuse=True, recompute=way, held=held):
        packed_loss(model, pack(documents()))[0].backward()
    assert calls.count((True, False)) == 2 and calls.count((False, False)) == others


def test_settings_change_between_rows() -> None:
    model, batch = make(), pack(documents())
    with packing(model, fuse=True) as fused:
        losses = []
        for kept, recompute in (
            (0, "none"),
            (2, "full"),
            (1, "none"),
            (0, "offload"),
            (1, "offload"),
            (2, "selective"),
        ):
            fused.change(kept, recompute)
            assert [groups[0].beside is not None for groups in fused.groups] == [kept == 2, kept > 0]
            loss = packed_loss(model, batch)[0]
            loss.backward()
            losses.append((loss.item(), {name: grad.sum().item() for name, grad in gradients(model).items()}))
    for loss, grads in losses:  # kept weights take the adapters along, in another order of addition
        assert loss == pytest.approx(losses[0][0], rel=1e-6)
        assert grads == pytest.approx(losses[0][1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_fp8_is_the_product_of_rounded_factors(keep: bool) -> None:
    """Forward and to the input, against the same rounding written out; and near enough to full precision."""
    model = make()
    layer = model.get_base_model().model.layers[0]
    modules = [layer.mlp.gate_proj, layer.mlp.up_proj]
    torch.manual_seed(0)
    x, grad = torch.randn(33, 64), torch.randn(33, 256)
    scratch = torch.empty(256 * 64)
    exact, rounded = Group(modules, torch.float32), Group(modules, torch.float32, fp8=True)
    if keep:
        rounded.keep(scratch)
    w = exact.weight(scratch).clone()
    for back, factor, weight in ((False, x, w), (True, grad, w.t())):
        ours = rounded.product(factor, scratch, None, back=back)
        emulated = plain.fp8_matmul(*plain.quantize_rows(factor), *plain.quantize_rows(weight))
        assert torch.allclose(ours, emulated, rtol=1e-5, atol=1e-6)
        true = exact.product(factor, scratch, None, back=back)
        assert 0 < (ours - true).norm() < 0.04 * true.norm()  # two roundings to 3 mantissa bits


@pytest.mark.parametrize("rank", [8, 16])  # the latter by way of SwiGLU
def test_fp8_trains_beside_full_precision(rank: int) -> None:
    model, batch = make(ALL, lora={"r": rank}), pack(documents((40, 60)))
    found = []
    for fp8 in (False, True):
        with packing(model, fuse=True, fp8=fp8):
            loss = packed_loss(model, batch)[0] / sum(batch["labelled"])
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    (loss, grads), (rounded, near) = found
    assert loss != rounded and torch.allclose(loss, rounded, rtol=0.01)
    for name, grad in grads.items():
        assert (near[name] - grad).norm() < 0.15 * grad.norm(), name


def test_fp8_refuses_widths_of_no_multiple_of_16() -> None:
    with pytest.raises(Unfusable, match="multiples of 16"):
        Fused(make(intermediate_size=120).get_base_model(), fp8=True)


def test_gradients_of_dropout_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch, dropping: Any) -> None:
    """The same masks in plain differentiable operations."""
    _, ours = seeded(dropping, 3)

    def unfused_linear(self: Any, x: Tensor, how: Any) -> Tensor:
        inner = plain.swiglu(*x.chunk(2, 1)) if self.gated else x
        dropped = plain.dropout(inner, how.p, int(how.seed) + how.place)
        parts = [
            inner @ base.weight.t() + adapter.scaling * (dropped @ adapter.a.t()) @ adapter.b.t()
            for base, adapter in zip(self.bases, self.adapters, strict=True)
        ]
        return torch.cat(parts, 1)

    monkeypatch.setattr(Group, "__call__", unfused_linear)
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


@pytest.mark.parametrize("way", ["none", "selective", "offload", "replayed"])
def test_attention_by_tiles_gives_the_same_gradients(
    interpreter: None, monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    """Its kernels and the rotation interpreted, all others by their reference."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model, batch, found = make(ALL, **heads), pack(documents((5, 9, 1))), []
    for module in (fused_module, graphs):
        monkeypatch.setattr(module, "ROUND", 16)
    for module in (cross_entropy, dropout, embedding, rms_norm, swiglu):
        monkeypatch.setattr(module, "use_triton", lambda _: False)
    for tiled in (False, True):
        if tiled:
            monkeypatch.setattr(attention, "flash_takes", lambda *_: True)
            monkeypatch.setattr(attention, "serves", lambda _: True)
            monkeypatch.setattr(attention, "by_document", None)
        how = {"replayed": Rows(16, 4)} if way == "replayed" else {"recompute": way}
        with packing(model, True, **how):
            loss = packed_loss(model, batch)[0]
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    (expected, theirs), (loss, ours) = found
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert_equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"]], ids=["all", "qv"])
@pytest.mark.parametrize(
    "way",
    [
        "none",
        "selective",
        "full",
        "offload",
        "fp8",
        "document by document",
        "no grouped queries",
        "as before Ampere",
        "qwen2",
    ],
)
def test_on_a_gpu_the_kernels_give_the_float32_gradients(
    monkeypatch: pytest.MonkeyPatch, targets: list[str], way: str
) -> None:
    """bfloat16 through Triton and flash attention, against float32; FP8 as far off as its own rounding. As before
    Ampere: float16, without the flash kernel and Triton's products."""
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_key_value_heads": 4 if "queries" in way else 2,
        "max_position_embeddings": 256,
        "lora": {"r": 16},  # which SwiGLU takes along
    }
    if way == "qwen2":
        shape["family"] = way
    if "document" in way or "Ampere" in way:
        monkeypatch.setattr(attention, "flash_takes", lambda *_: False)
    if "Ampere" in way:
        monkeypatch.setattr(group_module, "multiplies", lambda _: False)
    rows = documents((90, 170, 50, 120))
    cpu, batch = make(targets, **shape), pack(rows)

    def step(model: Any, **how: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with packing(model, True, **how):
            loss = packed_loss(model, batch)[0] / sum(batch["labelled"])
            (scale * loss).backward()
        return loss.detach().cpu(), {name: grad.cpu() / scale for name, grad in gradients(model).items()}

    scale = 1024.0 if "Ampere" in way else 1.0
    expected, theirs = step(cpu)
    model = make(targets, **shape).cuda()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float16 if "Ampere" in way else torch.bfloat16)
    recompute: Any = way if way in ("selective", "full", "offload") else "none"
    loss, grads = step(model, kept=2 * ("queries" in way), recompute=recompute, fp8=way == "fp8")
    assert trial(model, fp8=way == "fp8") is None
    if way != "fp8":
        assert torch.allclose(loss, expected, rtol=1e-3)
        assert_equal(grads, theirs, within=0.01 if "Ampere" in way else 0.03)
        return
    assert torch.allclose(loss, expected, rtol=1e-2)
    for name, rounded in step(cpu, fp8=True)[1].items():  # as far off as the roundings alone, in float32
        off = (rounded - theirs[name]).norm()
        assert (grads[name] - theirs[name]).norm() <= 1.3 * off, name
