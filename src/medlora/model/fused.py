"""The decoder of a LLaMA-family model over one packed row, written for a GPU's habits.

A training step of Transformers' and PEFT's layers moves each activation through memory many times, in many
small kernels. Here a layer is five steps, each an autograd function that
keeps the least its backward needs:

    norm (+ residual) -> q, k, v -> rope + attention -> o -> norm + residual -> gate, up -> SwiGLU + down

Linear modules that read one input form a `Group`: one product forward and one backward.

What a layer keeps for its backward pass is a choice (`Recompute`), and none of them changes a number:

    none       everything but SwiGLU's output: 4 D + q, k, v + attention's output + gate, up
    selective  the sums, q, k, v and attention's output; norms and the gate-up product are computed again
    full       its input alone; all but the last product is computed again (Chen et al. 2016, arXiv:1604.06174)
    offload    the same, its input in pinned host memory, fetched a layer ahead; so is the embedding, unless tied

Where a model holds something this file does not know, `Fused` raises `Unfusable` with the reason and the
caller runs Transformers' layers instead.

Shapes: T tokens of the row, D inputs, H query heads, K key heads, C head size.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from medlora.kernels.attention import Documents, attention
from medlora.kernels.rms_norm import add_rms_norm, rms_norm
from medlora.model.group import Group, Pass, Unfusable
from medlora.model.offload import Offload

# A row grows to a multiple of this, by a document that nothing reads: shapes that recur are looked up once by
# cuBLAS and the allocator, and a product's tiles are as tall anyway.
ROUND = 128
FP8_CAPABILITY = (8, 9)
Recompute = Literal["none", "selective", "full", "offload"]


class Row(NamedTuple):
    """What all layers share while a packed row passes."""

    documents: Documents
    seed: int
    dropping: bool


class Fused:
    """A stand-in for the forward of `LlamaModel` or `MistralModel` while packed rows pass.

    Args:
        causal: the causal LM; its linear modules: `nn.Linear`, bitsandbytes' NF4, or PEFT LoRA over either.
        keep: hold the weights dequantised (two bytes each, one saved launch in every pass).
        recompute: what a layer keeps.
        fp8: products of the frozen weights in row-wise FP8.

    Raises:
        Unfusable: something in the model that this path does not compute.
    """

    def __init__(self, causal: Any, keep: bool = False, recompute: Recompute = "none", fp8: bool = False) -> None:
        self.model, config, self.keep, self.fp8 = causal.model, causal.config, keep, fp8
        self.head: Tensor = causal.lm_head.weight
        self.recompute: Recompute = recompute
        self.dtype: torch.dtype = self.model.embed_tokens.weight.dtype
        if type(self.model.embed_tokens) is not nn.Embedding:
            raise Unfusable("the embedding is trained or adapted")
        if config.hidden_act != "silu":
            raise Unfusable(f"its activation is {config.hidden_act}, not silu")
        if getattr(config, "attention_dropout", 0.0):
            raise Unfusable("it drops attention probabilities")
        devices = {parameter.device for parameter in causal.parameters()}
        if len(devices) > 1:
            raise Unfusable("it is spread over several devices")
        (self.device,) = devices
        if fp8 and self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) < FP8_CAPABILITY:
            raise Unfusable("this GPU's compute capability is below 8.9")
        layer = self.model.layers[0]
        head_size = layer.self_attn.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, head_size)
        self.offload = Offload()
        self.again = False
        self._plan()

    def _plan(self) -> None:
        self.layers = [module for module in self.model.modules() if hasattr(module, "lora_A")]
        self.state = _adapter_state(self.layers)
        self.groups = [_layer_groups(layer, self.dtype, self.fp8) for layer in self.model.layers]
        every = [group for groups in self.groups for group in groups]
        self.masters = [master for group in every for master in group.masters]
        self.copies = [copy for group in every for copy in group.copies]
        self._hold()

    def _hold(self) -> None:
        every = [group for groups in self.groups for group in groups]
        needed = max(group.shape[0] * group.shape[1] for group in every)
        self.scratch = torch.empty(needed, dtype=self.dtype, device=self.device)
        for group in every:
            if self.keep:
                group.keep(self.scratch)
            else:
                group.release()
        if self.keep:
            self.scratch = self.scratch[:0].clone()
        self._place_embedding()

    def _place_embedding(self, *, home: bool = False) -> None:
        table = self.model.embed_tokens.weight
        away = self.recompute == "offload" and table is not self.head and not home
        table.data = table.data.to("cpu" if away else self.device)

    def change(self, keep: bool, recompute: Recompute) -> None:
        """Go on with other settings from the next row on."""
        self.recompute, self.keep = recompute, keep
        self._hold()

    def close(self) -> None:
        """Put back what was moved."""
        self._place_embedding(home=True)

    def __call__(self, *, input_ids: Tensor, position_ids: Tensor, borders: list[int], **_: Any) -> SimpleNamespace:
        """`last_hidden_state` [1, T, D] after the final norm; input_ids and position_ids [1, T]."""
        if self.state != _adapter_state(self.layers):  # adapters switched on or off since
            self._plan()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.masters)
        T = input_ids.shape[1]
        more = -T % ROUND
        x = self._embed(F.pad(input_ids[0], (0, more)))
        row = self._row(x, F.pad(position_ids, (0, more)), [*borders, T + more] if more else borders)
        x, residual = self._layers(x, row)
        return SimpleNamespace(last_hidden_state=_norm(x, residual, self.model.norm)[0][None, :T])

    def _embed(self, ids: Tensor) -> Tensor:
        table = self.model.embed_tokens.weight
        if table.device == self.device:
            return F.embedding(ids, table)
        x = torch.empty(len(ids), table.shape[1], dtype=table.dtype, pin_memory=True)
        torch.index_select(table, 0, ids.cpu(), out=x)
        return x.to(self.device, non_blocking=True)

    def _row(self, x: Tensor, position_ids: Tensor, borders: list[int]) -> Row:
        cos, sin = self.model.rotary_emb(x[None], position_ids)
        # above 2^32, so that the kernel is compiled for one width of seeds
        seed = int(torch.randint(2**32, 2**62, ()))
        return Row(Documents.of(cos[0], sin[0], borders), seed, self.model.training)

    def _layers(self, x: Tensor, row: Row) -> tuple[Tensor, Tensor | None]:
        """(what the last layer adds, the residual it adds to); without the second, their sum."""
        if not torch.is_grad_enabled() or self.recompute in ("none", "selective"):
            residual: Tensor | None = None
            layer = self._layer if self.recompute == "none" else self._selective_layer
            for index in range(len(self.groups)):
                x, residual = layer(x, residual, row, index)
            return x, residual
        hooks: AbstractContextManager[Any] = nullcontext()
        if self.recompute == "offload":
            self.offload.start()
            hooks = saved_tensors_hooks(self.offload.pack, self.offload.unpack)
        with hooks:
            for index in range(len(self.groups)):
                x = checkpoint(
                    self._whole_layer, x, row, index,
                    use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts,
                )  # fmt: skip
        return x, None

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._recomputing()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False

    def _whole_layer(self, x: Tensor, row: Row, index: int) -> Tensor:
        """A recomputed layer keeps its input alone, so that is the sum."""
        added, residual = self._layer(x, None, row, index)
        return added + residual

    def _pass(self, row: Row, index: int, group: Group, lean: bool = False, discard: bool = False) -> Pass:
        seed = row.seed + 4 * index + self.groups[index].index(group)
        return Pass(self.scratch, group.dropout if row.dropping else 0.0, seed, lean, discard)

    def _layer(self, x: Tensor, residual: Tensor | None, row: Row, index: int) -> tuple[Tensor, Tensor]:
        """(what the layer adds, the residual it adds to); x likewise belongs onto `residual`."""
        layer = self.model.layers[index]
        qkv, o, gate_up, down = self.groups[index]
        y, h = _norm(x, residual, layer.input_layernorm)
        heads = attention(qkv(y, self._pass(row, index, qkv)), row.documents, self.heads, layer.self_attn.scaling)
        y, h = _norm(o(heads, self._pass(row, index, o)), h, layer.post_attention_layernorm)
        hidden = gate_up(y, self._pass(row, index, gate_up))
        return down(hidden, self._pass(row, index, down, discard=self.again)), h

    def _selective_layer(self, x: Tensor, residual: Tensor | None, row: Row, index: int) -> tuple[Tensor, Tensor]:
        """As `_layer`; norms and the gate-up product are made again when the backward asks for them."""
        layer = self.model.layers[index]
        qkv, o, gate_up, down = self.groups[index]
        cheap = _Cheap()
        with saved_tensors_hooks(cheap.pack, cheap.unpack):
            y, first = _norm(x, residual, layer.input_layernorm)
            cheap.add(y, lambda: _norm(first.detach(), None, layer.input_layernorm)[0])
            heads = attention(
                qkv(y, self._pass(row, index, qkv, lean=True)), row.documents, self.heads, layer.self_attn.scaling
            )
            y, h = _norm(o(heads, self._pass(row, index, o, lean=True)), first, layer.post_attention_layernorm)

            def normed() -> Tensor:
                return _norm(h.detach(), None, layer.post_attention_layernorm)[0]

            how = self._pass(row, index, gate_up, lean=True)
            cheap.add(y, normed)
            hidden = gate_up(y, how)
            cheap.add(hidden, lambda: gate_up.forward(normed(), how)[0])
            return down(hidden, self._pass(row, index, down)), h


class _Cheap:
    """Saves, in place of tensors that are soon made again, how to make them."""

    def __init__(self) -> None:
        self.makers: dict[tuple[int, torch.Size], Callable[[], Tensor]] = {}

    def add(self, x: Tensor, make: Callable[[], Tensor]) -> None:
        self.makers[x.data_ptr(), x.shape] = make

    def pack(self, x: Tensor) -> Tensor | Callable[[], Tensor]:
        return self.makers.get((x.data_ptr(), x.shape), x)

    @torch.no_grad()
    def unpack(self, kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()


def _norm(x: Tensor, residual: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum)."""
    if residual is None:
        return rms_norm(x, norm.weight, norm.variance_epsilon), x
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)


def _layer_groups(layer: Any, dtype: torch.dtype, fp8: bool) -> tuple[Group, Group, Group, Group]:
    attn, mlp = layer.self_attn, layer.mlp
    return (
        Group([attn.q_proj, attn.k_proj, attn.v_proj], dtype, fp8=fp8),
        Group([attn.o_proj], dtype, fp8=fp8),
        Group([mlp.gate_proj, mlp.up_proj], dtype, fp8=fp8),
        Group([mlp.down_proj], dtype, gated=True, fp8=fp8),
    )


def _adapter_state(layers: list[Any]) -> list[tuple[Any, ...]]:
    """What decides which adapters take part; cheap enough to ask before every row."""
    return [(m.disable_adapters, m.merged, *m.active_adapters) for m in layers]
