"""Products that take adapters along beside the weights, against plain differentiable operations in float32."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_packed import ALL, assert_equal, documents, gradients, make
from torch import Tensor, nn

from medlora.kernels import cross_entropy, embedding, nf4, reference
from medlora.kernels.dispatch import roomy, widened
from medlora.kernels.rms_norm import add_rms_norm
from medlora.kernels.swiglu import swiglu_adapted_backward
from medlora.model import fused as fused_module
from medlora.model import group as group_module
from medlora.model.fused import _layer_groups
from medlora.model.group import Group, Pass
from medlora.model.packed import pack, packed_loss, packing

bnb = pytest.importorskip("bitsandbytes.functional")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EPS = 1e-5


def layer(targets: list[str], device: str, **lora: Any) -> Any:
    """A decoder layer whose base lies in NF4 codes; each module's `exact` is its weight in float32."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = make(targets, lora=lora).get_base_model().model.layers[0].to(device)
    quantize(found)
    return found


def quantize(model: Any) -> None:
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            codes, state = bnb.quantize_4bit(module.weight.data, quant_type="nf4")
            module.exact = bnb.dequantize_4bit(codes, state).float()
            module.weight = nn.Parameter(codes, requires_grad=False)
            module.weight.quant_state = state


def kept(groups: Any, dtype: torch.dtype, device: str) -> Tensor:
    scratch = torch.empty(max(g.shape[0] * g.shape[1] for g in groups), dtype=dtype, device=device)
    for group in groups:
        group.keep(scratch)
        for copy, master in zip(group.copies, group.masters, strict=True):
            copy.data.copy_(master.data)
    return scratch


def plain(group: Group, x: Tensor) -> Tensor:
    if group.gated:
        x = reference.swiglu(*x.chunk(2, 1))
    parts = []
    for base, adapter in zip(group.bases, group.adapters, strict=True):
        y = x @ getattr(base, "exact", base.weight).t()
        parts.append(y if adapter is None else y + adapter.scaling * (x @ adapter.a.t()) @ adapter.b.t())
    return torch.cat(parts, 1)


