"""The interpreter accepts more than the compiler, so every kernel is also compiled for Hopper, without a GPU.

Run as a script by its own test: the test process has its kernels interpreted. Argument types follow from the
kernel's annotations; only pointers that are not bf16 are named here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

F32 = "*fp32"
NF4 = {"codes": "*u8", "absmax": F32, "code": F32, "outer": F32, "offset": F32}
RMS = {"rms": F32, "dw": F32}
CASES = [  # module, kernel, pointers, constants, warps
    ("nf4", "_dequantize_kernel", NF4, {"DOUBLE": False, "BLOCKS": 64}, 4),
    ("nf4", "_dequantize_kernel", NF4 | {"absmax": "*u8"}, {"DOUBLE": True, "BLOCKS": 64}, 4),
    ("rms_norm", "_forward_kernel", RMS, {"ADD": True, "BLOCK": 4096}, 8),
    ("rms_norm", "_backward_kernel", RMS, {"RESIDUAL": True, "WEIGHT": False, "BLOCK": 4096}, 8),
    ("rms_norm", "_backward_kernel", RMS, {"RESIDUAL": False, "WEIGHT": True, "BLOCK": 4096}, 8),
    ("rope", "_rope_kernel", {}, {"INVERSE": True, "Q_HEADS": 32, "K_HEADS": 8, "HALF": 64}, 4),
    ("swiglu", "_forward_kernel", {}, {"BLOCK": 1024}, 4),
    ("swiglu", "_backward_kernel", {}, {"BLOCK": 1024}, 4),
    ("dropout", "_dropout_kernel", {}, {"GROUPS": 256}, 4),
    (
        "cross_entropy",
        "_cross_entropy_kernel",
        {"labels": "*i64", "losses": F32},
        {"GRAD": True, "BLOCK": 8192},
        16,
    ),
    ("fp8", "_quantize_kernel", {"codes": "*fp8e4nv", "scale": F32}, {"BLOCK": 16384}, 16),
]


def test_for_hopper(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, Path(__file__)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def main():
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget

    types = {"tl.tensor": "*bf16", "tl.constexpr": "constexpr", "int": "i32", "tl.int64": "i64", "float": "fp32"}
    for module, name, pointers, constants, warps in CASES:
        kernel = getattr(import_module(f"medlora.kernels.{module}"), name)
        notes = kernel.fn.__annotations__
        signature = {arg: pointers.get(arg, types[notes[arg]]) for arg in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps})


if __name__ == "__main__":
    main()
