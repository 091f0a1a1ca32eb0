"""nf4_batch.cu: on a GPU where there is one, elsewhere over `cuda_on_cpu`."""

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlora.generate.weights import Choice, Projection
from medlora.kernels import nf4_batch as module
from medlora.kernels.nf4_batch import Cut, nf4_batch
from medlora.kernels.nf4_linear import NF4Weights

from .cuda_on_cpu import compiler, translated
from .test_nf4_linear import adapters, quantised

ROOM = r"extern __shared__ uint4 room\[\];", "uint4* const room = (uint4*)program->staged;"
PTX = r"// Pieces of eight rows.*?\n#endif\n\nstruct Place", "struct Place"
CUDA = torch.cuda.is_available()
emulated = pytest.mark.skipif(CUDA or not shutil.which("g++"), reason="needs g++; a GPU does without")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    compilers = {
        name: compiler(translated(f"{name}.cu", name, (), patterns, together), tmp_path_factory.mktemp(name))
        for name, patterns, together in (("nf4_batch", (ROOM, PTX), "programs"), ("nf4_prepare", (ROOM,), "4"))
    }
    return lambda name, device, warps, shared, **defined: compilers[name](device, shared, **defined)


def rounded(w: Tensor) -> Tensor:
    """As the kernel holds them: value and scale in bfloat16, and their product."""
    blocks = w.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    return ((blocks / scales).bfloat16() * scales.bfloat16()).float().view_as(w)


def check(
    M: int, sizes: tuple[int, ...], D: int, cut: Cut | None, device: str, close: Callable[..., None],
    stored: str = "bfloat16", ranks: tuple[int, int] | None = None, slots: tuple[int, ...] = (0,),
    residual: bool = False, double: bool = False, normed: bool = False,
) -> None:  # fmt: skip
    """Against fp32, twice with the same bits; rows further apart than they are long."""
    weights, plain = quantised(sizes, D, device, double, torch.float32 if double else getattr(torch, stored))
    assert double or weights.absmax.dtype == getattr(torch, stored)
    wide = torch.randn(M, D + 8, device=device).bfloat16()
    x, every = wide[:, :D], [slots[m % len(slots)] for m in range(M)]
    lora, terms = adapters(sizes, D, every, torch.bfloat16, device, ranks) if ranks else (None, [])
    added = torch.randn(M, sum(sizes) + 4, device=device).bfloat16()[:, 4:] if residual else None
    norm = (torch.rand(D, device=device).bfloat16(), 1e-5) if normed else None
    fx = (F.rms_norm(x.float(), (D,), eps=norm[1]).bfloat16() * norm[0] if norm else x).float()
    outs = [fx @ rounded(w).T for w in plain]
    for s, parts in enumerate(terms):
        rows = torch.tensor([slot == s for slot in every], device=device)[:, None]
        for y, part in zip(outs, parts, strict=True):
            if part:
                a, b, scaling = part[0].bfloat16().float(), part[1].bfloat16().float(), part[2]
                y += rows * ((fx @ a.T * scaling).bfloat16().float() @ b.T)
    wanted = torch.cat(outs, 1) if added is None else torch.cat(outs, 1) + added
    y = nf4_batch(x, weights, lora, norm=norm, residual=added, cut=cut)
    close(y, wanted, roundings=3 if normed else 1)  # h takes the norm's factor last
    again = torch.empty_like(y) if added is None else added
    assert nf4_batch(x, weights, lora, norm=norm, residual=added, out=again, cut=cut) is again
    assert torch.equal(y, again)
    assert not weights.counters.any()


