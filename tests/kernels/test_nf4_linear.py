import re
from dataclasses import replace

import pytest
import torch
from bitsandbytes import functional as bnb

from medlora.kernels import nf4_linear as module
from medlora.kernels import reference
from medlora.kernels.nf4_linear import Config, Cut, LoraTerms, NF4Weights, choose_config, nf4_linear


def quantised(sizes, D, device, double=False, stored=torch.float32):
    """NF4Weights, and the same weights in fp32 from bitsandbytes, module by module; scales that `stored` holds."""
    made = [
        bnb.quantize_4bit(torch.randn(N, D).div(D**0.5).to(device), quant_type="nf4", compress_statistics=double)
        for N in sizes
    ]
    for _, state in made if stored != torch.float32 else ():
        state.absmax = state.absmax.to(stored).float()
    return NF4Weights.of(*zip(*made, strict=True)), [bnb.dequantize_4bit(*each) for each in made]


def adapters(sizes, D, slots, dtype, device, ranks=(16, 5)):
    """One adapter on every module, one on the first alone."""

    def part(N, r):
        return torch.randn(r, D, device=device) / D**0.5, torch.randn(N, r, device=device) / r**0.5, 0.5

    parts = [[part(N, ranks[0]) for N in sizes], [part(sizes[0], ranks[1])] + [None] * (len(sizes) - 1)]
    return LoraTerms.stack(parts, sizes, D, torch.tensor(slots, dtype=torch.int32, device=device), dtype), parts


def held(weights):
    """The weights as a GPU's kernels hold them beside bfloat16: scales in fp32, the table's values rounded."""
    blocks = [w.view(-1, 64) for w in weights]
    scales = [block.abs().amax(1, keepdim=True) for block in blocks]
    return [
        ((block / scale).bfloat16().float() * scale).view_as(w)
        for w, block, scale in zip(weights, blocks, scales, strict=True)
    ]


def expected(x, weights, terms=None, slots=(), norm=None, gated=False, residual=None):
    """Row by row and module by module in fp32, with what the kernel holds in x's dtype rounded to it."""
    weights = held(weights) if x.is_cuda and x.dtype == torch.bfloat16 else weights
    if norm is not None:
        x = torch.nn.functional.rms_norm(x.float(), x.shape[1:], eps=norm[1]).to(x.dtype) * norm[0]
    rows = []
    for m, row in enumerate(x):
        outs = [row.float() @ w.float().T for w in weights]
        for g, part in enumerate(terms[slots[m]] if slots and slots[m] >= 0 else ()):
            if part:
                a, b, scaling = part[0].to(x.dtype).float(), part[1].to(x.dtype).float(), part[2]
                outs[g] = outs[g] + (row.float() @ a.T * scaling).to(x.dtype).float() @ b.T
        rows.append(torch.cat(outs))
    y = torch.stack(rows)
    if gated:
        gate, up = y.to(x.dtype).float().chunk(2, 1)
        return torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual.float()


@pytest.mark.parametrize("double", [False, True], ids=["fp32-scales", "double"])
@pytest.mark.parametrize(
    ("M", "sizes", "D"),
    [
        (1, (48,), 192),
        (1, (64, 64), 512),
        (3, (32, 16, 16), 576),
        (16, (128,), 256),
        (9, (80, 80), 64),
        (2, (48, 16), 512),
        (7, (16,), 1280),
    ],
)
def test_product(M, sizes, D, double, dtype, device, close):
    weights, plain = quantised(sizes, D, device, double)
    x = torch.randn(M, D, device=device).to(dtype)
    close(nf4_linear(x, weights), expected(x, plain))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "sizes", "D"), [(1, (64, 32), 512), (3, (48,), 192)])
def test_scales_in_16_bits_give_the_bits_of_fp32(M, sizes, D, stored, dtype, device):
    assert quantised(sizes, D, device)[0].absmax.dtype == torch.float32, "they do not fit"
    weights, _ = quantised(sizes, D, device, stored=stored)
    assert weights.absmax.dtype == stored
    x = torch.randn(M, D, device=device).to(dtype)
    assert torch.equal(nf4_linear(x, weights), nf4_linear(x, replace(weights, absmax=weights.absmax.float())))


def test_double_quantisation_is_kept_where_it_can_be(device, close):
    weights, plain = quantised((256, 128), 128, device, double=True)
    assert weights.double is not None and weights.absmax.dtype == torch.uint8
    x = torch.randn(2, 128, device=device)
    close(nf4_linear(x, weights), expected(x, plain))
    close(weights.dequantize(torch.empty(384, 128, device=device)), torch.cat(plain))
    undone, _ = quantised((16, 16), 64, device, double=True)
    assert undone.double is None and undone.absmax.dtype == torch.float32


