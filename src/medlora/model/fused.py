"""The decoder of a LLaMA-family model over one packed row, written for a GPU's habits.

A training step of Transformers' and PEFT's layers moves each activation through memory many times, in many
small kernels. Here a layer is five steps, each an autograd function that
keeps the least its backward needs:

    norm (+ residual) -> q, k, v -> rope + attention -> o -> norm + residual -> gate, up -> SwiGLU + down

Linear modules that read one input form a `Group`: their weights are dequantised side by side into one
buffer that all groups of the model share, so a group is one product forward and one backward, and the 4-bit
codes are the only lasting copy; with `keep` the weights stay dequantised, two bytes each, which saves 450
launches and 9 ms a step of a 7B base. LoRA follows in rank-R products on the group's output; dropout's mask
is a function of a seed, drawn once a row, and is never stored. Modules of a group share that mask (PEFT draws
one for each: every module sees the same distribution, not the same draw). SwiGLU's output is computed again
in the backward pass.

The trained tensors stay PEFT's own float32 ones: they are copied to the compute dtype once a row, and their
gradients come back in float32. Where a model holds something this file does not know, `Fused` raises
`Unfusable` with the reason and the caller runs Transformers' layers instead.

Shapes: T tokens of the row, D inputs, N outputs and R ranks of a group, H query heads, K key heads, C head
size.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from medlora.kernels.attention import Documents, attention
from medlora.kernels.dropout import dropout, dropout_add_
from medlora.kernels.nf4 import DoubleQuant, dequantize_nf4
from medlora.kernels.rms_norm import add_rms_norm, rms_norm
from medlora.kernels.swiglu import swiglu, swiglu_backward

# A row grows to a multiple of this, by a document that nothing reads: shapes that recur are looked up once by
# cuBLAS and the allocator, and a product's tiles are as tall anyway.
ROUND = 128
OVERHEAD = 1.5e9  # kernels' workspaces, allocator slack


class Unfusable(Exception):
    """The fused path does not know this model; the message says why."""


class Adapter(NamedTuple):
    """What a PEFT layer adds: scaling * dropout(x) a' b'."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


class Row(NamedTuple):
    """What all layers share while a packed row passes."""

    documents: Documents
    seed: int
    dropping: bool


