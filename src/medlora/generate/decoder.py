"""The forward pass of a LLaMA-family model over rows of any lengths, side by side without padding.

A `Pass` says where each row's new tokens stand, which keys they see and which adapter they take; prompts, drafts and
single tokens differ only in how many are new. Per layer:

    norm -> q, k, v -> rope -> keys and values into the cache -> attention -> o (+ x) -> norm -> gate, up -> down (+ x)

Shapes: T tokens of a pass, D hidden, H query heads, K key heads, C head size, V vocabulary.
"""

# torch leaves Tensor.split untyped
# mypy: allow-untyped-calls
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlora.generate.cache import BLOCK, Cache
from medlora.generate.weights import Choice, Nf4, Norm, Projection, Unknown, Weight, half, weight_of
from medlora.kernels.attention import Documents, Tails, attention, flash_takes, tail_attention
from medlora.kernels.rms_norm import rms_norm
from medlora.kernels.rope import rope_
from medlora.model.base import FAMILIES
from medlora.model.memory import free_bytes

MOVING_ROPE = ("dynamic", "longrope")  # tables that change with the length
PACKERS = 4  # each holds a module's weights in float32 three times


class Span(NamedTuple):
    """Part of one conversation: `new` tokens after `past` ones."""

    blocks: Sequence[int]
    past: int
    new: int

    @property
    def where(self) -> list[int]:
        """Places of the new tokens in a pool seen as [blocks * 64, ...]."""
        return [self.blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(self.past, self.past + self.new)]


class Rows(Protocol):
    """What a pass is about: where its tokens stand and what they see."""

    choice: Choice

    def attend(self, qkv: Tensor, cache: Cache, layer: int) -> Tensor:
        """[T, (H + 2 K) C] -> [T, H C], keys and values into the cache; `qkv` may be overwritten."""


class Layer(NamedTuple):
    input_norm: Norm
    qkv: Projection
    o: Projection
    post_norm: Norm
    gate_up: Projection
    down: Projection


