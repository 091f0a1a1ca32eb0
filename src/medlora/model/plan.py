"""How a run fits the memory of its device: the peak of every setting, from shapes alone, and the fastest that fits.

base         4 bits a weight and its scales on a GPU, beside it the dequantised weights where they are kept; on a
             CPU the dequantised weights alone; embeddings and head in the compute dtype
adapter      float32 weight, gradient and optimizer state, and a copy in the compute dtype
activations  what `Recompute` keeps of each layer (see `model.fused`), and what one layer has at work
head         one chunk of logits

The peak of a step that keeps activations is at the start of a backward pass, its last row's, where the adapter has only
the gradients of rows before it; of one that has nothing left to free (`offload`), at its end. What is predicted is what
torch's allocator gives out. Seconds are those of an average step, the host's or the device's, by an H100 or H200; they
rank the settings and promise nothing elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple

import torch

from medlora.data.prompts import Example
from medlora.kernels.attention import dense_length
from medlora.kernels.dispatch import next_power_of_2
from medlora.kernels.document_attention import HEAD_SIZES, serves
from medlora.kernels.product import LONG
from medlora.model.fused import Recompute
from medlora.model.graphs import ROUND, rounded
from medlora.model.memory import free_bytes
from medlora.model.packed import dealt
from medlora.recipe import Recipe

GIB = 2**30
CHUNK = 1024  # rows of logits at once
WORKSPACE = 2**25  # bytes that cuBLAS takes on Hopper for each stream of a thread: of ours, and autograd's
SLACK, ROOM = 1.04, 2**29  # what the allocator holds beyond what it has given out, and bytes of that at least
PROCESS = 0.7e9  # the interpreter and its libraries, which share a CPU's memory
FLOPS, BANDWIDTH = 6.5e14, 3.4e12  # of products, and bytes a second
MULTIPROCESSORS = 132  # of an H100 or H200
RATES = {(8, 0): 2.2e12, (9, 0): 5e12, (10, 0): 1e13, (10, 3): 1e13}
"""Products a second of one multiprocessor, by compute capability; elsewhere, on cards for workstations, `RATE`."""
RATE = 1e12
ROW = 0.01  # seconds that a further row costs at least
# Seconds of a layer's two passes: what a slow host launches or captures them in, and more for each group of modules
# with adapters, and what the device takes however short the row; by an H200 of a virtual machine. How much longer the
# host takes by ways, and where it dequantises as well.
LAUNCH, ADAPTED, KERNELS = 2.5e-3, 0.5e-3, 0.6e-3
LAUNCHES, DEQUANTISING = {"none": 1.0, "selective": 1.2, "full": 1.5, "offload": 1.6}, 1.4
PARTS = 2, 4, 8  # of an octave
SOME, QUANTILES = 500, 8  # steps whose lengths are looked at, and how many stand for them
NARROW = 900  # of the products' time, over the hidden size: all else, which moves a token's width and not its square
READERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # of one input each
FEW = 8  # rows: as many are tried in any number, more where a step's samples divide by them
STATE = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2, "paged_adamw_32bit": 0, "paged_adamw_8bit": 0}
"""Bytes of optimizer state a weight on the device."""
OPTIM_SECONDS = {"adamw_torch": 5e-5, "adamw_8bit": 5e-5, "paged_adamw_32bit": 2e-4, "paged_adamw_8bit": 1.2e-4}
"""Of a step, more than the fused one's, for each matrix that is trained."""
WORDS = {
    "none": "activations kept",
    "selective": "norms and gate-up products recomputed",
    "full": "layers recomputed",
    "offload": "layers recomputed in halves, their inputs in host memory",
}


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_size: int = 0
    """0: hidden / heads."""

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Of a LLaMA-family model's config."""
        return cls(
            config.model_type,
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            config.vocab_size,
            bool(config.tie_word_embeddings),
            getattr(config, "head_dim", None) or 0,
        )

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of a head, of q, of k and v together."""
        C = self.head_size or self.hidden // self.heads
        return C, self.heads * C, 2 * self.kv_heads * C

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear module of a layer."""
        D, F = self.hidden, self.intermediate
        _, q, both = self.widths
        kv = both // 2
        attention = {"q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, q)}
        return attention | {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(n * d for n, d in self.modules.values())

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def targets(self, names: str | Sequence[str]) -> list[str]:
        return list(self.modules) if names == "all-linear" else [name for name in self.modules if name in names]

    def lora_weights(self, r: int, names: str | Sequence[str]) -> int:
        return self.layers * r * sum(sum(self.modules[name]) for name in self.targets(names))


SHAPES = (
    Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, tied=True),
    Shape("TinyLlama-1.1B", 2048, 5632, 22, 32, 4, 32000),
    Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, tied=True),
    Shape("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128256, tied=True),
    Shape("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000),
    Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256),
    Shape("Llama-2-13B", 5120, 13824, 40, 40, 40, 32000),
    Shape("Llama-2-70B", 8192, 28672, 80, 64, 8, 32000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a recipe asks of a device, as far as memory goes."""

    recipe: Recipe
    tokens: int
    """Of the largest step."""
    longest: int
    """Tokens of the longest row."""
    steps: tuple[int, ...] = ()
    """Tokens of some steps as they may come, rising."""
    alike: bool = False
    """All rows of the largest step are of one length."""
    uniform: bool = False
    """All rows of all steps are."""
    width: int = 2
    """Bytes of the compute dtype."""
    on_gpu: bool = True
    host: float = math.inf
    """Bytes of host memory that are free."""
    gpus: int = 1
    """That share every step: what is said here of steps is one's share."""
    flops: float = FLOPS
    """Of the device's products, a second."""
    tiled: bool = True
    """Attention passes by tiles, where heads and rows allow it."""

    @classmethod
    def of(cls, recipe: Recipe, train: Sequence[Example] = (), gpus: int = 1, **device: Any) -> "Work":
        """The largest step that the rows can make; without rows, one of rows of full length."""
        samples = recipe.training.samples
        lengths = [len(row.input_ids) for row in train] or [recipe.data.max_length] * samples
        starts = range(0, len(lengths), samples)
        some = starts[:: -(-len(starts) // SOME)]
        steps = tuple(sorted(_share(lengths[i : i + samples], gpus) for i in some))
        lengths.sort(reverse=True)
        longest, alike, uniform = lengths[0], lengths[0] == lengths[:samples][-1], lengths[0] == lengths[-1]
        return cls(
            recipe=recipe, tokens=_share(lengths[:samples], gpus), longest=longest, steps=steps, alike=alike,
            uniform=uniform, gpus=gpus, **device,
        )  # fmt: skip

    @property
    def quantiles(self) -> tuple[int, ...]:
        """Of tokens in a step, evenly spaced; of the largest where no others are known."""
        every = -(-len(self.steps) // QUANTILES)
        return self.steps[every // 2 :: every] if self.steps else (self.tokens,)

    @property
    def samples(self) -> int:
        return -(-self.recipe.training.samples // self.gpus)


def _share(lengths: Sequence[int], gpus: int) -> int:
    """Tokens of the largest."""
    return max(sum(lengths[d] for d in part) for part in dealt(lengths, gpus))


class Lengths(NamedTuple):
    """Of rows that are replayed."""

    parts: int
    """In an octave."""
    captured: int
    """In all; the longest is also run once."""


class Pace(NamedTuple):
    seconds: float
    """Of an average step."""
    kept_seconds: float
    """What keeping one more layer's weights saves of them."""


@dataclass(frozen=True, slots=True)
class Replay:
    """CUDA graphs that are worth being captured, and what they take."""

    parts: int
    """Lengths in an octave."""
    fixed_bytes: float
    """Of gradients that stay, logits beside them and another stream's workspaces."""
    token_bytes: float
    """Of what goes in and out, a token."""
    pace: Pace


@dataclass(frozen=True, slots=True)
class Plan:
    """One setting, with what it is predicted to take."""

    rows: int
    """Rows that the largest step is cut into."""
    row_tokens: int
    """Tokens that a row may have; a step is cut into as few as that allows."""
    recompute: Recompute
    kept: int
    """The last layers whose weights are also kept dequantised."""
    optim: str
    peak_bytes: int
    token_bytes: float
    """What one more token a row adds to the peak."""
    seconds: float
    kept_bytes: float = 0.0
    """What keeping one more layer's weights adds; 0 where that is no choice."""
    kept_seconds: float = 0.0
    """What that saves."""
    held_bytes: float = 0.0
    """What holding the activations of one more layer takes, a token; 0 where that is no choice."""
    spare_bytes: float = 0.0
    """What of that is there, a token: held layers are gone when the others are computed again."""
    grows: bool = True
    """Longer rows may spare some steps one."""
    layers: int = 0
    held: int = 0
    """The last layers that keep their activations all the same."""
    replay: "Replay | None" = None
    replayed: int = 0
    """Tokens of the longest row that is replayed as a CUDA graph: all rows, or 0 for none."""

    def describe(self, capacity: int) -> str:
        some = f" in the last {self.kept}" if self.kept < self.layers else ""
        base = f", base kept dequantised{some}" if self.kept else ""
        rows = f"{self.rows} row{'s' * (self.rows > 1)} of up to {self.row_tokens:,} tokens a step"
        held = f" but of the last {self.held}" if self.held else ""
        graphs = ", as CUDA graphs" if self.replayed else ""
        line = f"{rows}, {WORDS[self.recompute]}{held}{base}{graphs}, {self.optim}"
        line += f"; predicted peak {self.peak_bytes / GIB:.1f} of {capacity / GIB:.1f} GiB"
        return line if self.fits(capacity) else f"{line}, which may not fit"

    @property
    def way(self) -> tuple[Recompute, int, str]:
        """What does not hang on rows."""
        return self.recompute, self.kept, self.optim

    def fits(self, capacity: int) -> bool:
        return self.peak_bytes <= capacity

    def grown(self, capacity: int, tokens: int) -> "Plan":
        """With rows as long as `capacity` bytes allow, up to `tokens`: steps smaller than the largest take fewer."""
        more = int((capacity - self.peak_bytes) / self.token_bytes) // ROUND * ROUND
        more = max(0, min(more, tokens - self.row_tokens)) * self.grows
        peak, replayed = self.peak_bytes + int(more * self.token_bytes), self.replayed and self.replayed + more
        return replace(self, row_tokens=self.row_tokens + more, peak_bytes=peak, replayed=replayed)

    def holding(self, capacity: int) -> "Plan":
        """With as many layers held as `capacity` bytes allow."""
        if not self.held_bytes:
            return self
        token = (capacity - self.peak_bytes) / self.row_tokens + self.spare_bytes
        held = min(self.layers, max(0, int(token / self.held_bytes)))
        more = max(0.0, held * self.held_bytes - self.spare_bytes)
        return replace(self, held=held, peak_bytes=self.peak_bytes + int(self.row_tokens * more))

    def keeping(self, capacity: int) -> "Plan":
        """With as many layers' weights kept as `capacity` bytes allow."""
        if not self.kept_bytes:
            return self
        more = min(self.layers - self.kept, max(0, int((capacity - self.peak_bytes) / self.kept_bytes)))
        peak, seconds = self.peak_bytes + int(more * self.kept_bytes), self.seconds - more * self.kept_seconds
        return replace(self, kept=self.kept + more, peak_bytes=peak, seconds=seconds)

    def replaying(self, capacity: int) -> "Plan":
        """With all rows as CUDA graphs, where they are worth it and `capacity` bytes allow it."""
        if not self.replay:
            return self
        token = self.token_bytes + self.replay.token_bytes
        peak = self.peak_bytes + int(self.replay.fixed_bytes + self.row_tokens * self.replay.token_bytes)
        pace = self.replay.pace._asdict()
        found = replace(self, token_bytes=token, peak_bytes=peak, replayed=self.row_tokens, **pace)
        return found if found.fits(capacity) else self


def predict(shape: Shape, work: Work, rows: int, recompute: Recompute, keep: bool, optim: str) -> Plan:
    """The plan of one setting; `keep`: the base is also kept dequantised."""
    tokens = _row_tokens(work, rows)
    rows = -(-work.tokens // tokens)
    fixed = base_bytes(shape, work, recompute, keep) + _adapter_bytes(shape, work, recompute, optim, rows)
    documents = work.samples if rows == 1 else max(1, tokens // work.longest)
    token = _token_bytes(shape, work, recompute, documents)
    weights = work.width * shape.linear_weights
    if not work.recipe.training.fp8:
        beside, behind = _room_bytes(shape, work, recompute)
        fixed, token = fixed + beside * keep, token + behind * (keep or work.tokens >= LONG)
        weights += int(beside + behind * tokens * (work.tokens < LONG))
    # who asks for recomputation gets it in every layer, as for the base
    free = work.on_gpu and work.recipe.training.gradient_checkpointing is not True
    holds = free and recompute in ("full", "offload")
    held = _layer_bytes(shape, work, "none") - _layer_bytes(shape, work, recompute) if holds else 0.0
    keeps = free and not keep and work.recipe.base.quantization == "nf4"

    def pace(graphs: Lengths | None) -> Pace:
        """By a layer, between all and none of them: never more than some of them save."""
        own = _seconds(shape, work, tokens, recompute, keep, optim, graphs)
        kept = _seconds(shape, work, tokens, recompute, True, optim, graphs) if keeps else own
        return Pace(own, (own - kept) / shape.layers)

    launched = pace(None)
    return Plan(
        rows, tokens, recompute, shape.layers * keep, optim, int(fixed + tokens * token), token,
        kept_bytes=keeps * weights / shape.layers, held_bytes=held,
        spare_bytes=_again_bytes(shape, work, recompute, documents),
        grows=not work.uniform, layers=shape.layers,
        replay=_replay(shape, work, recompute, tokens, documents, launched, pace), **launched._asdict(),
    )  # fmt: skip


def _row_tokens(work: Work, rows: int) -> int:
    """Of the longest, where the largest step is cut into so many rows."""
    cut = max(work.longest, -(-work.tokens // rows))
    if work.alike:  # and cut whole
        cut = min(work.tokens, work.longest * -(-work.samples // rows))
    return -(-cut // ROUND) * ROUND if work.on_gpu else cut


def base_bytes(shape: Shape, work: Work, recompute: Recompute, keep: bool) -> float:
    """Bytes of the frozen weights and of the buffer that they are dequantised into."""
    nf4 = work.recipe.base.quantization == "nf4" and work.on_gpu
    scales = (1 / 64 + 4 / 64 / 256) if work.recipe.base.double_quant else 4 / 64
    linear = shape.linear_weights * (0.5 + scales if nf4 else work.width)
    widest = 2 * shape.intermediate * shape.hidden
    fp8 = widest * (1 + work.width) if work.recipe.training.fp8 else 0  # codes and a transposed copy, on the way
    dequantised = work.width * shape.linear_weights if keep else work.width * widest + fp8
    away = shape.vocab * shape.hidden * (recompute == "offload" and not shape.tied)
    return linear + (shape.head_weights - away) * work.width + (dequantised + 2 * WORKSPACE if work.on_gpu else PROCESS)


def resources(device: torch.device, width: int) -> dict[str, Any]:
    """What `Work` asks of this machine, for a compute dtype of `width` bytes."""
    found: dict[str, Any] = {"width": width, "on_gpu": device.type == "cuda", "host": free_bytes(torch.device("cpu"))}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["flops"] = card.multi_processor_count * RATES.get((card.major, card.minor), RATE)
        found["tiled"] = serves(torch.empty(0, device=device))
    return found


def _replay(
    shape: Shape,
    work: Work,
    recompute: Recompute,
    tokens: int,
    documents: int,
    launched: Pace,
    pace: Callable[[Lengths], Pace],
) -> Replay | None:
    """CUDA graphs of as many lengths as take least, if the run's steps gain more by them than capturing takes."""
    if not (work.on_gpu and work.recipe.training.cuda_graphs and work.steps):
        return None
    best, parts = min((pace(_lengths(work.steps, tokens, parts)), parts) for parts in PARTS)
    if best.seconds >= launched.seconds:
        return None
    gradients, logits = 4 * _trained(shape, work), _logits(shape, work)
    counted = max(0, gradients - logits) if recompute == "offload" else gradients * (tokens < work.tokens)
    # a graph has room for as many documents as a step, which dq needs less for where the flash kernel adds it up
    token = _token_bytes(shape, work, recompute, work.samples) - _token_bytes(shape, work, recompute, documents)
    # in and out, and beside the pool a row that comes and the gradient of what went
    token += 2 * work.width * (2 * shape.hidden + shape.widths[0])
    return Replay(parts, gradients - counted + 2 * WORKSPACE, token, best)


@cache
def _lengths(steps: tuple[int, ...], row_tokens: int, parts: int) -> Lengths:
    return Lengths(parts, len({_rounded(step, row_tokens, parts)[1] for step in steps}) + 1)


def _logits(shape: Shape, work: Work) -> int:
    """Bytes of a chunk."""
    return work.width * CHUNK * shape.vocab


def _trained(shape: Shape, work: Work) -> int:
    return shape.lora_weights(work.recipe.lora.r, work.recipe.lora.target_modules)


def _adapter_bytes(shape: Shape, work: Work, recompute: Recompute, optim: str, rows: int) -> float:
    """Bytes of what is trained and how, and of a chunk of logits."""
    trained, logits = _trained(shape, work), _logits(shape, work)
    copies = work.width if work.on_gpu else 0
    # at the end of such a step, where its peak is, all gradients are there, those to be shared a second time, and no
    # logits; of others a further row begins with the gradients of those before it
    gathered = 4 * trained * (1 + (work.gpus > 1))
    late = max(gathered, logits) if recompute == "offload" else logits + 4 * trained * (rows > 1)
    return trained * (4 + STATE[optim] + copies) + late


def _room_bytes(shape: Shape, work: Work, recompute: Recompute) -> tuple[float, float]:
    """Bytes of corners beside the kept weights, where adapters' copies lie, and behind what is kept of a token's q, k,
    v, attention, gate and up (see `model.group`)."""
    lora = work.recipe.lora
    kept = {"none": ("q_proj", "o_proj", "gate_proj"), "selective": ("q_proj", "o_proj")}.get(recompute, ())
    targets = set(shape.targets(lora.target_modules))
    copied = lora.lora_dropout > 0 or recompute == "selective"  # h; else it stays behind attention, counted elsewhere
    corners, behind = 0, 0
    for group in READERS:
        adapted = targets & set(group)
        R, outputs = lora.r * len(adapted), sum(shape.modules[name][0] for name in group)
        corners += R * (outputs + R) - lora.r * sum(shape.modules[name][0] for name in adapted)
        behind += R * (group[0] in kept and (copied if group == ("o_proj",) else lora.lora_dropout == 0))
    return work.width * shape.layers * corners, work.width * shape.layers * behind


def _token_bytes(shape: Shape, work: Work, recompute: Recompute, documents: int) -> float:
    kept = shape.layers * _layer_bytes(shape, work, recompute)
    ahead = work.width * shape.hidden * (recompute == "offload")  # the input of the next half, on the device
    _, at_mlp = _work_bytes(shape, work, recompute, documents)
    return kept + ahead + at_mlp + _again_bytes(shape, work, recompute, documents)


def _again_bytes(shape: Shape, work: Work, recompute: Recompute, documents: int) -> float:
    """Bytes of a token that a layer computed again, or a half, has at work and one that keeps everything has not."""
    if recompute == "full":
        return _layer_bytes(shape, work, "none")
    if recompute != "offload":
        return 0.0
    attention, mlp = _half_bytes(shape, work)
    at_attention, at_mlp = _work_bytes(shape, work, recompute, documents)
    return max(attention + at_attention - at_mlp, mlp)


def host_bytes(shape: Shape, work: Work, row_tokens: int) -> int:
    """Pinned memory of `offload`: the inputs of all halves but the last, and the embedding. torch gives out powers of
    two."""
    each = next_power_of_2(row_tokens * shape.hidden * work.width)
    embedding = 0 if shape.tied else next_power_of_2(shape.vocab * shape.hidden * work.width)
    return (2 * shape.layers - 1) * each + embedding


def _layer_bytes(shape: Shape, work: Work, recompute: Recompute) -> float:
    """Bytes that a layer keeps of a token for its backward pass."""
    D, F = shape.hidden, shape.intermediate
    if recompute in ("full", "offload"):
        return work.width * D if recompute == "full" else 0
    if not work.on_gpu:  # Transformers' layers keep every step between
        return work.width * (_narrow(shape, work) + 6 * D + 4 * F + shape.heads * min(work.longest, 768) / 2)
    if recompute == "selective":
        return work.width * _narrow(shape, work) + 4 * shape.heads + 8
    return sum(_half_bytes(shape, work))


def _narrow(shape: Shape, work: Work) -> int:
    """Elements of the sums, of q, k, v, of attention's output and of the products with LoRA's A."""
    lora, (_, q, kv) = work.recipe.lora, shape.widths
    return 2 * shape.hidden + 2 * q + kv + lora.r * len(shape.targets(lora.target_modules))


def _half_bytes(shape: Shape, work: Work) -> tuple[float, float]:
    """Bytes that attention and MLP keep of a token, each with its norm, for their backward passes."""
    D, F, (_, q, kv), lora = shape.hidden, shape.intermediate, shape.widths, work.recipe.lora
    targets = set(shape.targets(lora.target_modules))
    first = targets & {"q_proj", "k_proj", "v_proj", "o_proj"}
    attention = D + 2 * q + kv + lora.r * len(first) + D * bool(first - {"o_proj"})
    attention += q * (lora.lora_dropout > 0 and "o_proj" in first)
    mlp = D + 2 * F + lora.r * len(targets - first) + D * bool(targets & {"gate_proj", "up_proj"})
    return work.width * attention + 4 * shape.heads + 4, work.width * mlp + 4


def _work_bytes(shape: Shape, work: Work, recompute: Recompute, documents: int) -> tuple[float, float]:
    """Bytes a token that the backward passes of attention and MLP have at work in a row of `documents`. Attention:
    gradients of its output, of the sum, of q, k and v; unless by tiles, for grouped heads k's and v's of every query
    head and dq in float32, once for each share of a document that the flash kernel adds up in order. MLP: that of
    SwiGLU's output, once more before dropout, that of the sum, and what is made again."""
    lora, (C, q, kv) = work.recipe.lora, shape.widths
    twice = lora.lora_dropout > 0 and "down_proj" in shape.targets(lora.target_modules)
    F = shape.intermediate * (1 + twice + 2 * (recompute == "selective"))
    ordered = 4 * q * -(-MULTIPROCESSORS // (documents * shape.heads))
    grouped = 2 * q * (shape.heads != shape.kv_heads)
    tiled = work.tiled and C in HEAD_SIZES and not (work.alike and dense_length(work.longest))
    apart = 4 * shape.heads if tiled else work.width * grouped + ordered
    attention = work.width * (2 * q + kv + 2 * shape.hidden) + apart
    return attention, work.width * (F + 2 * shape.hidden)


def _seconds(
    shape: Shape,
    work: Work,
    row_tokens: int,
    recompute: Recompute,
    keep: bool,
    optim: str,
    graphs: Lengths | None,
) -> float:
    """Of an average step, captures shared out over the run's; the device's are of products with the frozen weights and
    of what lies between them."""
    again = _again(shape, recompute)
    products = 2 * shape.linear_weights * (2 + again) / work.flops
    each = products / (1.7 if work.recipe.training.fp8 else 1) + products * NARROW / shape.hidden
    each *= 1.02 if recompute == "offload" else 1
    bytes_a_weight = 6 if work.recipe.training.fp8 else 2.5
    dequantised = 0.0 if keep else (2 + again) * shape.linear_weights * bytes_a_weight / BANDWIDTH
    ways = shape.layers * LAUNCHES[recompute] * (1 if keep else DEQUANTISING)
    targets = set(shape.targets(work.recipe.lora.target_modules))
    adapted = sum(not targets.isdisjoint(group) for group in READERS)
    host, gap, parts = ways * (LAUNCH + ADAPTED * adapted), ROW, None
    seconds = OPTIM_SECONDS.get(optim, 0.0) * 2 * shape.layers * len(targets)
    if graphs:
        seconds += graphs.captured * host / work.recipe.training.max_steps
        host, gap, parts = 0.0, max(ROW, shape.layers * KERNELS), graphs.parts

    def step(tokens: int) -> float:
        rows, length = _rounded(tokens, row_tokens, parts)
        return rows * max(length * each + dequantised + gap, host)

    return seconds + fmean(map(step, work.quantiles))


def _rounded(tokens: int, row_tokens: int, parts: int | None = None) -> tuple[int, int]:
    """(rows, tokens of each) that a step is cut into, where they are replayed with what they are rounded up by."""
    rows = -(-tokens // row_tokens)
    length = -(-tokens // rows)
    return rows, min(rounded(length, parts), row_tokens) if parts else length


def _again(shape: Shape, recompute: Recompute) -> float:
    """The share of the forward products that the backward pass repeats."""
    share = {name: n * d * shape.layers / shape.linear_weights for name, (n, d) in shape.modules.items()}
    return {
        "none": 0.0,
        "selective": 2 * share["up_proj"],
        "full": 1 - share["down_proj"],
        "offload": 1 - share["down_proj"] - share["o_proj"],
    }[recompute]


def plans(shape: Shape, work: Work) -> list[Plan]:
    """Every setting that the recipe allows, fastest first."""
    training = work.recipe.training
    if not work.on_gpu:
        recompute: Recompute = "full" if training.gradient_checkpointing is True else "none"
        return [predict(shape, work, 1, recompute, False, _optims(work)[0])]
    ways: dict[Any, tuple[Recompute, ...]] = {True: ("full", "offload"), False: ("none",)}
    allowed = ways.get(training.gradient_checkpointing, ("none", "selective", "full", "offload"))
    # who asks for recomputation wants the memory: the base is then not kept
    keeps = (True, False) if "none" in allowed and work.recipe.base.quantization == "nf4" else (False,)
    asked = [rows for rows in range(1, work.samples + 1) if rows <= FEW or work.samples % rows == 0]
    cuts = {_row_tokens(work, rows): rows for rows in asked}.values()  # some of them alike
    found = [
        predict(shape, work, rows, recompute, keep, optim)
        for rows in cuts for recompute in allowed for keep in keeps for optim in _optims(work)
    ]  # fmt: skip
    # wherever `offload` is allowed `full` is too, so something stays
    found = [
        p
        for p in found
        if p.recompute != "offload" or host_bytes(shape, work, p.row_tokens) <= work.host / 2 / work.gpus
    ]
    return sorted(found, key=_rank)


def _optims(work: Work) -> tuple[str, ...]:
    asked = work.recipe.training.optim
    if asked != "auto":
        return (asked,)
    return ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit") if work.on_gpu else ("adamw_torch_fused",)


def choose(found: Sequence[Plan], capacity: int) -> Plan:
    """The fastest plan that fits `capacity` bytes, with CUDA graphs if they do too, its rows as long as they may be,
    then its held layers as many, whose seconds are not counted, and then those whose weights are kept; where none does,
    the smallest."""
    upwards = sorted(found, key=lambda plan: (plan.row_tokens, -plan.seconds))  # of equals the fastest last
    longest = {plan.way: plan for plan in upwards}
    fitting = [_filled(plan, longest[plan.way], capacity) for plan in found if plan.fits(capacity)]
    return min(fitting, key=_rank) if fitting else min(found, key=lambda plan: plan.peak_bytes)


def _filled(plan: Plan, longest: Plan, capacity: int) -> Plan:
    """`longest`: the plan that goes the same way in the fewest rows."""
    whole = longest.fits(capacity)
    grown = plan.replaying(capacity).grown(capacity, longest.row_tokens if whole else longest.row_tokens - ROUND)
    if whole and grown.row_tokens == longest.row_tokens:  # uncut, it decides as well what is worth being captured
        grown = longest.replaying(capacity)
    return grown.holding(capacity).keeping(capacity)


def _rank(plan: Plan) -> tuple[float, int]:
    return plan.seconds, plan.peak_bytes


def fall_back(found: Sequence[Plan], plan: Plan) -> Plan | None:
    """What to do out of memory: of the plans with the same optimizer the one to choose if there was a tenth less, or
    the smallest if it takes less at all."""
    smaller = choose([p for p in found if p.optim == plan.optim], int(0.9 * plan.peak_bytes))
    return smaller if smaller.peak_bytes < plan.peak_bytes else None


def capacity_of(recipe: Recipe, free: int) -> int:
    """Bytes that a plan may take of `free` ones: less what the allocator holds beyond what it has given out, and no
    more than the recipe allows."""
    return int(min(free / SLACK, max(0, free - ROOM), (recipe.training.max_memory or math.inf) * GIB))


def table(capacity: int, *, width: int, on_gpu: bool) -> list[tuple[Shape, int, bool]]:
    """(shape, peak bytes, fits) of each known shape at its leanest: r 64 on all linear modules, 2,048 tokens a step."""
    recipe = Recipe()
    lora = recipe.lora.model_copy(update={"target_modules": "all-linear", "lora_dropout": 0.0})
    training = recipe.training.model_copy(update={"gradient_checkpointing": True, "gradient_accumulation_steps": 1})
    work = Work.of(recipe.model_copy(update={"lora": lora, "training": training}), width=width, on_gpu=on_gpu)
    smallest = [min(plans(shape, work), key=lambda plan: plan.peak_bytes) for shape in SHAPES]
    return [(shape, plan.peak_bytes, plan.fits(capacity)) for shape, plan in zip(SHAPES, smallest, strict=True)]
