"""Replayed rows against rows launched one by one: on a CPU the same passes over the same buffers, on a GPU graphs."""

from typing import Any

import pytest
import torch
from test_packed import ALL, documents, gradients, make
from torch import Tensor

from medlora.kernels import attention
from medlora.model.graphs import Graphs, Rows, Uncapturable, rounded
from medlora.model.packed import pack, packed_loss, packing

gpu = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024}
STEPS = [
    [(40, 60)],
    [(30, 50), (120, 80)],  # two rows a step
    [(40, 61, 9)],
    [(300, 200), (10, 20)],  # the first too long
    [(10, 20), (300, 200)],
    [(9, 17, 5, 12, 8)],  # of too many documents
    [(128, 128, 128)],  # without padding
    [(40, 60)],
]


def halve(model: Any, dtype: torch.dtype = torch.bfloat16) -> None:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def run(
    tokens: int, device: str, recompute: Any = "none", dropout: float = 0.3, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Any], set[int]]:
    """Losses of rows and gradients of steps, and which lengths were replayed."""
    model = make(ALL, lora={"lora_dropout": dropout}, **SHAPE).to(device)
    if device == "cuda":
        halve(model, dtype)
    torch.manual_seed(5)
    found: list[Any] = []
    replayed = Rows(tokens, 4) if tokens else None
    with packing(model, True, recompute=recompute, replayed=replayed) as fused:
        for step in STEPS:
            for lengths in step:
                loss = packed_loss(model, pack(documents(lengths)))[0]
                loss.backward()
                found.append(loss.detach().cpu())
            found += [grad.cpu() for grad in gradients(model).values()]
        return found, set(fused.graphs.ready) if fused.graphs else set()


def assert_close(ours: list[Tensor], theirs: list[Tensor], bound: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
def test_a_replayed_row_gives_what_a_launched_one_gives(recompute: Any, device: str) -> None:
    launched, none = run(0, device, recompute)
    replayed, lengths = run(384, device, recompute)
    assert not none and lengths == {128, 256, 384}
    assert_close(replayed, launched, 1e-5 if device == "cpu" else 0.02)  # products of another length round otherwise
    again, _ = run(384, device, recompute)
    assert all(torch.equal(a, b) for a, b in zip(again, replayed, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_are_replayed_without_the_flash_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flash_takes", lambda *_: False)
    launched, _ = run(0, "cuda", dtype=dtype)
    replayed, lengths = run(384, "cuda", dtype=dtype)
    assert lengths == {128, 256, 384}
    assert_close(replayed, launched, 5e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("device", ["cpu", gpu])
def test_each_replay_drops_anew(device: str) -> None:
    (first, *_), _ = run(384, device)
    *_, last = (x for x in run(384, device)[0] if x.dim() == 0)
    assert first != last  # the same documents and weights in both steps
    same = [x for x in run(384, device, dropout=0.0)[0] if x.dim() == 0]
    assert same[0] == same[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("way", ["_forward", "_backward"])
@pytest.mark.parametrize("recompute", ["none", "selective", "offload"])
def test_out_of_memory_in_a_capture_leaves_nothing_behind(
    recompute: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: Graphs, *rest: Any) -> Any:
        made = passed(self, *rest)
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, device="cuda")
        return made

    def pools() -> set[Any]:
        return {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()}

    passed, before = getattr(Graphs, way), pools()
    model, batch = make(ALL, **SHAPE).cuda(), pack(documents((40, 61, 9)))
    halve(model)
    with packing(model, True, recompute=recompute, replayed=Rows(384, 4)) as fused:
        assert fused
        monkeypatch.setattr(Graphs, way, fill)
        with pytest.raises(torch.OutOfMemoryError):
            packed_loss(model, batch)[0].backward()
        fused.change(0, recompute)
        torch.cuda.empty_cache()
        assert pools() <= before | {(0, 0)}
        packed_loss(model, batch)[0].backward()
        found = list(gradients(model).values())
    model.zero_grad()
    with packing(model, True, recompute=recompute):
        packed_loss(model, batch)[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(model).values(), strict=True))


def test_a_row_must_come_back_before_the_next() -> None:
    model = make()
    with packing(model, True, replayed=Rows(256, 4)):
        losses: list[Tensor] = [packed_loss(model, pack(documents()))[0] for _ in range(2)]
        with pytest.raises(RuntimeError, match="another row"):
            losses[0].backward()


def test_what_cannot_be_captured_is_launched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise Uncapturable("operation not permitted when stream is capturing")

    expected, _ = run(0, "cpu")
    monkeypatch.setattr(Graphs, "_capture", refuse)
    found, lengths = run(384, "cpu")
    assert (
        not lengths and capsys.readouterr().err.count("not permitted when stream is capturing; going on without") == 1
    )
    assert_close(found, expected, 1e-5)


def test_evaluation_and_a_disabled_adapter_pass_beside_the_graphs() -> None:
    model, batch = make(), pack(documents())
    with packing(model, True, replayed=Rows(256, 4)):
        packed_loss(model, batch)[0].backward()
        expected = gradients(model)
        model.eval()
        with torch.no_grad():
            tuned = packed_loss(model, batch)[0]
            with model.disable_adapter():
                assert packed_loss(model, batch)[0] != tuned
        packed_loss(model.train(), batch)[0].backward()
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model).items())


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_lengths_waste_a_share_at_most(parts: int) -> None:
    lengths = {n: rounded(n, parts) for n in range(1, 9000)}
    assert all(n <= m < max(n + 128, n * (1 + 1 / parts) + 1) and m % 128 == 0 for n, m in lengths.items())
    assert len({m for m in lengths.values() if 2048 < m <= 4096}) == parts
    assert rounded(2048, parts) == 2048
