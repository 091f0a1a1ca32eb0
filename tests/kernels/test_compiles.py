"""The interpreter accepts more than the compiler, so every kernel is also compiled for the cards that it runs on, whose
shared memory it must fit, without a GPU.

Run as a script by its own test: the test process has its kernels interpreted. Argument types follow from the
kernel's annotations; only pointers that are not bf16 are named here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medlora.kernels import document_attention, low_rank

F32 = "*fp32"
NF4 = {"codes": "*u8", "absmax": F32, "code": F32, "outer": F32, "offset": F32}
RMS = {"rms": F32, "dw": F32}
SUMS = {"da": F32, "db": F32}
ADAPTED = {"ABOVE": True, "BELOW": True, "AGAIN": True, "ROWS": 32, "COLUMNS": 64}
BYTES = {"absmax": "*u8"}
DECODE = NF4 | {"scaling": F32, "shares": F32, "slots": "*i32", "counters": "*i32"}
ONE_ROW = dict.fromkeys(("M", "S", "G"), "constexpr")  # Triton makes a constant of every integer that is 1
PRODUCT = {"LORA": True, "RESIDUAL": True, "ASM": True, "BN": 64, "BR": 64, "STEP": 4}
PREPARE = {"D": 4096, "CHUNK": 4096, "RANKS": 4, "EARLY": True}
PAGED = {"table": "*i32", "lengths": "*i32", "parts": F32, "lse": F32}
DOCUMENTS = {"tiles": "*i32", "lse": F32, "delta": F32}


def tiles(rows: int, columns: int, ranks: int) -> dict[str, str]:
    blocks = {"x": [rows, 1, columns], "h": [rows, 1, ranks], "dy": [rows, columns], "dh": [rows, ranks]}
    return {name: f"tensordesc<bf16{block}>" for name, block in blocks.items()}


CASES = [  # module, kernel, pointers, constants, warps or all that is launched with
    ("nf4", "_dequantize_kernel", NF4, {"DOUBLE": False, "BLOCKS": 64}, 4),
    ("nf4", "_dequantize_kernel", NF4 | {"absmax": "*u8"}, {"DOUBLE": True, "BLOCKS": 64}, 4),
    ("nf4", "_dequantize_kernel", NF4 | {"absmax": "*bf16"}, {"DOUBLE": False, "BLOCKS": 64}, 4),
    ("rms_norm", "_forward_kernel", RMS, {"ADD": True, "BLOCK": 4096}, 8),
    ("rms_norm", "_backward_kernel", RMS, {"RESIDUAL": True, "WEIGHT": False, "BLOCK": 4096}, 8),
    ("rms_norm", "_backward_kernel", RMS, {"RESIDUAL": False, "WEIGHT": True, "BLOCK": 4096}, 8),
    ("rope", "_rope_kernel", {}, {"INVERSE": True, "VALUES": True, "Q_HEADS": 32, "K_HEADS": 8, "HALF": 64}, 4),
    ("swiglu", "_forward_kernel", {}, {"BLOCK": 1024}, 4),
    ("swiglu", "_backward_kernel", {}, {"AGAIN": True, "BLOCK": 1024}, 4),
    ("swiglu", "_adapted_forward_kernel", {}, {"Q": 64, "ROWS": 64, "COLUMNS": 64}, 8),
    ("swiglu", "_adapted_backward_kernel", SUMS | tiles(32, 64, 64), ADAPTED | {"R": 64, "Q": 64, "AGAIN": False}, 4),
    ("swiglu", "_adapted_backward_kernel", SUMS | tiles(32, 64, 16), ADAPTED | {"R": 16, "Q": 16, "BELOW": False}, 4),
    ("swiglu", "_adapted_backward_kernel", SUMS | tiles(32, 64, 16), ADAPTED | {"R": 16, "Q": 16, "ABOVE": False}, 4),
    ("embedding", "_gather_kernel", {"ids": "*i64"}, {"BLOCK": 4096}, 4),
    ("dropout", "_dropout_kernel", {"seed": "*i64"}, {"GROUPS": 256}, 4),
    (
        "cross_entropy",
        "_cross_entropy_kernel",
        {"labels": "*i64", "losses": F32},
        {"GRAD": True, "BLOCK": 8192},
        16,
    ),
    ("fp8", "_quantize_kernel", {"codes": "*fp8e4nv", "scale": F32}, {"BLOCK": 16384}, 16),
    ("nf4_linear", "_prepare_kernel", DECODE, PREPARE | {"NORM": True, "BY_PARITY": False}, 8),
    ("nf4_linear", "_prepare_kernel", DECODE | ONE_ROW, PREPARE | {"NORM": False, "BY_PARITY": True}, 8),
    ("nf4_linear", "_product_kernel", DECODE | ONE_ROW, PRODUCT | {"DOUBLE": False, "BM": 8, "SPLIT": 8}, 4),
    ("nf4_linear", "_product_kernel", DECODE, PRODUCT | {"DOUBLE": False, "BM": 16, "SPLIT": 1}, 2),
    (
        "nf4_linear",
        "_product_kernel",
        DECODE | ONE_ROW | {"absmax": "*fp16"},
        PRODUCT | {"DOUBLE": False, "BM": 8, "SPLIT": 8},
        4,
    ),
    ("nf4_linear", "_product_kernel", DECODE | BYTES, PRODUCT | {"DOUBLE": True, "BM": 8, "SPLIT": 2}, 4),
    (
        "nf4_linear",
        "_product_kernel",
        DECODE | dict.fromkeys(("halves", "h", "b", "residual", "y"), F32),
        PRODUCT | {"DOUBLE": False, "BM": 8, "SPLIT": 8, "ASM": False},
        4,
    ),
    ("low_rank", "_add_kernel", {}, {"STEP": 64}, low_rank.LAUNCH),
    ("copies", "_copy_kernel", {"table": "*i64", "source": F32}, {"SHARE": 4096}, 8),
    ("document_attention", "_tiles_kernel", {"starts": "*i32", "tiles": "*i32"}, {"TILE": 64, "SPAN": 64}, 1),
    ("document_attention", "_forward_kernel", DOCUMENTS, {"C": 128}, document_attention.FORWARD),
    ("document_attention", "_queries_kernel", DOCUMENTS, {"C": 128}, document_attention.QUERIES),
    ("document_attention", "_keys_kernel", DOCUMENTS, {"C": 128}, document_attention.KEYS),
    ("decode_attention", "_rope_append_kernel", PAGED, {"HEADS": 1, "HALF": 64, "EARLY": True}, 1),
    ("decode_attention", "_rope_append_kernel", PAGED, {"HEADS": 8, "HALF": 64, "EARLY": True}, 1),
    ("decode_attention", "_attention_kernel", PAGED, {"SHARES": 1, "GROUP": 16, "WIDTH": 128, "EARLY": True}, 4),
    (
        "decode_attention",
        "_attention_kernel",
        PAGED | {"out": F32, "group": "constexpr", "pages": "constexpr"},
        {"SHARES": 8, "GROUP": 16, "WIDTH": 64, "EARLY": False},
        4,
    ),
    ("decode_attention", "_join_kernel", PAGED, {"SHARES": 9, "COUNT": 16, "WIDTH": 128, "EARLY": True}, 1),
]


SHARED = {75: 64, 86: 99, 90: 227}  # KiB a program may have: a T4, an RTX 3090 or 4090, an H100
# From which capability on a kernel serves; others from the first. Those that multiply need tensor cores.
SINCE = {
    "fp8": 89, "document_attention": 90, "nf4_linear": 80, "decode_attention": 80, "low_rank": 80,
    "_adapted_forward_kernel": 80, "_adapted_backward_kernel": 80,
}  # fmt: skip


@pytest.mark.parametrize("capability", SHARED)
def test_for(capability, tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, Path(__file__), str(capability)]
    halves = [subprocess.Popen([*command, str(half)], env=environment, stderr=subprocess.PIPE) for half in range(2)]
    errors = [run.communicate()[1].decode() for run in halves]
    assert [run.returncode for run in halves] == [0, 0], "".join(errors)


def main(capability, half):
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget

    types = {"tl.tensor": "*bf16", "tl.constexpr": "constexpr", "int": "i32", "tl.int64": "i64", "float": "fp32"}
    serving = [case for case in CASES if max(SINCE.get(case[0], 0), SINCE.get(case[1], 0)) <= capability]
    for module, name, pointers, constants, how in serving[half::2]:
        options = {"num_warps": how} if isinstance(how, int) else {k: v for k, v in how.items() if k.islower()}
        more = {} if isinstance(how, int) else {k: v for k, v in how.items() if k.isupper()}
        if capability < 90 and "EARLY" in constants:
            more["EARLY"] = False
        kernel = getattr(import_module(f"medlora.kernels.{module}"), name)
        notes = kernel.fn.__annotations__
        signature = {arg: pointers.get(arg) or types[notes[arg]] for arg in kernel.arg_names}
        if capability < 80:
            signature = {arg: kind.replace("bf16", "fp16") for arg, kind in signature.items()}
        ones = {arg: 1 for arg, kind in signature.items() if kind == "constexpr"}
        source = triton.compiler.ASTSource(kernel, signature, ones | constants | more)
        shared = triton.compile(source, GPUTarget("cuda", capability, 32), options).metadata.shared
        assert shared <= SHARED[capability] * 1024, f"{module}.{name}: {shared} bytes"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