def _together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What they return, done on several cores: FBGEMM packs a weight on one."""

    def done(job: Callable[[], Any]) -> Any:
        with torch.no_grad():  # a thread's own matter
            return job()

    with ThreadPoolExecutor(min(PACKERS, torch.get_num_threads())) as pool:
        return list(pool.map(done, jobs))


class Decoder:
    """The weights of a loaded model and every adapter on it.

    Args:
        model: a causal LM of the LLaMA family on one device, or a `PeftModel` of one.

    Raises:
        Unknown: something that this pass does not compute.
    """

    def __init__(self, model: Any) -> None:
        self.adapters = list(getattr(model, "peft_config", {}))
        causal = model.get_base_model() if self.adapters else model
        _check(causal)
        self.model, config = causal.model, causal.config
        self.dtype: torch.dtype = self.model.embed_tokens.weight.dtype
        self.device: torch.device = self.model.embed_tokens.weight.device
        attn = self.model.layers[0].self_attn
        self.heads: tuple[int, int, int] = (config.num_attention_heads, config.num_key_value_heads, attn.head_dim)
        self.scale: float = attn.scaling
        self.context: int = config.max_position_embeddings
        with torch.inference_mode(False), torch.no_grad():
            size = 2 * sum(parameter.numel() for parameter in causal.parameters())
            self.for_steps = (
                self.device.type == "cpu" and self.dtype != torch.float32 and size < free_bytes(self.device) / 8
            )
            jobs: list[Callable[[], Any]] = [partial(weight_of, [causal.lm_head], self.dtype)]
            jobs += [partial(self._layer, layer) for layer in self.model.layers]
            made = _together(jobs) if self.device.type == "cpu" else [job() for job in jobs]
            self.head: Weight = made[0]
            self.layers: list[Layer] = made[1:]
            self.step_head = half([causal.lm_head], causal.lm_head.bias) if self.for_steps else None
        self.projections = [p for layer in self.layers for p in layer if isinstance(p, Projection)]
        alike: dict[str, Tensor] = {}
        for p in self.projections:  # layers that scale alike look up the same table
            p.factors = alike.setdefault(str(p.factors.tolist()), p.factors)
        self._seen = -1

    def _layer(self, layer: Any) -> Layer:
        def project(*modules: Any, gated: bool = False) -> Projection:
            return Projection(modules, self.adapters, self.dtype, gated=gated, for_steps=self.for_steps)

        attn, mlp = layer.self_attn, layer.mlp
        return Layer(
            _norm(layer.input_layernorm),
            project(attn.q_proj, attn.k_proj, attn.v_proj),
            project(attn.o_proj),
            _norm(layer.post_attention_layernorm),
            project(mlp.gate_proj, mlp.up_proj, gated=True),
            project(mlp.down_proj),
        )

    def refresh(self) -> bool:
        """Take over adapters that were trained on since; whether there were any."""
        now = sum(master._version for p in self.projections for _, master in p.copies)
        if now == self._seen:
            return False
        self._seen = now
        for projection in self.projections:
            projection.refresh()
        return True

    def __call__(self, tokens: Tensor, row: "Rows", cache: Cache) -> Tensor:
        """Hidden states [T, D] after the final norm of tokens [T] int64; their keys and values go to the cache."""
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        choice = row.choice
        choice.found.clear()
        for index, layer in enumerate(self.layers):
            heads = row.attend(layer.qkv(x, choice, norm=layer.input_norm), cache, index)
            x = layer.o(heads, choice, residual=x)
            x = layer.down(layer.gate_up(x, choice, norm=layer.post_norm), choice, residual=x)
        return rms_norm(x, *_norm(self.model.norm))

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] float32 of what a pass gives."""
        if self.step_head:
            return self.step_head(hidden.float())
        return self.head(hidden).float()

    def keep(self, free: int) -> None:
        """Dequantise NF4 weights for good, if that takes no more than half of `free` bytes: for many rows a step."""
        left = [p for p in self.projections if isinstance(p.weight, Nf4) and p.weight.kept is None]
        weights = sum(w.codes.N * w.codes.D for w in (p.weight for p in left) if isinstance(w, Nf4))
        size = (weights + sum(p.a.numel() for p in left)) * self.dtype.itemsize
        if size <= free // 2:
            for projection in left:
                projection.keep()

    @contextmanager
    def in_pieces(self, on: bool) -> Iterator[None]:
        """Passes that hold less at once, at the price of smaller products."""
        weights = [p.weight for p in self.projections if on and isinstance(p.weight, Nf4)]
        for weight in weights:
            weight.by_pieces = True
        try:
            yield
        finally:
            for weight in weights:
                weight.by_pieces = False

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """`rotary` of every position."""
        return self.rotary(torch.arange(self.context, device=self.device))

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, C] at positions [T]."""
        like = self.model.embed_tokens.weight[:1]
        cos, sin = self.model.rotary_emb(like, positions[None])
        return cos[0], sin[0]


class Pass:
    """Rows side by side, each attending to its own conversation."""

    def __init__(self, decoder: Decoder, spans: Sequence[Span], slots: Sequence[int], *, step: bool = False) -> None:
        """`slots` holds the adapter of each span, -1 for none; `step` as `Choice` takes it."""
        self.heads, self.scale, self.spans = decoder.heads, decoder.scale, spans
        device = decoder.device
        where = [place for span in spans for place in span.where]
        positions = [i for span in spans for i in range(span.past, span.past + span.new)]
        self.where = torch.tensor(where).to(device)
        self.cos, self.sin = decoder.rotary(torch.tensor(positions).to(device))
        half = self.sin.shape[1] // 2
        self.signed = torch.cat([-self.sin[:, :half], self.sin[:, half:]], 1)
        each = [slot for span, slot in zip(spans, slots, strict=True) for _ in range(span.new)]
        self.choice = Choice(each, torch.tensor(each, dtype=torch.int32).to(device), step=step)
        self.borders = [0]
        for span in spans:
            self.borders.append(self.borders[-1] + span.new)
        flash = flash_takes(self.cos, self.heads[2])
        fresh = flash and not any(span.past for span in spans)
        self.documents = Documents.of(self.cos, self.sin, self.borders).tiled() if fresh else None
        """Where whole prompts can pass through one attention launch."""
        new, whole = [span.new for span in spans], [span.past + span.new for span in spans]
        self.tails = Tails.of(new, whole, device) if flash and not fresh else None
        """Where conversations that go on can."""

    def attend(self, qkv: Tensor, cache: Cache, layer: int) -> Tensor:
        H, K, C = self.heads
        if self.documents:
            out = attention(qkv, self.documents, self.heads, self.scale)  # rotates q and k in place
            _, k, v = qkv.view(-1, H + 2 * K, C).split((H, K, K), 1)
            self._append(cache, layer, k, v)
            return out
        q, k, v = self._rotated(qkv.view(-1, H + 2 * K, C))
        self._append(cache, layer, k, v)
        seen = (cache.rows(layer, span.blocks, span.past + span.new) for span in self.spans)
        if self.tails:
            keys, values = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*seen, strict=True))
            return tail_attention(q, keys, values, self.tails, self.scale).flatten(1)
        parts = [
            attend(q[start:stop], *each, self.scale)
            for (start, stop), each in zip(pairwise(self.borders), seen, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(len(qkv), -1)

    def _append(self, cache: Cache, layer: int, k: Tensor, v: Tensor) -> None:
        cache.k[layer].flatten(0, 1).index_copy_(0, self.where, k)
        cache.v[layer].flatten(0, 1).index_copy_(0, self.where, v)

    def _rotated(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        H, K, C = self.heads
        q, k, v = qkv.split((H, K, K), 1)
        if qkv.is_cuda:
            rope_(q, k, self.cos, self.sin)
            return q, k, v
        turned = qkv[:, : H + K]
        turned = torch.addcmul(turned * self.cos[:, None], turned.roll(C // 2, -1), self.signed[:, None])
        q, k = turned.split((H, K), 1)
        return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The last n of T tokens see themselves and what stands before: q [n, H, C], k, v [T, K, C] -> [n, H, C]."""
    (n, H, C), (T, K, _) = q.shape, k.shape
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if n == 1:  # the queries of a group as rows of one product
        return F.scaled_dot_product_attention(q.view(1, K, H // K, C), k, v, scale=scale).view(1, H, C)
    mask = None if n == T else torch.ones(n, T, dtype=torch.bool, device=q.device).tril_(T - n)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=n == T, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _norm(module: Any) -> Norm:
    return module.weight, module.variance_epsilon


def _check(causal: Any) -> None:
    config = causal.config
    if config.model_type not in FAMILIES:
        raise Unknown(f"{config.model_type} is not of the LLaMA family ({', '.join(FAMILIES)})")
    if type(causal.model.embed_tokens) is not nn.Embedding or type(causal.lm_head) is not nn.Linear:
        raise Unknown("its embedding or output head is trained or adapted")
    if config.hidden_act != "silu":
        raise Unknown(f"its activation is {config.hidden_act}, not silu")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise Unknown(f"its attention window ({window}) is shorter than its context")
    if causal.model.rotary_emb.rope_type in MOVING_ROPE:
        raise Unknown(f"its rotary embedding ({causal.model.rotary_emb.rope_type}) changes with the length")
    if len({parameter.device for parameter in causal.parameters()}) > 1:
        raise Unknown("it is spread over several devices")