@pytest.mark.parametrize("slots", [[0], [-1], [1, 0, -1], [-1] * 16, [0, 1] * 8])
def test_adapters_in_one_batch(slots, dtype, device, close):
    sizes, D = (64, 32, 32), 256
    weights, plain = quantised(sizes, D, device)
    lora, terms = adapters(sizes, D, [*slots, 0], dtype, device)
    x = torch.randn(len(slots), D, device=device).to(dtype)
    close(nf4_linear(x, weights, lora), expected(x, plain, terms, slots))


@pytest.mark.parametrize("D", [320, 512])
@pytest.mark.parametrize("M", [1, 3])
def test_norm_and_residual(M, D, dtype, device, close):
    weights, plain = quantised((64,), D, device)
    lora, terms = adapters((64,), D, [0] * M, dtype, device)
    wide = torch.randn(M, D + 72, device=device).to(dtype)  # rows further apart than they are long
    x, residual = wide[:, :D], wide[:, D + 4 : D + 68]
    norm = torch.rand(D, device=device).to(dtype), 1e-5
    y = nf4_linear(x, weights, lora, norm=norm)
    close(y, expected(x, plain, terms, [0] * M, norm=norm), roundings=2)  # the norm rounds on both sides
    wanted = expected(x, plain, terms, [0] * M, residual=residual)
    assert nf4_linear(x, weights, lora, residual=residual, out=residual) is residual
    close(residual, wanted)


@pytest.mark.parametrize("slots", [[0], [-1], [1, 0, -1], [0] * 16])
def test_gate_and_up(slots, dtype, device, close):
    sizes, D = (48, 48), 512
    weights, plain = quantised(sizes, D, device)
    lora, terms = adapters(sizes, D, slots, dtype, device)
    x, out = (torch.randn(len(slots), width, device=device).to(dtype) for width in (D, 96))
    norm = torch.rand(D, device=device).to(dtype), 1e-5
    assert nf4_linear(x, weights, lora, norm=norm, gated=True, out=out[:, 48:]).data_ptr() == out[:, 48:].data_ptr()
    # gate and up round on both sides, and so does the norm
    close(out[:, 48:], expected(x, plain, terms, slots, norm=norm, gated=True), roundings=6)


@pytest.mark.parametrize("config", [Config(16, 3, 2, 1, 2), Config(32, 6, 1, 2, 3), Config(64, 1, 1, 4, 3)])
def test_every_share_counts(config, device, close):
    weights, plain = quantised((64, 64), 384, device)
    x = torch.randn(2, 384, device=device)
    close(nf4_linear(x, weights, config=config), expected(x, plain))


