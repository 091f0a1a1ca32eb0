"""nf4_linear.cu without a GPU: compiled as C++ over `cuda_on_cpu.hpp`, a thread for every thread of its programs.

What PTX does in it (products, loads, rounding) is done there; indices, the wait for h and the counters are the
kernel's own. What only a GPU decides, its memory model above all, is left to the tests marked so.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from medlora.kernels import cuda
from medlora.kernels import nf4_linear as module
from medlora.kernels.nf4_linear import Cut, nf4_linear

from .conftest import INTERPRETED
from .test_nf4_linear import adapters, expected, held, quantised

pytestmark = pytest.mark.skipif(
    not (INTERPRETED and shutil.which("g++")), reason="needs g++, and Triton's interpreter for the launch before"
)
REPLACED = ("u16 narrow(", "void mma(", "uint4 stream(", "int arrived(", "void meet(", "void reach(")


def translated() -> str:
    """The source without the functions of REPLACED, its other PTX and what is shared replaced."""
    source = Path(module.__file__).with_name("nf4_linear.cu").read_text(encoding="utf-8")
    for name in REPLACED:
        function = rf"__device__[^\n]*{re.escape(name)}.*?\n}}\n"
        source = re.sub(function, "", source, count=1, flags=re.DOTALL)
    for pattern, text in (
        (r'asm volatile\("ld\.shared\.u32.*?"r"\((.*?) \+ own\)\);', r"two = table[\1 / 4 + lane];"),
        (r'asm\("cvt\.f32\.f16.*?"h"\((.*?)\)\);', r"wide = half(\1);"),
        (r'asm volatile\("prefetch.*?;\n', ";\n"),
        (r"const u32 own = .*?;\n", "\n"),
        (r"__shared__ u32 table\[256 \* 32\];", "u32* const table = program->table;"),
        (
            r"__shared__ float sums(\[2\]\S*), squares_of(.*?);",
            r"auto& sums = (float(&)\1)program->sums; auto& squares_of = (float(&)\2)program->squares_of;",
        ),
        (r"extern __shared__ uint4 staged\[\];", "uint4* const staged = (uint4*)program->staged;"),
    ):
        source, found = re.subn(pattern, text, source, flags=re.DOTALL)
        assert found == 1, pattern
    arguments = re.search(r"nf4_product\((.*?)\) \{", source, re.DOTALL)
    assert arguments and "__shared__ " not in source
    names = ", ".join(re.findall(r"(\w+)(?:,|$)", arguments[1].replace("\n", " ")))
    call = f'extern "C" void run(int programs, {arguments[1]}) {{ launch(programs, THREADS, nf4_product, {names}); }}\n'
    return '#include "cuda_on_cpu.hpp"\n' + source.replace("__restrict__", "") + call.replace("__restrict__", "")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """In the place of `nf4_linear._compiled`."""
    folder, built = tmp_path_factory.mktemp("cuda"), {}
    (folder / "kernel.cpp").write_text(translated(), encoding="utf-8")
    table = ",".join(map(str, torch.tensor(module.reference.NF4_VALUES).bfloat16().view(torch.uint16).tolist()))

    def compile_(device: int, shared: int, **defined: int) -> Any:
        library = folder / ("_".join(map(str, defined.values())) + ".so")
        if library not in built:
            macros = [f"-D{name}={value}" for name, value in (defined | {"TABLE": table}).items()]
            options = f"-std=c++20 -O1 -w -fno-strict-aliasing -shared -fPIC -pthread -I{Path(__file__).parent}".split()
            subprocess.run(["g++", *options, *macros, folder / "kernel.cpp", "-o", library], check=True)
            built[library] = ctypes.CDLL(str(library)).run

        def launch(programs: int, *arguments: Tensor | int | float) -> None:
            built[library](programs, *map(cuda._value, arguments))

        launch.resident = 1  # type: ignore[attr-defined]
        return launch

    return compile_


@pytest.mark.parametrize(
    ("cut", "slots", "sizes", "D", "stored", "options"),
    [
        (Cut(1, 4, True), [0], (64, 32, 32), 512, "bfloat16", {"norm": True}),
        (Cut(1, 4, True), [1], (64, 32, 32), 512, "bfloat16", {"norm": True}),
        (Cut(1, 4, True), [-1], (64, 32, 32), 512, "bfloat16", {"residual": True}),
        (Cut(1, 8, True), [0], (64,), 1280, "float16", {"residual": True}),
        (Cut(1, 8, True), [0], (64,), 1280, "bfloat16", {"norm": True, "ranks": (1, 1)}),  # a rank in three shares
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
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
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