def passed(groups: Any, product: Callable[[Group, Tensor], Tensor], norm: Any, x: Tensor, g: Tensor) -> list[Tensor]:
    """Two norms around gate, up and down, then the gradients of x and of what is trained."""
    _, _, gate_up, down = groups
    x = x.detach().requires_grad_()
    y, h = norm(x, torch.zeros_like(x), gate_up.room)
    y, h = norm(product(down, product(gate_up, y)), h, 0)
    masters = [*gate_up.masters, *down.masters]
    return [y.detach(), *torch.autograd.grad([y, h], [x, *masters], [g, g])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("targets", [ALL, ["gate_proj", "down_proj"], ["up_proj"]], ids="_".join)
@pytest.mark.parametrize("rank", [8, 16])
def test_adapters_beside_the_weights_change_no_gradient(
    interpreter: None, device: str, targets: list[str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 16 by way of SwiGLU's kernels, where they are down's and, of one shape, gate's and up's."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    groups = _layer_groups(layer(targets, device, r=rank), dtype, False)
    scratch = kept(groups, dtype, device)
    torch.manual_seed(1)
    x, g = (torch.randn(37, 64, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(64, device=device) + 0.5
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    adapted = [group for group in groups[2:] if group.parts]
    assert all(group.room == len(group.a) > 0 for group in adapted)
    if len(adapted) == 2 and rank == 8:  # what is asked of it would not have been taken along
        monkeypatch.setattr(Group, "product", None)
    made: list[tuple[bool, bool]] = []

    def backward(grad: Tensor, gate: Tensor, up: Tensor, above: Any, below: Any, **how: bool) -> Any:
        made.append((above is not None, below is not None))
        return swiglu_adapted_backward(grad, gate, up, above, below, **how)

    monkeypatch.setattr(group_module, "swiglu_adapted_backward", backward)
    ours = passed(
        groups, lambda group, x: group(x, Pass(scratch, 0.0, seed, 0)),
        lambda x, h, room: add_rms_norm(x, h, weight.to(dtype), EPS, room), x, g,
    )  # fmt: skip
    expected = passed(groups, plain, lambda x, h, room: reference.rms_norm(x, weight, EPS, h), x.float(), g.float())
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine - theirs).norm() <= (0.02 if device == "cuda" else 1e-5) * theirs.norm()
    assert made == [(rank == 16 and "down_proj" in targets, rank == 16 and targets is ALL)]


@pytest.mark.parametrize("device", DEVICES)
def test_queries_keys_and_values_take_theirs_along(
    interpreter: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that differ, and an input and a gradient that have room."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block = layer(["q_proj", "v_proj"], device, rank_pattern={"v_proj": 16}, alpha_pattern={"v_proj": 24})
    groups = _layer_groups(block, dtype, False)
    scratch = kept(groups, dtype, device)
    qkv = groups[0]
    monkeypatch.setattr(Group, "product", None)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    N, D = qkv.shape
    x, g = (torch.randn(37, w + qkv.room, device=device).to(dtype)[:, :w] for w in (D, N))
    x32, g32 = x.float().requires_grad_(), g.float()
    y32 = plain(qkv, x32)
    theirs = [y32, *torch.autograd.grad(y32, [x32, *qkv.masters], g32)]
    x = x.requires_grad_()
    y = qkv(x, Pass(scratch, 0.0, seed, 0))
    assert qkv.room == 24 and widened(y, 24) is not None
    ours = [y, *torch.autograd.grad(y, [x, *qkv.masters], g)]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= (0.02 if device == "cuda" else 1e-5) * other.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", [0, 3], ids=["qkv", "down"])
def test_what_is_dropped_out_is_taken_along_too(
    interpreter: None, device: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    groups = _layer_groups(layer(ALL, device, lora_dropout=0.3), dtype, False)
    scratch, group = kept(groups, dtype, device), groups[place]
    N, D = group.shape
    torch.manual_seed(1)
    seed, width = torch.full((1,), 7, device=device), D * (1 + (group.gated is not None))
    x, g = (roomy(torch.randn(37, w, device=device).to(dtype), group.room).normal_() for w in (width, N))

    def dropped(inner: Tensor) -> Tensor:
        return inner * reference.dropout(torch.ones_like(inner), 0.3, 7 + place)

    def written_out(x: Tensor) -> Tensor:
        inner = reference.swiglu(*x.chunk(2, 1)) if group.gated else x
        base = torch.cat([inner @ base.exact.t() for base in group.bases], 1)
        parts = [a.scaling * (dropped(inner) @ a.a.t()) @ a.b.t() for a in group.adapters]
        return base + torch.cat(parts, 1)

    x32 = x.float().requires_grad_()
    y32 = written_out(x32)
    theirs = [y32, *torch.autograd.grad(y32, [x32, *group.masters], g.float())]
    x = x.requires_grad_()
    asked = Group.product
    monkeypatch.setattr(Group, "product", None)  # forward all goes in one
    y = group(x, Pass(scratch, 0.3, seed, place))
    monkeypatch.setattr(Group, "product", asked)
    before = y.detach().clone()
    ours = [before, *torch.autograd.grad(y, [x, *group.masters], g)]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= (0.02 if device == "cuda" else 1e-5) * other.norm()


def test_ranks_that_no_product_reads_in_whole_steps_stay_apart() -> None:
    groups = _layer_groups(layer(ALL, "cpu", r=6), torch.float32, False)
    kept(groups, torch.float32, "cpu")
    assert all(group.room == 0 and group.kept is not None for group in groups)


def test_what_lies_beside_goes_with_the_kept_weights() -> None:
    group = _layer_groups(layer(ALL, "cpu"), torch.float32, False)[2]
    kept([group], torch.float32, "cpu")
    before = [copy.clone() for copy in group.copies]
    group.release()
    torch._foreach_copy_(group.copies, group.masters)
    assert group.room == 0 and all(map(torch.equal, before, group.copies))


def test_weights_kept_once_are_not_kept_again() -> None:
    group = _layer_groups(layer(ALL, "cpu"), torch.float32, False)[2]
    scratch = kept([group], torch.float32, "cpu")
    before = group.beside
    group.keep(scratch)
    assert group.beside is before
    assert group.room == 16


def test_a_tensor_without_room_is_not_widened() -> None:
    assert widened(torch.empty(4, 6), 2) is None
    found = roomy(torch.empty(4, 6), 2)
    assert found.shape == (4, 6) and widened(found, 2).shape == (4, 8)
    assert widened(found, 3) is None and widened(found, 0) is None


@pytest.mark.parametrize(("place", "p"), [(3, 0.0), (2, 0.3)], ids=["SwiGLU's output", "an input that is dropped out"])
def test_what_is_not_kept_is_not_held_by_what_lies_behind_it(place: int, p: float) -> None:
    groups = _layer_groups(layer(ALL, "cpu"), torch.float32, False)
    scratch, group = kept(groups, torch.float32, "cpu"), groups[place]
    x = roomy(torch.empty(37, group.shape[1] * (1 + (group.gated is not None))), group.room)
    x = torch.nn.init.normal_(x).requires_grad_()
    held: dict[tuple[int, ...], int] = {}

    def pack(saved: Tensor) -> Tensor:
        held[tuple(saved.shape)] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        group(x, Pass(scratch, p, torch.zeros(1, dtype=torch.int64), 0))
    assert held[37, group.room] == 4 * 37 * group.room


@pytest.fixture
def roomy_rows(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and SwiGLU through their kernels, which leave room, the rest by its reference; rows as they are."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    for module in (cross_entropy, embedding, nf4):
        monkeypatch.setattr(module, "use_triton", lambda _: False)
    monkeypatch.setattr(fused_module, "ROUND", 1)


def stackings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each product that will take adapters along, whether it goes back."""
    found: list[bool] = []
    together = Group.stacked
    monkeypatch.setattr(
        Group, "stacked", lambda self, scratch, *, back: (found.append(back), together(self, scratch, back=back))[1]
    )
    return found


@pytest.mark.parametrize(("targets", "rank"), [(ALL, 16), (["q_proj", "v_proj", "down_proj"], 8)], ids=["all", "some"])
@pytest.mark.parametrize("way", ["none", "selective", "full", "offload"])
def test_weights_that_are_not_kept_lie_beside_the_adapters_while_long_rows_pass(
    roomy_rows: None, monkeypatch: pytest.MonkeyPatch, way: Any, targets: list[str], rank: int
) -> None:
    model, batch = make(targets, lora={"r": rank}), pack(documents((5, 9, 3)))
    quantize(model.get_base_model().model)
    stacked = stackings(monkeypatch)
    found = []
    for long in (10**6, 1):
        monkeypatch.setattr(fused_module, "LONG", long)
        with packing(model, fuse=True, recompute=way):
            loss = packed_loss(model, batch)[0]
            loss.backward()
        found.append((loss.detach(), gradients(model)))
        assert bool(stacked) == (long == 1)
    (apart, grads), (loss, same) = found
    assert torch.allclose(loss, apart, rtol=1e-6)
    assert_equal(same, grads)
    # q, k, v and down, and again what is recomputed; back o, gate and up, or down, where SwiGLU does not serve it
    assert stacked.count(False) == 4 + {"none": 0, "selective": 0, "full": 1, "offload": 2}[way]
    assert stacked.count(True) == (4 if targets is ALL else 2)


def test_so_they_do_where_something_is_dropped_out(roomy_rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward; backward the mask stands between."""
    model, batch = make(ALL, lora={"r": 16, "lora_dropout": 0.3}), pack(documents((5, 9, 3)))
    quantize(model.get_base_model().model)
    stacked = stackings(monkeypatch)
    found = []
    for long in (10**6, 1):
        monkeypatch.setattr(fused_module, "LONG", long)
        torch.manual_seed(3)
        with packing(model, fuse=True):
            loss = packed_loss(model, batch)[0]
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    (apart, grads), (loss, same) = found
    assert stacked == [False] * 4
    assert torch.allclose(loss, apart, rtol=1e-6)
    assert_equal(same, grads)


def test_a_row_that_was_long_goes_back_beside_short_ones(roomy_rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether weights are lent is the row's matter that passes; what it has left behind is not mistaken."""
    model, rows = make(ALL, lora={"r": 16}), [pack(documents(lengths)) for lengths in ((4, 5), (2, 3))]
    quantize(model.get_base_model().model)
    found = []
    for long, order in ((10**6, (0, 1)), (8, (0, 1)), (8, (1, 0))):
        monkeypatch.setattr(fused_module, "LONG", long)
        with packing(model, fuse=True, recompute="full"):
            losses = [packed_loss(model, rows[i])[0] for i in order]
            for loss in losses:
                loss.backward()
        found.append(gradients(model))
    for grads in found[1:]:
        assert_equal(grads, found[0])