def test_reference(dtype, close, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sizes, D, slots = (32, 16), 128, [1, -1, 0]
    weights, plain = quantised(sizes, D, "cpu", double=True)
    lora, terms = adapters(sizes, D, slots, dtype, "cpu")
    x = torch.randn(3, D).to(dtype)
    close(nf4_linear(x, weights, lora, residual=x[:, :48]), expected(x, plain, terms, slots, residual=x[:, :48]))


def run_ptx(asm, word):
    """The registers $0 to $3 that a straight line of PTX makes of $4."""
    registers = {"$4": word}

    def value(name):
        return registers[name] if name in registers else int(name, 0) & 0xFFFFFFFF

    def prmt(a, b, selector):
        table = (a | b << 32).to_bytes(8, "little")
        picks = [selector >> 4 * i & 15 for i in range(4)]
        assert all(pick < 8 for pick in picks), "the top bit of a selector would copy a sign"
        return int.from_bytes(bytes(table[pick] for pick in picks), "little")

    operations = {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "shr": lambda a, b: a >> b,
        "prmt": prmt,
    }
    for name, operands in re.findall(r"(\w+)\.b32 ([^;]+);", asm.split("v;", 1)[1]):
        target, *sources = operands.split(", ")
        registers[target] = operations[name](*map(value, sources))
    return [registers[f"${i}"] for i in range(4)]


def test_decoding_instructions():
    """No GPU runs them here, so they are carried out by hand, every byte in every place."""
    table = torch.tensor(reference.NF4_VALUES).bfloat16()
    for byte in range(256):
        codes = [byte, 255 - byte, byte ^ 0x5A, (byte * 7 + 3) % 256]
        registers = run_ptx(module._decode_asm(), int.from_bytes(bytes(codes), "little"))
        got = torch.tensor([r >> shift & 0xFFFF for r in registers for shift in (0, 16)], dtype=torch.int32)
        even, odd = got.to(torch.int16).view(torch.bfloat16).view(2, 4)
        assert torch.equal(even, table[[c >> 4 for c in codes]])
        assert torch.equal(odd, table[[c & 15 for c in codes]])


def test_configs_fill_the_gpu():
    for sizes, D in (((4096,) * 3, 4096), ((4096,), 4096), ((11008,) * 2, 4096), ((4096,), 11008), ((576,), 576)):
        for M in (1, 16):
            config = choose_config(sizes, D, M)
            steps = D // 64 // config.STEP
            assert all(N % config.BN == 0 for N in sizes) and D // 64 % config.STEP == 0
            assert steps >= config.SPLIT
            assert max(steps // 2, 1) == config.SPLIT or config.SPLIT * sum(sizes) // config.BN >= 528


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize(("sizes", "most", "found"), [((640, 256), 64 * 300, [256, 256, 128, 256]), ((48,), 64, [48])])
def test_pieces_are_views_of_the_whole(sizes, most, found, double, device):
    weights, plain = quantised(sizes, 64, device, double)
    pieces = weights.pieces(most)
    assert [piece.N for piece in pieces] == found
    assert pieces[-1].codes.untyped_storage().data_ptr() == weights.codes.untyped_storage().data_ptr()
    parts = [piece.dequantize(torch.empty(piece.N, 64, device=device)) for piece in pieces]
    assert torch.equal(torch.cat(parts), torch.cat(plain))


def test_parts_are_views(device):
    weights, _ = quantised((32, 16), 64, device)
    first, second = weights.parts()
    assert first.shape == (32 * 32, 1) and second.data_ptr() == weights.codes[32:].data_ptr()


def test_refuses_what_does_not_fit(device):
    weights, _ = quantised((64,), 128, device)
    lora, _ = adapters((64,), 128, [0], torch.float32, device)
    x = torch.randn(1, 128, device=device)
    for arguments, message in (
        ((torch.randn(17, 128, device=device), weights), "1 to 16 rows"),
        ((torch.randn(1, 64, device=device), weights), "rows of 128"),
        ((x.bfloat16(), weights, lora), "do not fit"),
        ((x.expand(2, 128), weights, lora), "do not fit"),
        ((torch.randn(128, 2, device=device).T, weights), "dense"),
        ((x, weights, None), "two alike"),
    ):
        with pytest.raises(ValueError, match=message):
            nf4_linear(*arguments, gated="alike" in message)
    with pytest.raises(ValueError, match="multiples of 16"):
        quantised((40,), 64, device)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("double", [False, True], ids=["fp32-scales", "double"])
@pytest.mark.parametrize("M", [1, 4, 7, 16])
def test_more_tiles_than_programs(M, double, close):
    sizes, D, slots = (8192, 2048), 4352, [0] * (M - 1) + [1]
    weights, plain = quantised(sizes, D, "cuda", double)
    lora, terms = adapters(sizes, D, slots, torch.bfloat16, "cuda")
    x = torch.randn(M, D, device="cuda").bfloat16()
    close(nf4_linear(x, weights, lora), expected(x, plain, terms, slots))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("cut", [Cut(r, w, one) for r, w in ((1, 8), (2, 8), (3, 8), (4, 4), (6, 4)) for one in (0, 1)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_cut_of_one_row(cut, stored, close):
    """Modules with and without an adapter, more ranks than programs, more tiles than programs, few tiles."""
    for sizes, D, ranks, gated in (
        ((4096, 1024, 1024), 4096, (64, 16), False),
        ((64, 32), 256, (128, 5), False),
        ((5504, 5504), 2048, (64, 64), True),
        ((48, 48), 768, (600, 1), True),
    ):
        weights, plain = quantised(sizes, D, "cuda", stored=stored)
        assert weights.absmax.dtype == stored
        x = torch.randn(1, D, device="cuda").bfloat16()
        norm = torch.rand(D, device="cuda").bfloat16(), 1e-5
        for slot in (0, 1, -1):
            lora, terms = adapters(sizes, D, [slot], torch.bfloat16, "cuda", ranks)
            for _ in range(3):  # the counters are zero again
                y = nf4_linear(x, weights, lora, norm=norm, gated=gated, config=cut)
                close(y, expected(x, plain, terms, [slot], norm=norm, gated=gated), roundings=6 if gated else 2)
                assert not weights.counters.any()
            if not gated:
                residual = torch.randn(1, sum(sizes), device="cuda").bfloat16()
                y = nf4_linear(x, weights, lora, residual=residual, config=cut)
                close(y, expected(x, plain, terms, [slot], residual=residual))
        close(
            nf4_linear(x, weights, gated=gated, config=cut),
            expected(x, plain, gated=gated),
            roundings=4 if gated else 1,
        )


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("M", [1, 3])
def test_replays_with_new_rows_and_adapters(M, close):
    sizes, D = (64, 64), 512
    weights, plain = quantised(sizes, D, "cuda")
    lora, terms = adapters(sizes, D, [0] * M, torch.bfloat16, "cuda")
    x = torch.zeros(M, D, device="cuda", dtype=torch.bfloat16)
    nf4_linear(x, weights, lora)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = nf4_linear(x, weights, lora)
    for slots in ([0, 1, -1], [-1, -1, 0], [1, 0, 0], [0, 0, 1]):
        x.copy_(torch.randn(M, D))
        lora.slots.copy_(torch.tensor(slots[:M], dtype=torch.int32))
        graph.replay()
        close(y, expected(x, plain, terms, slots))
