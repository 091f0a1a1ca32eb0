"""The kernels of a decode step on a GPU: checked against fp32, then timed at Llama-2-7B's shapes.

    python bench/kernels_decode.py [--rows 1,8,16,32,64] [--out result.json]
    python bench/kernels_decode.py --tiny        a rehearsal on a CPU, of the script: the plain reference serves there

Each call of a timed loop reads another copy of the weights, more than the L2 cache holds, and the loop is one CUDA
graph, so that neither caching nor the host's launches count. Reported are microseconds a call (all launches of
`nf4_linear`; norm, SwiGLU and LoRA term of rank 64 included), bytes of codes, scales and adapters over that time, and
their share of the bandwidth of a device-to-device copy in the same process. bitsandbytes multiplies without norm,
SwiGLU and LoRA; from version 0.50 its `matmul_4bit` may choose a fused kernel for several rows by itself.

More than 16 rows go through `nf4_batch`, beside cuBLAS over weights dequantised for good with the LoRA term as a decode
step adds it then. Bytes are those of the codes there too, so that rates compare.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medlora.generate.weights import add_alike, gated
from medlora.kernels import reference
from medlora.kernels.decode_attention import PAGE, decode_attention, rope_append
from medlora.kernels.nf4_batch import Cut as Batch
from medlora.kernels.nf4_batch import choose_cut as choose_batch
from medlora.kernels.nf4_batch import nf4_batch
from medlora.kernels.nf4_linear import Config, Cut, LoraTerms, NF4Weights, choose_config, nf4_linear
from medlora.kernels.rms_norm import rms_norm

RANK = 64
DTYPE = torch.bfloat16
TOUCHED = 300e6  # bytes of weights a loop reads before it comes back to the first


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    sizes: tuple[int, ...]
    D: int
    norm: bool = False
    gated: bool = False


SHAPES = (
    Shape("q, k, v", (4096,) * 3, 4096, norm=True),
    Shape("o", (4096,), 4096),
    Shape("gate, up", (11008,) * 2, 4096, norm=True, gated=True),
    Shape("down", (4096,), 11008),
)
TINY = (Shape("q, k, v", (64, 32, 32), 128, norm=True), Shape("gate, up", (64, 64), 256, norm=True, gated=True))


@dataclass(frozen=True, slots=True)
class Dense:
    """Weights dequantised for good."""


Way = Config | Cut | Batch | Dense
Norm = tuple[Tensor, float] | None


def variants(shape: Shape, M: int) -> Iterator[Way]:
    """nf4_linear.cu in two launches and, for one row, in one; then the Triton kernel as `choose_config` cuts it.

    For more than 16 rows nf4_batch.cu and cuBLAS.
    """
    if M > 16:
        if torch.cuda.is_available():
            yield choose_batch(torch.device("cuda"))
        yield Dense()
        return
    if torch.cuda.is_available():
        yield from (Cut(r) for r in (1, 2))
        if M == 1:
            yield from (Cut(r, warps, one=True) for r, warps in ((2, 8), (3, 8), (4, 4)))
    yield choose_config(shape.sizes, shape.D, M)


def product(
    shape: Shape, norm: Norm, way: Way, weights: NF4Weights, lora: LoraTerms | None = None
) -> Callable[[Tensor], Tensor]:
    if isinstance(way, Config | Cut):
        return lambda x: nf4_linear(x, weights, lora, norm=norm, gated=shape.gated, config=way)
    every = lora.a[0] if lora else torch.empty(0, weights.D, dtype=DTYPE, device=weights.codes.device)
    if isinstance(way, Dense):
        every = torch.cat([weights.dequantize(every.new_empty(weights.N, weights.D)), every])
    factors = lora.scaling[0].repeat_interleave(RANK).to(DTYPE).expand(64, -1).contiguous() if lora else None

    def run(x: Tensor) -> Tensor:
        if isinstance(way, Batch):
            y = nf4_batch(x, weights, lora, norm=norm, cut=way)
        else:
            x = rms_norm(x, *norm) if norm else x
            y, h = F.linear(x, every).tensor_split([weights.N], 1)
            if lora and factors is not None:
                h *= factors[: len(x)]
                if len(set(shape.sizes)) == 1 < len(shape.sizes):
                    add_alike(y, h, lora.b[0], len(shape.sizes))
                else:
                    parts = zip(y.split(shape.sizes, 1), h.split(RANK, 1), lora.b[0].split(shape.sizes), strict=True)
                    for columns, ranks, b in parts:
                        columns.addmm_(ranks, b.t())
        return gated(y) if shape.gated else y

    return run


def make(shape: Shape, M: int, device: str) -> tuple[NF4Weights, LoraTerms]:
    N, D = sum(shape.sizes), shape.D
    codes = torch.randint(256, (N, D // 2), dtype=torch.uint8, device=device)
    scales = (torch.rand(N, D // 64, device=device) / D**0.5).to(DTYPE)  # as of a base in bfloat16
    weights = NF4Weights(codes, scales, shape.sizes)
    scaling = torch.ones(1, len(shape.sizes), device=device)
    a = (torch.randn(1, len(shape.sizes) * RANK, D, device=device) / D**0.5).to(DTYPE)
    b = (torch.randn(1, N, RANK, device=device) / RANK**0.5).to(DTYPE)
    return weights, LoraTerms(a, b, scaling, torch.zeros(M, dtype=torch.int32, device=device))


def describe(config: Way) -> str:
    if isinstance(config, Config):
        return "Triton " + " ".join(map(str, config))
    if isinstance(config, Batch):
        return "nf4_batch"
    if isinstance(config, Dense):
        return "dequantised"
    return f"{config.resident} of {config.warps} warps{', one launch' if config.one else ''}"


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def microseconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median over replays of one graph of all calls, divided by their number."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(12):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return float(statistics.median(times[2:]))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GB."""
    import triton  # a rehearsal does without

    source = torch.randint(256, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**31 / (triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") / 1e3)


def bitsandbytes_call(weights: NF4Weights, x: Tensor) -> Callable[[], Any]:
    """The same product without the LoRA term, module by module as bitsandbytes would be called."""
    from bitsandbytes import functional as bnb
    from bitsandbytes import matmul_4bit

    code = torch.tensor(reference.NF4_VALUES, device=x.device)
    states = [
        bnb.QuantState(absmax.flatten().float(), torch.Size((N, weights.D)), code, 64, "nf4", x.dtype)
        for N, absmax in zip(weights.sizes, torch.split(weights.absmax, list(weights.sizes)), strict=True)
    ]
    pairs = list(zip(weights.parts(), states, strict=True))
    return lambda: [matmul_4bit(x, codes.t(), state) for codes, state in pairs]


def bench_linear(shape: Shape, M: int, copy: float | None, device: str) -> list[dict[str, Any]]:
    x = torch.randn(M, shape.D, device=device).to(DTYPE)
    weights, lora = make(shape, M, device)
    norm = (torch.rand(shape.D, device=device).to(DTYPE), 1e-5) if shape.norm else None
    call = partial(product, shape, norm)
    w = weights.dequantize(torch.empty(weights.N, weights.D, device=device))
    terms = (lora.a.float(), lora.b.float(), lora.scaling, lora.slots)
    wide = (norm[0].float(), norm[1]) if norm else None
    wanted = reference.nf4_linear(x.float(), w, shape.sizes, terms, wide, gated=shape.gated)
    size = weights.codes.nbytes + weights.absmax.nbytes + lora.a.nbytes + lora.b.nbytes
    copies = [(weights, lora)] + [make(shape, M, device) for _ in range(int(TOUCHED / size) if copy else 0)]
    rows = []
    for config in variants(shape, M):
        row: dict[str, Any] = {"shape": shape.name, "M": M, "kernel": describe(config)}
        row["error"] = relative(call(config, weights, lora)(x), wanted)
        if copy:
            calls = [partial(call(config, w, a), x) for w, a in copies]
            row |= rate(microseconds(calls), size, copy)
        rows.append(row)
        if copy and not isinstance(config, Config):
            calls = [partial(call(config, w), x) for w, _ in copies]
            bare = rate(microseconds(calls), size - lora.a.nbytes - lora.b.nbytes, copy)
            rows.append(row | {"kernel": f"{row['kernel']} no adapter", "error": None} | bare)
    if copy and M <= 16:
        read = weights.codes.nbytes + weights.absmax.nbytes
        took = microseconds([bitsandbytes_call(each, x) for each, _ in copies])
        rows.append({"shape": shape.name, "M": M, "kernel": "bitsandbytes", "error": None} | rate(took, read, copy))
    return rows


def rate(took: float, size: float, copy: float) -> dict[str, float]:
    return {"us": took, "gb_s": size / took / 1e3, "share": size / took * 1e6 / copy}


def bench_attention(B: int, length: int, copy: float | None, device: str) -> Iterator[dict[str, Any]]:
    H, C = (32, 128) if copy else (4, 16)
    blocks = -(-length // PAGE)
    k, v = (torch.randn(B * blocks, PAGE, H, C, device=device).to(DTYPE) for _ in range(2))
    table = torch.randperm(B * blocks, device=device).view(B, blocks).int()
    lengths = torch.full((B,), length, dtype=torch.int32, device=device)
    qkv = torch.randn(B, 3 * H * C, device=device).to(DTYPE)
    angles = torch.rand(length, C // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    wide_k, wide_v = k.float(), v.float()
    wide_q = reference.rope_append(qkv.float(), cos, sin, wide_k, wide_v, table, lengths)
    q = rope_append(qkv, cos, sin, k, v, table, lengths)
    row: dict[str, Any] = {"shape": f"length {length}", "M": B, "kernel": "rope_append", "error": relative(q, wide_q)}
    if copy:
        row["us"] = microseconds([lambda: rope_append(qkv, cos, sin, k, v, table, lengths)] * 20)
    yield row
    got = decode_attention(q, k, v, table, lengths, C**-0.5)
    wanted = reference.decode_attention(wide_q, wide_k, wide_v, table, lengths, C**-0.5)
    row = row | {"kernel": "attention", "error": relative(got, wanted)}
    if copy:
        took = microseconds([lambda: decode_attention(q, k, v, table, lengths, C**-0.5)] * 20)
        row |= rate(took, 4 * B * length * H * C, copy)
    yield row


def show(row: dict[str, Any]) -> None:
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    timing = f"{row['us']:9.1f}" if "us" in row else ""
    timing += f"{row['gb_s']:9.0f}{row['share']:8.2f}" if "gb_s" in row else ""
    print(f"{row['shape']:16}{row['M']:3} {row['kernel']:38}{error:>9}{timing}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1,8,16")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    copy, device = (None, "cpu") if arguments.tiny else (copy_bandwidth(), "cuda")
    if copy:
        print(f"{torch.cuda.get_device_name()}, copy {copy / 1e9:.0f} GB/s")
    print(f"{'':16}{'M':>3} {'programs a multiprocessor':38}{'error':>9}{'us':>9}{'GB/s':>9}{'share':>8}")
    found = []
    for M in map(int, arguments.rows.split(",")):
        for shape in TINY if arguments.tiny else SHAPES:
            for row in bench_linear(shape, M, copy, device):
                found.append(row)
                show(row)
    for B, length in ((1, 70), (2, 100)) if arguments.tiny else ((1, 220), (1, 4096), (8, 220), (64, 220)):
        for row in bench_attention(B, length, copy, device):
            found.append(row)
            show(row)
    wrong = [row for row in found if row["error"] is not None and not row["error"] < 1e-2]
    if arguments.out:
        arguments.out.write_text(json.dumps({"copy": copy, "rows": found}, indent=2) + "\n")
    if wrong:
        raise SystemExit(f"{len(wrong)} kernels are off by more than 1e-2")


if __name__ == "__main__":
    main()