class Group:
    """Linear modules that read the same input, as one product with one rank-R term.

    With `gated` the input is [T, 2 D], gate beside up, and the modules read silu(gate) * up.
    """

    def __init__(self, modules: list[Any], dtype: torch.dtype, gated: bool = False) -> None:
        self.bases: list[Any] = [getattr(module, "base_layer", module) for module in modules]
        self.adapters = [_adapter(module) for module in modules]
        self.gated = gated
        self.sizes: list[int] = [base.out_features for base in self.bases]
        self.shape: tuple[int, int] = (sum(self.sizes), self.bases[0].in_features)
        self.doubles = [_quantisation(base, dtype) for base in self.bases]
        biases = [base.bias for base in self.bases]
        if any(b is None for b in biases) != all(b is None for b in biases):
            raise Unfusable("only some of the modules that share an input have a bias")
        self.bias = None if biases[0] is None else torch.cat(biases).to(dtype)
        self.kept: Tensor | None = None
        self._copy_adapters(dtype)

    def _copy_adapters(self, dtype: torch.dtype) -> None:
        """Room for the trained tensors in the compute dtype: every a in one [R, D], each b as it is."""
        present = [adapter for adapter in self.adapters if adapter]
        if len({(adapter.scaling, adapter.dropout) for adapter in present}) > 1:
            raise Unfusable("modules that share an input differ in LoRA scaling or dropout")
        ranks = [len(adapter.a) for adapter in present]
        self.scaling, self.dropout = (present[0].scaling, present[0].dropout) if present else (0.0, 0.0)
        self.masters = [tensor for adapter in present for tensor in (adapter.a, adapter.b)]
        device = self.bases[0].weight.device
        self.a = torch.empty(sum(ranks), self.shape[1], dtype=dtype, device=device)
        self.copies: list[Tensor] = []
        self.parts: list[tuple[slice, slice, Tensor]] = []
        """(columns of the output, columns of the rank-R product, b) of each adapted module."""
        alike = len(present) == len(self.sizes) > 1 and len({adapter.b.shape for adapter in present}) == 1
        self.even = torch.empty(len(present), *present[0].b.shape, dtype=dtype, device=device) if alike else None
        """Every b in one [n, N, r] where all modules have one of one shape: their products go as a batch."""
        column, rank = 0, 0
        for size, adapter in zip(self.sizes, self.adapters, strict=True):
            if adapter:
                r = len(adapter.a)
                b = torch.empty_like(adapter.b, dtype=dtype) if self.even is None else self.even[len(self.parts)]
                self.copies += [self.a[rank : rank + r], b]
                self.parts.append((slice(column, column + size), slice(rank, rank + r), b))
                rank += r
            column += size

    def weight(self, scratch: Tensor) -> Tensor:
        """The frozen weights [N, D], in `scratch` unless they are kept or one plain weight can serve."""
        if self.kept is not None:
            return self.kept
        if len(self.bases) == 1 and self.doubles[0] is None:
            plain: Tensor = self.bases[0].weight
            return plain
        out = scratch[: self.shape[0] * self.shape[1]].view(self.shape)
        for base, double, rows in zip(self.bases, self.doubles, out.split(self.sizes), strict=True):
            if double is None:
                rows.copy_(base.weight)
            else:
                state = base.weight.quant_state
                dequantize_nf4(base.weight.data, state.absmax, rows, double[0])
        return out

    def input(self, x: Tensor) -> Tensor:
        return swiglu(*x.chunk(2, 1)) if self.gated else x

    def add_adapters_(self, y: Tensor, h_TR: Tensor) -> None:
        """y += h b', module by module."""
        if self.even is not None:
            self.batch(y).baddbmm_(self.batch(h_TR), self.even.transpose(1, 2))
            return
        for columns, ranks, b in self.parts:
            y[:, columns].addmm_(h_TR[:, ranks], b.t())

    def adapter_grads(self, grad: Tensor, h_TR: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradients of dropout(x) a' [T, R] and of each b, float32."""
        dh_TR = torch.empty_like(h_TR)
        if self.even is not None:
            g, dh = self.batch(grad), self.batch(dh_TR)
            torch.baddbmm(dh, g, self.even, beta=0, alpha=self.scaling, out=dh)
            return dh_TR, list(_float32_product(torch.bmm, g.transpose(1, 2), self.batch(h_TR)))
        for columns, ranks, b in self.parts:
            _scaled(grad[:, columns], b, self.scaling, dh_TR[:, ranks])
        return dh_TR, [_float32_product(torch.mm, grad[:, c].t(), h_TR[:, r]) for c, r, _ in self.parts]

    def batch(self, x: Tensor) -> Tensor:
        """[T, n C] as n matrices [n, T, C]."""
        return x.view(len(x), len(self.parts), -1).transpose(0, 1)

    def __call__(self, x: Tensor, scratch: Tensor, row: Row, seed: int) -> Tensor:
        p = self.dropout if row.dropping else 0.0
        y: Tensor = _Linear.apply(x, self, scratch, p, row.seed + seed, *self.masters)
        return y


class _Linear(Function):
    """y = x W' + bias + s dropout(x) A' B', keeping dropout(x), if an adapter needs it, and s dropout(x) A'.

    A gated group keeps its input instead, and computes SwiGLU and dropout again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, scratch: Tensor, p: float, seed: int, *masters: Tensor) -> Tensor:
        inner = group.input(x)
        w = group.weight(scratch)
        y = inner @ w.t() if group.bias is None else torch.addmm(group.bias, inner, w.t())
        h_TR = None
        if group.parts:
            inner = dropout(inner, p, seed)
            h_TR = _scaled(inner, group.a.t(), group.scaling)
            group.add_adapters_(y, h_TR)
        ctx.save_for_backward(x if group.gated else inner if group.parts else None, h_TR)
        ctx.group, ctx.scratch, ctx.p, ctx.seed = group, scratch, p, seed
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, h_TR), group, p, seed = ctx.saved_tensors, ctx.group, ctx.p, ctx.seed
        grads: list[Tensor | None] = []
        dh_TR = None
        if group.parts:
            dh_TR, db = group.adapter_grads(grad, h_TR)
            dropped = dropout(group.input(x), p, seed) if group.gated else x
            da = _float32_product(torch.mm, dh_TR.t(), dropped)
            for (_, ranks, _), each in zip(group.parts, db, strict=True):
                grads += [da[ranks], each]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _input_grad(grad, dh_TR, group, ctx.scratch, p, seed)
            dx = _through_swiglu(dx, x) if group.gated else dx
        return dx, None, None, None, None, *grads


def _input_grad(grad: Tensor, dh_TR: Tensor | None, group: Group, scratch: Tensor, p: float, seed: int) -> Tensor:
    dx = grad @ group.weight(scratch)
    if dh_TR is None:
        return dx
    return dropout_add_(dx, dh_TR @ group.a, p, seed) if p else dx.addmm_(dh_TR, group.a)


def _through_swiglu(grad: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    swiglu_backward(grad, *x.chunk(2, 1), *dx.chunk(2, 1))
    return dx


def _scaled(x: Tensor, w: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """scaling * x @ w, in one launch."""
    out = x.new_empty(len(x), w.shape[1]) if out is None else out
    return torch.addmm(out, x, w, beta=0, alpha=scaling, out=out)


def _float32_product(product: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    wide = {"out_dtype": torch.float32} if a.is_cuda and a.dtype != torch.float32 else {}
    c: Tensor = product(a, b, **wide)
    return c.float()


class Fused:
    """A stand-in for the forward of `LlamaModel` or `MistralModel` while packed rows pass.

    Args:
        causal: the causal LM; its linear modules: `nn.Linear`, bitsandbytes' NF4, or PEFT LoRA over either.
        keep: hold the dequantised weights, two bytes each, rather than dequantise in every pass.

    Raises:
        Unfusable: something in the model that this path does not compute.
    """

    def __init__(self, causal: Any, keep: bool = False) -> None:
        self.model, config, self.keep = causal.model, causal.config, keep
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
        layer = self.model.layers[0]
        head_size = layer.self_attn.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, head_size)
        self._plan()

    def _plan(self) -> None:
        self.layers = [module for module in self.model.modules() if hasattr(module, "lora_A")]
        self.state = _adapter_state(self.layers)
        self.groups = [_layer_groups(layer, self.dtype) for layer in self.model.layers]
        every = [group for groups in self.groups for group in groups]
        self.masters = [master for group in every for master in group.masters]
        self.copies = [copy for group in every for copy in group.copies]
        needed = max(group.shape[0] * group.shape[1] for group in every)
        self.scratch = torch.empty(needed, dtype=self.dtype, device=self.model.embed_tokens.weight.device)
        if self.keep:
            for group in every:
                group.kept = group.weight(self.scratch).clone()

    def __call__(self, *, input_ids: Tensor, position_ids: Tensor, borders: list[int], **_: Any) -> SimpleNamespace:
        """`last_hidden_state` [1, T, D] after the final norm; input_ids and position_ids [1, T]."""
        if self.state != _adapter_state(self.layers):  # adapters switched on or off since
            self._plan()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.masters)
        T = input_ids.shape[1]
        more = -T % ROUND
        x = F.embedding(F.pad(input_ids[0], (0, more)), self.model.embed_tokens.weight)
        row = self._row(x, F.pad(position_ids, (0, more)), [*borders, T + more] if more else borders)
        residual: Tensor | None = None
        recompute = torch.is_grad_enabled() and self.model.training and self.model.layers[0].gradient_checkpointing
        for index in range(len(self.groups)):
            if recompute:
                x = checkpoint(self._whole_layer, x, row, index, use_reentrant=False, preserve_rng_state=False)
            else:
                x, residual = self._layer(x, residual, row, index)
        return SimpleNamespace(last_hidden_state=_norm(x, residual, self.model.norm)[0][None, :T])

    def _row(self, x: Tensor, position_ids: Tensor, borders: list[int]) -> Row:
        cos, sin = self.model.rotary_emb(x[None], position_ids)
        # above 2^32, so that the kernel is compiled for one width of seeds
        seed = int(torch.randint(2**32, 2**62, ()))
        return Row(Documents.of(cos[0], sin[0], borders), seed, self.model.training)

    def _layer(self, x: Tensor, residual: Tensor | None, row: Row, index: int) -> tuple[Tensor, Tensor]:
        """(what the layer adds, the residual it adds to); x likewise belongs onto `residual`."""
        layer, scratch = self.model.layers[index], self.scratch
        qkv, o, gate_up, down = self.groups[index]
        seed = 4 * index
        y, h = _norm(x, residual, layer.input_layernorm)
        heads = attention(qkv(y, scratch, row, seed), row.documents, self.heads, layer.self_attn.scaling)
        y, h = _norm(o(heads, scratch, row, seed + 1), h, layer.post_attention_layernorm)
        return down(gate_up(y, scratch, row, seed + 2), scratch, row, seed + 3), h

    def _whole_layer(self, x: Tensor, row: Row, index: int) -> Tensor:
        """A recomputed layer keeps its input alone, so that is the sum."""
        added, residual = self._layer(x, None, row, index)
        return added + residual


def _norm(x: Tensor, residual: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum)."""
    if residual is None:
        return rms_norm(x, norm.weight, norm.variance_epsilon), x
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)


