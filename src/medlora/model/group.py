"""Frozen linear modules that read one input, with their LoRA branches, as one product each way.

    y = x W' + s dropout(x) A' B'        dx = g W + dropout(s g B A)

The weights of a group are dequantised side by side into a buffer that all groups of the model share, and the
4-bit codes are the only lasting copy; with `keep` they stay dequantised, two bytes each. Forward, the rank-R term is
written first and the product of the base adds onto it inside its own float32 accumulator: the sum is rounded once.
Backward, it is added last unless it is dropped out: products with W run a tenth slower when they add. With FP8
(row-wise e4m3, `kernels.fp8`) activations and gradients are quantised on the way, and the weights in both
orientations, once with `keep` and in every pass without.

Dropout's mask is a function of a seed and is never stored. Modules of a group share it (PEFT draws one for
each: every module sees the same distribution, not the same draw). The trained tensors stay PEFT's own float32
ones; a row works on copies in the compute dtype, and gradients come back in float32.

Shapes: T tokens of the row, D inputs, N outputs and R ranks of a group.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from medlora.kernels.dropout import dropout
from medlora.kernels.fp8 import fp8_linear, quantize_rows
from medlora.kernels.nf4 import DoubleQuant, dequantize_nf4, stored_scales
from medlora.kernels.swiglu import swiglu, swiglu_backward

FP8_MULTIPLE = 16  # of a width, which the tensor cores ask for
Codes = tuple[Tensor, Tensor]


class Unfusable(Exception):
    """The fused path does not know this model; the message says why."""


class Adapter(NamedTuple):
    """What a PEFT layer adds: scaling * dropout(x) a' b'."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


class Pass(NamedTuple):
    """How a group is passed once."""

    scratch: Tensor
    p: float
    seed: Tensor
    """int64 [1]."""
    place: int
    """Of this product in the row: added to the seed."""
    lean: bool = False
    """Save x itself, which somebody else keeps or can make again, rather than dropout(x)."""
    discard: bool = False
    """Nobody reads the output: it is recomputed for what it saves."""

    def dropout(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.seed, self.place)