@emulated
@pytest.mark.parametrize(
    ("M", "sizes", "D", "cut", "programs", "options"),
    [
        (1, (64,), 128, Cut(False, 1, 2), 3, {}),
        (1, (64,), 128, Cut(True, 1, 2), 3, {"normed": True}),
        (17, (48, 16, 16), 320, Cut(True, 1, 2), 3, {"ranks": (16, 8), "slots": (0, 1, -1), "normed": True}),
        (33, (80,), 576, Cut(False, 2, 2), 4, {"ranks": (20, 5), "residual": True, "stored": "float16"}),
        (33, (80,), 576, Cut(True, 2, 2), 4, {"ranks": (20, 5), "residual": True, "stored": "float16"}),
        (64, (64, 32), 512, Cut(True, 1, 4), 5, {"ranks": (40, 8), "slots": (1, 0), "normed": True}),
        (16, (96, 32), 1024, Cut(True, 4, 2), 7, {"ranks": (136, 8), "stored": "float32", "residual": True}),
        (9, (256, 128), 128, Cut(False, 2, 2), 2, {"double": True, "ranks": (8, 8), "slots": (0, -1)}),
        (30, (272, 48), 320, Cut(), 2, {"ranks": (24, 3), "residual": True}),
        (30, (272, 48), 1216, Cut(True, 1, 16), 2, {"ranks": (24, 3), "residual": True, "normed": True}),
        (5, (16, 16), 64, Cut(True, 2, 2), 9, {"ranks": (3, 2), "stored": "float32"}),
    ],
)
def test_program_by_program(
    M: int, sizes: tuple[int, ...], D: int, cut: Cut, programs: int, options: dict[str, Any],
    compiled: Callable[..., Any], close: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_compiled", compiled)
    monkeypatch.setattr(module, "PREPARE_PROGRAMS", 16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=programs))
    check(M, sizes, D, cut, "cpu", close, **options)


