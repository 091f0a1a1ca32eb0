"""CUDA C++ without a GPU: compiled as C++ over `cuda_on_cpu.hpp`, a thread for every thread of its programs.

What PTX does in a kernel (products, loads, rounding) is done there; indices and counters are the kernel's own. What
only a GPU decides, its memory model above all, is left to the tests marked so.
"""

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from medlora.kernels import cuda
from medlora.kernels.nf4 import TABLE

PTX = (
    "u16 narrow(", "float half(", "u32 times(", "uint4 stream(", "u32 look_up(", "void mma(", "void early_start(",
    "int arrived(",
)  # fmt: skip


def translated(
    file: str, name: str, functions: Sequence[str], patterns: Sequence[tuple[str, str]], together: str = "programs"
) -> str:
    """The source of kernel `name` without the functions of PTX and `functions`, by their starts, with `patterns`
    replaced; `together` is how many programs run at once, which must be all if they wait for each other."""
    source = cuda.source(file)
    for function in (*PTX, *functions):
        pattern = rf"(template <[^\n]*>\n)?__device__[^\n]*{re.escape(function)}.*?\n}}\n"
        source, found = re.subn(pattern, "", source, count=1, flags=re.DOTALL)
        assert found == 1, function
    for pattern, text in patterns:
        source, found = re.subn(pattern, text, source, flags=re.DOTALL)
        assert found == 1, pattern
    arguments = re.search(rf" {name}\((.*?)\) \{{", source, re.DOTALL)
    assert arguments and "__shared__ " not in source
    names = ", ".join(re.findall(r"(\w+)(?:,|$)", arguments[1].replace("\n", " ")))
    body = f"launch(programs, {together}, THREADS, {name}, {names});"
    call = f'extern "C" void run(int programs, {arguments[1]}) {{ {body} }}\n'
    return '#include "cuda_on_cpu.hpp"\n' + source.replace("__restrict__", "") + call.replace("__restrict__", "")


def compiler(source: str, folder: Path) -> Callable[..., Any]:
    """In the place of a module's `_compiled`."""
    (folder / "kernel.cpp").write_text(source, encoding="utf-8")
    options = f"-std=c++20 -O1 -w -fno-strict-aliasing -fPIC -pthread -I{folder.parent}".split()
    header = Path(__file__).with_suffix(".hpp")
    ready = folder.parent / f"{header.name}.gch"  # compiled once for all folders beside this one
    if not ready.exists():
        subprocess.run(["g++", *options, "-x", "c++-header", header, "-o", ready], check=True)
    built = {}

    def compile_(device: int, shared: int, **defined: int) -> Any:
        library = folder / ("_".join(map(str, defined.values())) + ".so")
        if library not in built:
            macros = [f"-D{name}={value}" for name, value in (defined | {"TABLE": TABLE}).items()]
            subprocess.run(["g++", *options, "-shared", *macros, folder / "kernel.cpp", "-o", library], check=True)
            built[library] = ctypes.CDLL(str(library)).run

        def launch(programs: int, *arguments: Tensor | int | float) -> None:
            built[library](programs, *map(cuda._value, arguments))

        launch.resident = 1  # type: ignore[attr-defined]
        return launch

    return compile_