def _layer_groups(layer: Any, dtype: torch.dtype) -> tuple[Group, Group, Group, Group]:
    attn, mlp = layer.self_attn, layer.mlp
    return (
        Group([attn.q_proj, attn.k_proj, attn.v_proj], dtype),
        Group([attn.o_proj], dtype),
        Group([mlp.gate_proj, mlp.up_proj], dtype),
        Group([mlp.down_proj], dtype, gated=True),
    )


def _adapter_state(layers: list[Any]) -> list[tuple[Any, ...]]:
    """What decides which adapters take part; cheap enough to ask before every row."""
    return [(m.disable_adapters, m.merged, *m.active_adapters) for m in layers]


def _adapter(module: Any) -> Adapter | None:
    """The active adapter of a PEFT LoRA layer.

    Raises:
        Unfusable: more than one, or a kind with other mathematics.
    """
    if not hasattr(module, "base_layer"):
        return None
    if not hasattr(module, "lora_A"):
        raise Unfusable(f"{type(module).__name__} is not LoRA")
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not active:
        return None
    name = active[0]
    if len(active) > 1:
        raise Unfusable("several adapters are active")
    if name in module.lora_variant or module.lora_bias.get(name):
        raise Unfusable("the adapter is a variant of LoRA (DoRA, biases, ...)")
    drop = module.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) else 0.0
    return Adapter(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], p)