def test_refuses_what_does_not_fit() -> None:
    weights, _ = quantised((64,), 128, "cpu")
    x = torch.randn(2, 128).bfloat16()
    for arguments, options, message in (
        ((torch.randn(65, 128).bfloat16(), weights), {}, "1 to 64 rows of 128"),
        ((x.float(), weights), {}, "in bfloat16"),
        ((torch.randn(128, 2).bfloat16().T, weights), {}, "dense"),
        ((x, weights), {"norm": (torch.ones(128), 1e-5)}, "a norm's weight"),
        ((x, weights), {"residual": torch.ones(2, 32).bfloat16()}, "out and residual"),
        ((x, weights, adapters((64,), 128, [0], torch.bfloat16, "cpu")[0]), {}, "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            nf4_batch(*arguments, **options)


def adapted(D: int, N: int) -> Any:
    """A linear module in NF4 with an adapter of rank 5, as a decoder reads them."""
    base = bnb.nn.LinearNF4(D, N, bias=False, compute_dtype=torch.bfloat16)
    base.weight = bnb.nn.Params4bit(torch.randn(N, D) / D**0.5, requires_grad=False, quant_type="nf4", blocksize=64)
    factors = {"lora_A": torch.randn(5, D) / D**0.5, "lora_B": torch.randn(N, 5) / 5**0.5}
    parts = {name: {"one": SimpleNamespace(weight=nn.Parameter(part))} for name, part in factors.items()}
    rest = {"scaling": {"one": 0.5}, "merged": False, "lora_variant": {}, "lora_bias": {}}
    return SimpleNamespace(base_layer=base.to("cpu"), **parts, **rest)


def test_one_scale_for_all_ranks(close: Callable[..., None]) -> None:
    """A GPU's prompts take it with the products of b, if all rows take the one adapter."""
    projection = Projection([adapted(128, 64), adapted(128, 64)], ["one"], torch.bfloat16)
    projection.refresh()
    x, slots = torch.randn(70, 128).bfloat16(), [0, -1] * 35
    choices = [Choice(each, torch.tensor(each, dtype=torch.int32)) for each in ([0] * 70, slots, [-1] * 70)]
    with torch.no_grad():
        wanted = [projection(x, choice) for choice in choices]
        assert projection.scale is None
        projection.scale = 0.5
        alone, mixed, none = (projection(x, choice) for choice in choices)
    close(alone, wanted[0])
    assert torch.equal(mixed, wanted[1]) and torch.equal(none, wanted[2])
    assert torch.equal(none[1::2], mixed[1::2]) and not torch.equal(none[::2], mixed[::2])


@emulated
def test_a_batch_of_a_decoder_reads_codes(
    compiled: Callable[..., Any], close: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it comes from dequantised weights, without dequantising any; from kept ones where it does not serve."""

    monkeypatch.setattr(module, "_compiled", compiled)
    monkeypatch.setattr(module, "choose_cut", lambda _: Cut(hopper=True))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
    slots = [-1, 0, 0, -1] * 5
    choice = Choice(slots, torch.tensor(slots, dtype=torch.int32), step=True)
    x = torch.randn(20, 128).bfloat16()
    norm = torch.rand(128).bfloat16(), 1e-5
    gate_up = Projection([adapted(128, 64), adapted(128, 64)], ["one"], torch.bfloat16, gated=True)
    down = Projection([adapted(64, 128)], ["one"], torch.bfloat16)
    for projection in (gate_up, down):
        projection.refresh()
    with torch.no_grad():
        middle = gate_up(x, choice, norm=norm)
        wanted = down(middle, choice, residual=x.clone())
        monkeypatch.setattr("medlora.generate.weights.serves", lambda *_: True)
        with monkeypatch.context() as without:
            without.setattr(NF4Weights, "dequantize", None)
            close(gate_up(x, choice, norm=norm), middle, roundings=6)
            close(down(middle, choice, residual=x.clone()), wanted, roundings=3)
        gate_up.keep()
        monkeypatch.setattr("medlora.generate.weights.serves", lambda *_: False)
        close(gate_up(x, choice, norm=norm), middle, roundings=6)


def test_serves_where_it_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(major=9, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(module, "choose_cut", lambda _: Cut(hopper=True))
    for built, served in ((object(), True), (None, False)):
        monkeypatch.setattr(module, "_compiled", lambda *_, built=built, **__: built)
        assert module.serves.__wrapped__(torch.device("cuda", 0), torch.bfloat16) is served
        assert not module.serves.__wrapped__(torch.device("cuda", 0), torch.float16)
        assert not module.serves.__wrapped__(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(module, "_compiled", lambda *_, **__: object())
    found.shared_memory_per_block_optin = 65536
    assert not module.serves.__wrapped__(torch.device("cuda", 0), torch.bfloat16)


gpu = pytest.mark.skipif(not CUDA, reason="needs CUDA")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("M", [1, 16, 17, 33, 64])
@pytest.mark.parametrize(
    ("sizes", "D"),
    [
        ((4096,) * 3, 4096),
        ((4096,), 4096),
        ((11008,) * 2, 4096),
        ((4096,), 11008),
        ((4096, 1024, 1024), 4096),
        ((576, 192, 192), 576),
        ((1536, 1536), 576),
        ((576,), 1536),
    ],
)
def test_models(M: int, sizes: tuple[int, ...], D: int, close: Callable[..., None]) -> None:
    for cut in (None, Cut()):
        check(M, sizes, D, cut, "cuda", close)
        one = len(sizes) == 1
        check(M, sizes, D, cut, "cuda", close, ranks=(64, 16), slots=(0, 1, -1), residual=one, normed=not one)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "double"])
def test_scales(stored: str, close: Callable[..., None]) -> None:
    form = {"double": True} if stored == "double" else {"stored": stored}
    for M, sizes, D in ((64, (2048, 512, 512), 2048), (20, (176, 80), 704), (9, (16,), 64)):
        check(M, sizes, D, None, "cuda", close, ranks=(20, 5), slots=(0, 1), **form)
        check(M, sizes, D, None, "cuda", close, ranks=(136, 3), slots=(1, -1, 0, 0), **form)
        check(M, sizes, D, None, "cuda", close, residual=True, **form)


@pytest.mark.gpu
@gpu
def test_replays_with_new_rows_and_adapters(close: Callable[..., None]) -> None:
    sizes, D, M = (4096,), 2048, 40
    weights, _ = quantised(sizes, D, "cuda")
    lora, _ = adapters(sizes, D, [0] * M, torch.bfloat16, "cuda")
    x = torch.zeros(M, D, device="cuda", dtype=torch.bfloat16)
    nf4_batch(x, weights, lora)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [nf4_batch(x, weights, lora) for _ in range(20)]
    for _ in range(20):
        x.copy_(torch.randn(M, D))
        lora.slots.copy_(torch.randint(-1, 2, (M,), dtype=torch.int32))
        graph.replay()
        wanted = nf4_batch(x, weights, lora)
        assert wanted.any()
        assert all(torch.equal(y, wanted) for y in captured)
