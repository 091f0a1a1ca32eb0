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
    offload    the inputs of its two halves, attention and MLP, in pinned host memory, fetched a half ahead; all but
               the halves' last products is computed again. The embedding lies there too, unless tied

With the last two, the `held` last layers of the stack keep everything, as far as memory allows. Rows too short to keep
the device busy are replayed as CUDA graphs (`model.graphs`).

Where a model holds something this file does not know, `Fused` raises `Unfusable` with the reason and the
caller runs Transformers' layers instead.

Shapes: T tokens of the row, D inputs, H query heads, K key heads, C head size.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, compress
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from medlora.kernels.attention import Documents, attention, in_one_launch
from medlora.kernels.copies import Copies
from medlora.kernels.dispatch import upload
from medlora.kernels.embedding import gather_rows
from medlora.kernels.product import LONG
from medlora.kernels.rms_norm import add_rms_norm
from medlora.model.graphs import ROUND, Graphs, Rows, Uncapturable
from medlora.model.group import Group, Pass
from medlora.model.modules import Unfusable
from medlora.model.offload import Offload

FP8_CAPABILITY = (8, 9)
Recompute = Literal["none", "selective", "full", "offload"]


class Row(NamedTuple):
    """What all layers share while a packed row passes."""

    documents: Documents
    seed: Tensor
    """int64 [1] on the device."""
    dropping: bool
    offload: Offload