class Group:
    """Linear modules that read the same input, as one product with one rank-R term.

    Args:
        gated: the input is [T, 2 D], gate beside up, and the modules read silu(gate) * up.
        fp8: products of the frozen weights in row-wise FP8.

    Raises:
        Unfusable: modules that cannot be computed so.
    """

    def __init__(self, modules: list[Any], dtype: torch.dtype, *, gated: bool = False, fp8: bool = False) -> None:
        self.bases: list[Any] = [getattr(module, "base_layer", module) for module in modules]
        self.adapters = [_adapter(module) for module in modules]
        self.gated, self.fp8 = gated, fp8
        self.sizes: list[int] = [base.out_features for base in self.bases]
        self.shape: tuple[int, int] = (sum(self.sizes), self.bases[0].in_features)
        if fp8 and any(size % FP8_MULTIPLE for size in self.shape):
            raise Unfusable(f"FP8 takes widths that are multiples of {FP8_MULTIPLE}, not {self.shape}")
        self.doubles = [_quantisation(base, dtype) for base in self.bases]
        biases = [base.bias for base in self.bases]
        if any(b is None for b in biases) != all(b is None for b in biases):
            raise Unfusable("only some of the modules that share an input have a bias")
        self.bias = None if biases[0] is None else torch.cat(biases).to(dtype)
        self.kept: Tensor | None = None
        self.kept_codes: tuple[Codes, Codes] | None = None
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
                dequantize_nf4(base.weight.data, stored_scales(base.weight.quant_state), rows, double[0])
        return out

    def keep(self, scratch: Tensor) -> None:
        """Hold the frozen weights as the products take them."""
        w = self.weight(scratch)
        if self.fp8:
            self.kept_codes = quantize_rows(w), quantize_rows(w.t())
        else:
            self.kept = w.clone() if w.data_ptr() == scratch.data_ptr() else w

    def release(self) -> None:
        self.kept = self.kept_codes = None

    def codes(self, scratch: Tensor, back: bool) -> Codes:
        """The weights in FP8: rows of W, or with `back` of W'."""
        if self.kept_codes is not None:
            return self.kept_codes[back]
        w = self.weight(scratch)
        return quantize_rows(w.t() if back else w)

    def product(self, x: Tensor, scratch: Tensor, onto: Tensor | None, *, back: bool = False) -> Tensor:
        """x W', or with `back` x W; `onto`, where given, is added to and returned."""
        if self.fp8:
            y = fp8_linear(x, *self.codes(scratch, back))
            return y if onto is None else y.add_(onto)
        w = self.weight(scratch) if back else self.weight(scratch).t()
        return x @ w if onto is None else onto.addmm_(x, w)

    def input(self, x: Tensor) -> Tensor:
        return swiglu(*x.chunk(2, 1)) if self.gated else x

    def forward(self, x: Tensor, how: Pass) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(y [T, N], dropout(x) [T, D], s dropout(x) A' [T, R]); the last two None without adapters."""
        if not self.parts:
            y = self._nothing(x) if how.discard else self._with_bias(self.product(self.input(x), how.scratch, None))
            return y, None, None
        inner = self.input(x)
        dropped = how.dropout(inner)
        h_TR = _scaled(dropped, self.a.t(), self.scaling)
        if how.discard:
            return self._nothing(x), dropped, h_TR
        return self._with_bias(self.product(inner, how.scratch, self.adapted(h_TR))), dropped, h_TR

    def _nothing(self, x: Tensor) -> Tensor:
        """The output's shape without its memory."""
        return x.new_empty(()).expand(len(x), self.shape[0])

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y.add_(self.bias)

    def adapted(self, h_TR: Tensor) -> Tensor:
        """h b' [T, N], zero in the columns of modules without an adapter."""
        make = h_TR.new_empty if len(self.parts) == len(self.sizes) else h_TR.new_zeros
        y = make(len(h_TR), self.shape[0])
        if self.even is not None:
            torch.bmm(self.batch(h_TR), self.even.transpose(1, 2), out=self.batch(y))
            return y
        for columns, ranks, b in self.parts:
            torch.mm(h_TR[:, ranks], b.t(), out=y[:, columns])
        return y

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

    def __call__(self, x: Tensor, how: Pass) -> Tensor:
        y: Tensor = _Linear.apply(x, self, how, *self.masters)
        return y


class _Linear(Function):
    """A group's product, keeping dropout(x), if an adapter needs it, and s dropout(x) A'.

    A gated group keeps its input instead, and computes SwiGLU and dropout again; so does a lean pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, how: Pass, *masters: Tensor) -> Tensor:
        y, dropped, h_TR = group.forward(x, how)
        again = group.gated or (how.lean and bool(group.parts))
        ctx.save_for_backward(x if again else dropped, h_TR)
        ctx.group, ctx.how, ctx.again = group, how, again
        ctx.dropped = dropped if how.discard else None  # then the backward pass is next
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, h_TR), group, how = ctx.saved_tensors, ctx.group, ctx.how
        grads: list[Tensor | None] = []
        dh_TR = None
        if group.parts:
            dh_TR, db = group.adapter_grads(grad, h_TR)
            dropped, ctx.dropped = ctx.dropped, None
            if dropped is None:
                dropped = how.dropout(group.input(x)) if ctx.again else x
            da = _float32_product(torch.mm, dh_TR.t(), dropped)
            del dropped
            for (_, ranks, _), each in zip(group.parts, db, strict=True):
                grads += [da[ranks], each]
        dx = None
        if ctx.needs_input_grad[0]:
            onto = None if dh_TR is None or not how.p else how.dropout(dh_TR @ group.a)
            dx = group.product(grad, how.scratch, onto, back=True)
            if dh_TR is not None and onto is None:
                dx.addmm_(dh_TR, group.a)
            dx = _through_swiglu(dx, x) if group.gated else dx
        return dx, None, None, *grads


def _through_swiglu(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in gate and up, in their own place: only this group reads them, and not again."""
    x = x.detach()
    gate, up = x.chunk(2, 1)
    swiglu_backward(grad, gate, up, gate, up)
    return x


def _scaled(x: Tensor, w: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """scaling * x @ w, in one launch."""
    out = x.new_empty(len(x), w.shape[1]) if out is None else out
    return torch.addmm(out, x, w, beta=0, alpha=scaling, out=out)


def _float32_product(product: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    wide = {"out_dtype": torch.float32} if a.is_cuda and a.dtype != torch.float32 else {}
    c: Tensor = product(a, b, **wide)
    return c.float()


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