def _quantisation(base: Any, dtype: torch.dtype) -> tuple[DoubleQuant | None] | None:
    """None for a plain weight; for NF4 a 1-tuple of its second quantisation, if it has one.

    Raises:
        Unfusable: a weight that is trained or stored otherwise.
    """
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    if weight.requires_grad:
        raise Unfusable("base weights are trained")
    if state is None:
        if type(base) is not nn.Linear or weight.dtype != dtype:
            raise Unfusable(f"{type(base).__name__} in {weight.dtype} is neither NF4 nor a plain {dtype} weight")
        return None
    if weight.dtype != torch.uint8 or base.in_features * base.out_features % 64:
        raise Unfusable("4-bit codes stored otherwise than as bytes in whole blocks")
    try:
        return (DoubleQuant.of(state),)
    except ValueError as error:
        raise Unfusable(str(error)) from None


def row_bytes(config: Any, tokens: int, *, recompute: bool, width: int = 2) -> int:
    """Estimated bytes that a packed row of `tokens` takes beside weights, gradients and optimizer.

    A layer keeps, a token: two sums and two norms [D], q, k, v, the attention output [H C], gate and up, and
    the log-sum-exp. At work are the gradients of gate and up, a few [D], and a chunk of logits.

    Args:
        config: the model's config, read for its shape.
        recompute: layers keep their input alone, and one layer at a time the rest.
        width: bytes an activation.
    """
    D, F_, H, K = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    C = getattr(config, "head_dim", None) or D // H
    layer = width * (4 * D + (2 * H + 2 * K) * C + 2 * F_) + 4 * H
    kept = config.num_hidden_layers * width * D + layer if recompute else config.num_hidden_layers * layer
    work = width * (4 * F_ + 6 * D)
    head = 2 * width * 1024 * config.vocab_size
    return int(tokens * (kept + work) + head + width * 2 * D * F_ + OVERHEAD)


def base_bytes(config: Any, width: int = 2) -> int:
    """Bytes of the dequantised linear weights, which `keep` holds."""
    D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    C = getattr(config, "head_dim", None) or D // H
    return int(width * config.num_hidden_layers * (2 * D * (H + K) * C + 3 * D * config.intermediate_size))
