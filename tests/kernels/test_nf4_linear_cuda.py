"""nf4_linear.cu without a GPU, over `cuda_on_cpu`."""

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medlora.kernels import nf4_linear as module
from medlora.kernels.nf4_linear import Cut, nf4_linear

from .conftest import INTERPRETED
from .cuda_on_cpu import compiler, translated
from .test_nf4_linear import adapters, expected, held, quantised

pytestmark = pytest.mark.skipif(
    not (INTERPRETED and shutil.which("g++")), reason="needs g++, and Triton's interpreter for the launch before"
)
FUNCTIONS = ("void meet(", "void reach(")
PATTERNS = (
    (r'asm volatile\("prefetch.*?;\n', ";\n"),
    (r"__shared__ u32 table\[ENTRIES\];", "u32* const table = program->table;"),
    (
        r"__shared__ float sums(\[2\]\S*), squares_of(.*?);",
        r"auto& sums = (float(&)\1)program->sums; auto& squares_of = (float(&)\2)program->squares_of;",
    ),
    (r"extern __shared__ uint4 staged\[\];", "uint4* const staged = (uint4*)program->staged;"),
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    source = translated("nf4_linear.cu", "nf4_product", FUNCTIONS, PATTERNS)
    return compiler(source, tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize(
    ("cut", "slots", "sizes", "D", "stored", "options"),
    [
        (Cut(1, 4, True), [0], (64, 32, 32), 512, "bfloat16", {"norm": True}),
        (Cut(1, 4, True), [1], (64, 32, 32), 512, "bfloat16", {"norm": True}),
        (Cut(1, 4, True), [-1], (64, 32, 32), 512, "bfloat16", {"residual": True}),
        (Cut(1, 8, True), [0], (64,), 1280, "float16", {"residual": True}),
        (
            Cut(1, 4, True),
            [0],
            (512,),
            1280,
            "bfloat16",
            {"norm": True, "ranks": (5, 1), "programs": 32},
        ),  # four a rank
        (Cut(1, 2, True), [0], (256,), 256, "bfloat16", {"residual": True, "ranks": (3, 1), "programs": 16}),  # two
        (Cut(1, 2, True), [0], (80, 80), 256, "float32", {"norm": True, "gated": True}),
        (Cut(1, 4, True), [1], (64, 64), 512, "float32", {"norm": True, "double": True}),
        (Cut(1, 4), [1, -1, 0], (64, 32, 32), 512, "float32", {"norm": True}),
        (Cut(1, 8), [0, 1, 0, -1] * 4, (48, 48), 512, "bfloat16", {"gated": True}),
    ],
)
def test_program_by_program(
    cut: Cut, slots: list[int], sizes: tuple[int, ...], D: int, stored: str, options: dict[str, Any],
    compiled: Callable[..., Any], close: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_compiled", compiled)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=options.get("programs", 3))
    )
    monkeypatch.setattr("medlora.kernels.nf4_linear.use_triton", lambda _: True)
    M, dtype = len(slots), torch.bfloat16
    weights, plain = quantised(sizes, D, "cpu", options.get("double", False), getattr(torch, stored))
    lora, terms = adapters(sizes, D, slots, dtype, "cpu", ranks=options.get("ranks", (20, 5)))
    x, gated = torch.randn(M, D).to(dtype), options.get("gated", False)
    norm = (torch.rand(D).to(dtype), 1e-5) if options.get("norm") else None
    residual = torch.randn(M, sum(sizes)).to(dtype) if options.get("residual") else None
    wanted = expected(x, held(plain), terms, slots, norm, gated, residual)
    for _ in range(2):
        y = nf4_linear(x, weights, lora, norm=norm, gated=gated, residual=residual, config=cut)
        close(y, wanted, roundings=1 + (norm is not None) + 4 * gated)
        assert not weights.counters.any()