class Fused:
    """A stand-in for the forward of `LlamaModel`, `MistralModel` or `Qwen2Model` while packed rows pass.

    Args:
        causal: the causal LM; its linear modules: `nn.Linear`, bitsandbytes' NF4, or PEFT LoRA over either.
        kept: how many of the last layers hold their weights dequantised (two bytes each, one launch less a pass).
        recompute: what a layer keeps.
        held: how many of the last layers keep everything, where the others keep no more than inputs.
        fp8: products of the frozen weights in row-wise FP8.
        replayed: rows that are replayed as CUDA graphs.

    Raises:
        Unfusable: something in the model that this path does not compute.
    """

    def __init__(
        self,
        causal: Any,
        kept: int = 0,
        recompute: Recompute = "none",
        fp8: bool = False,
        held: int = 0,
        replayed: Rows | None = None,
    ) -> None:
        self.model, config, self.kept, self.fp8, self.held = causal.model, causal.config, kept, fp8, held
        self.replayed = replayed
        self.replays = True
        """Whether it is time for graphs: what they hold stays taken."""
        self.head: Tensor = causal.lm_head.weight
        self.recompute: Recompute = recompute
        self.dtype: torch.dtype = self.model.embed_tokens.weight.dtype
        embedding = self.model.embed_tokens
        if type(embedding) is not nn.Embedding or embedding.weight.requires_grad:
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
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._plan()

    def _plan(self) -> None:
        self.layers = [module for module in self.model.modules() if hasattr(module, "lora_A")]
        self.state = _adapter_state(self.layers)
        self.groups = [_layer_groups(layer, self.dtype, self.fp8) for layer in self.model.layers]
        self.every = list(chain(*self.groups))
        self.masters = [master for group in self.every for master in group.masters]
        self._hold()

    def _hold(self) -> None:
        self.copies = Copies([], [])  # both hold what is let go of here
        self.graphs: Graphs | None = None
        needed = max(group.beside_elements for group in self.every)
        self.scratch = torch.empty(needed, dtype=self.dtype, device=self.device)
        first = len(self.groups) - self.kept
        for index, groups in enumerate(self.groups):
            for group in groups:
                group.left = group.b_grads = None  # of a row that broke off
                if index >= first:
                    group.keep(self.scratch)
                else:
                    group.release()
        self.copies = Copies(self.masters, [copy for group in self.every for copy in group.copies])
        if first <= 0:
            self.scratch = self.scratch[:0].clone()
        self._place_embedding()
        able = self.device.type == "cpu" or in_one_launch(self.scratch, self.heads[2])
        if self.replayed and able and self.masters:
            self.graphs = Graphs(self._stack, self.every, self.replayed)

    def _place_embedding(self, *, home: bool = False) -> None:
        table = self.model.embed_tokens.weight
        if self.recompute != "offload" or table is self.head or home:
            table.data = table.data.to(self.device)
        elif table.is_cuda:
            table.data = table.data.cpu().pin_memory()

    def change(self, kept: int, recompute: Recompute, held: int = 0, replayed: Rows | None = None) -> None:
        """Go on with other settings from the next row on."""
        self.recompute, self.kept, self.held, self.replayed, self.graphs = recompute, kept, held, replayed, None
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)  # copies may still be under way to memory that is free now
        self._hold()
        if on_gpu:
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Put back what was moved."""
        self.graphs = None
        self._place_embedding(home=True)

    def __call__(self, *, input_ids: Tensor, position_ids: Tensor, borders: list[int], **_: Any) -> SimpleNamespace:
        """`last_hidden_state` [1, T, D] after the final norm; input_ids and position_ids [1, T]."""
        if self.state != _adapter_state(self.layers):  # adapters switched on or off since
            self._plan()
        self._place_embedding()  # accelerate brings a base without 4-bit weights back whole
        T = input_ids.shape[1]
        graphs = self.graphs if self.replays and torch.is_grad_enabled() and self.model.training else None
        if graphs and not graphs.takes(T, len(borders) - 1):
            graphs = None
        whole = -(-T // ROUND) * ROUND
        borders = graphs.padded(borders) if graphs else [*borders, whole] if whole > T else borders
        more = borders[-1] - T
        x = gather_rows(self.model.embed_tokens.weight, F.pad(input_ids[0], (0, more)))
        row = self._row(x, F.pad(position_ids, (0, more)), borders)
        return SimpleNamespace(last_hidden_state=self._hidden(graphs, x, row)[None, :T])

    def _hidden(self, graphs: Graphs | None, x: Tensor, row: Row) -> Tensor:
        if graphs:
            try:
                return graphs(x, row)
            except Uncapturable as reason:  # which holds the capture's memory for as long as it is handled
                sys.stderr.write(f"no CUDA graphs: {reason}; going on without\n")
            self.graphs = None
        return self._stack(x, row)

    def _stack(self, x: Tensor, row: Row) -> Tensor:
        """All layers and the final norm."""
        for group in self.every:  # a short row's launches cost more than its passes over memory
            group.lends = len(x) >= LONG and group.stackable
        if self.masters:
            self.copies()
        row = row._replace(documents=row.documents.tiled())
        return _norm(*self._layers(x, row), self.model.norm)[0]

    def _row(self, x: Tensor, position_ids: Tensor, borders: list[int]) -> Row:
        cos, sin = self.model.rotary_emb(x[None], position_ids)
        seed = upload(torch.randint(2**62, (1,)), x.device)
        return Row(Documents.of(cos[0], sin[0], borders), seed, self.model.training, Offload(self.stream))

    def _layers(self, x: Tensor, row: Row) -> tuple[Tensor, Tensor | None]:
        """(what the last layer adds, the residual it adds to)."""
        residual: Tensor | None = None
        ways = {"selective": self._selective_layer, "full": self._recomputed_layer, "offload": self._offloaded_layer}
        way = ways.get(self.recompute, self._layer) if torch.is_grad_enabled() else self._layer
        # the last layer's backward pass comes next: computing it again would free nothing
        held = 0 if self.recompute == "selective" else max(self.held, self.recompute == "full")
        for index in range(len(self.groups)):
            layer = self._layer if index >= len(self.groups) - held else way
            x, residual = layer(x, residual, row, index)
        return x, residual

    def _pass(self, row: Row, index: int, place: int, lean: bool = False, discard: bool = False) -> Pass:
        dropout = self.groups[index][place].dropout if row.dropping else 0.0
        return Pass(self.scratch, dropout, row.seed, 4 * index + place, lean, discard)

    def _layer(self, x: Tensor, residual: Tensor | None, row: Row, index: int) -> tuple[Tensor, Tensor]:
        """(what the layer adds, the residual it adds to); x likewise belongs onto `residual`."""
        y, h = _norm(x, residual, self.model.layers[index].input_layernorm, self.groups[index][0].room)
        return self._from_norm(row, index, y, h)

    def _from_norm(self, row: Row, index: int, y: Tensor, h: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
        added, h = self._attention(row, index, y, h)
        y, h = _norm(added, h, self.model.layers[index].post_attention_layernorm, self.groups[index][2].room)
        return self._mlp(row, index, y, h, again)

    def _attention(self, row: Row, index: int, y: Tensor, h: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
        qkv, o, _, _ = self.groups[index]
        scaling = self.model.layers[index].self_attn.scaling
        heads = attention(qkv(y, self._pass(row, index, 0)), row.documents, self.heads, scaling, o.room)
        return o(heads, self._pass(row, index, 1, discard=again)), h

    def _mlp(self, row: Row, index: int, y: Tensor, h: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
        _, _, gate_up, down = self.groups[index]
        return down(gate_up(y, self._pass(row, index, 2)), self._pass(row, index, 3, discard=again)), h

    def _recomputed_layer(self, x: Tensor, residual: Tensor | None, row: Row, index: int) -> tuple[Tensor, Tensor]:
        rest, groups = partial(self._from_norm, row, index), self.groups[index]
        rooms = groups[0].room, self._room_before(index)
        return _recomputed(x, residual, self.model.layers[index].input_layernorm, rest, groups, rooms)

    def _room_before(self, index: int) -> int:
        """Behind the gradient of what the layer before has added."""
        return self.groups[index - 1][3].room if index else 0

    def _offloaded_layer(self, x: Tensor, residual: Tensor | None, row: Row, index: int) -> tuple[Tensor, Tensor]:
        layer, groups, attend, mlp = (
            self.model.layers[index],
            self.groups[index],
            partial(self._attention, row, index),
            partial(self._mlp, row, index),
        )
        first, rooms = layer.input_layernorm, (groups[0].room, self._room_before(index))
        x, residual = _recomputed(x, residual, first, attend, groups[:2], rooms, row.offload)
        second = layer.post_attention_layernorm
        if index == len(self.groups) - 1:  # as for a last layer
            return self._mlp(row, index, *_norm(x, residual, second, groups[2].room))
        rooms = groups[2].room, groups[1].room
        return _recomputed(x, residual, second, mlp, groups[2:], rooms, row.offload)

    def _selective_layer(self, x: Tensor, residual: Tensor | None, row: Row, index: int) -> tuple[Tensor, Tensor]:
        """As `_layer`; norms and the gate-up product are made again when the backward asks for them."""
        layer = self.model.layers[index]
        qkv, o, gate_up, down = self.groups[index]
        cheap = _Cheap()
        with saved_tensors_hooks(cheap.pack, cheap.unpack):
            y, first = _norm(x, residual, layer.input_layernorm, qkv.room)
            before = first.detach()  # what hangs on a node that hangs on `cheap` would hold itself
            cheap.add(y, lambda: _norm(before, None, layer.input_layernorm)[0])
            qkv_TN, scaling = qkv(y, self._pass(row, index, 0, lean=True)), layer.self_attn.scaling
            heads = attention(qkv_TN, row.documents, self.heads, scaling, o.room)
            added = o(heads, self._pass(row, index, 1, lean=True))
            y, h = _norm(added, first, layer.post_attention_layernorm, gate_up.room)
            between = h.detach()

            def normed() -> Tensor:
                return _norm(between, None, layer.post_attention_layernorm, gate_up.room)[0]

            how = self._pass(row, index, 2, lean=True)
            cheap.add(y, normed)
            hidden = gate_up(y, how)
            cheap.add(hidden, lambda: gate_up.forward(normed(), how)[0])
            return down(hidden, self._pass(row, index, 3)), h


class _Cheap:
    """Saves, in place of tensors that are soon made again, how to make them."""

    def __init__(self) -> None:
        self.makers: dict[tuple[int, torch.Size], Callable[[], Tensor]] = {}

    def add(self, x: Tensor, make: Callable[[], Tensor]) -> None:
        self.makers[x.data_ptr(), x.shape] = make

    def pack(self, x: Tensor) -> Tensor | Callable[[], Tensor]:
        return self.makers.get((x.data_ptr(), x.shape), x.detach())  # an output would hold the node that saves it

    @torch.no_grad()
    def unpack(self, kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()


class _Recomputed(Function):
    """A norm and the `rest` behind it, keeping the sum that the norm reads: the backward pass computes both again.

    Other than torch.utils.checkpoint it asks for no hook on each tensor saved, and what comes back is one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        norm: Callable[..., tuple[Tensor, Tensor]],
        rest: Any,
        offload: Offload | None,
        *masters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, h = norm(x, residual)
        ctx.norm, ctx.rest, ctx.offload, ctx.device, ctx.masters = norm, rest, offload, h.device, masters
        if not offload:
            ctx.save_for_backward(h)
        elif any(ctx.needs_input_grad):  # else nobody fetches it
            ctx.place = offload.send(h)
        found: tuple[Tensor, Tensor] = rest(y, h)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.offload.fetch(ctx.place, ctx.device) if ctx.offload else ctx.saved_tensors[0]
        h = kept.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            found = ctx.rest(*ctx.norm(h, None), again=True)
        asked = [y.requires_grad for y in found]
        to = [h, *ctx.masters] if h.requires_grad else list(ctx.masters)
        got = torch.autograd.grad(tuple(compress(found, asked)), to, tuple(compress(grads, asked))) if to else ()
        to_h = got[0] if h.requires_grad else None
        return to_h, to_h if ctx.needs_input_grad[1] else None, None, None, None, *got[h.requires_grad :]


def _recomputed(
    x: Tensor,
    residual: Tensor | None,
    norm: Any,
    rest: Any,
    groups: Sequence[Group],
    rooms: tuple[int, int],
    offload: Offload | None = None,
) -> tuple[Tensor, Tensor]:
    """As `rest` after the norm; `groups` are those it passes, `rooms` are behind the norm and the gradient in x."""
    masters = [master for group in groups for master in group.masters]
    normed = partial(_norm, norm=norm, room=rooms[0], grad_room=rooms[1])
    found: tuple[Tensor, Tensor] = _Recomputed.apply(x, residual, normed, rest, offload, *masters)
    return found


def _norm(x: Tensor, residual: Tensor | None, norm: Any, room: int = 0, grad_room: int = 0) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum)."""
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon, room, grad_room)


def _layer_groups(layer: Any, dtype: torch.dtype, fp8: bool) -> tuple[Group, Group, Group, Group]:
    attn, mlp = layer.self_attn, layer.mlp
    gate_up = Group([mlp.gate_proj, mlp.up_proj], dtype, fp8=fp8)
    return (
        Group([attn.q_proj, attn.k_proj, attn.v_proj], dtype, fp8=fp8),
        Group([attn.o_proj], dtype, fp8=fp8),
        gate_up,
        Group([mlp.down_proj], dtype, gated=gate_up, fp8=fp8),
    )


def _adapter_state(layers: list[Any]) -> list[tuple[Any, ...]]:
    """What decides which adapters take part; cheap enough to ask before every row."""
    return [(m.disable_adapters, m.merged, *m.active_adapters) for m in layers]
