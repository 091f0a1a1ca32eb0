"""Frozen linear modules that read one input, with their LoRA branches, as one product each way.

    y = x W' + s dropout(x) A' B'        dx = g W + dropout(s g B A)

The weights of a group are dequantised side by side into a buffer that all groups of the model share, and the
4-bit codes are the only lasting copy. Forward, the rank-R term is written first and the product of the base adds onto
it inside its own float32 accumulator: the sum is rounded once. Backward, it is added last unless it is dropped out:
products with W run a tenth slower when they add.

With `keep` the weights stay dequantised, two bytes each, and the adapters' copies lie beside them, as in that buffer
while long rows pass, so that one product takes both terms along, wherever x has room for h behind its columns, and g
for dh:

    y = [x, h] [W, B]'    h = s dropout(x) A'        dx = [g, dh] [[W], [A]]    dh = s g B

That costs a hundredth more products, and no pass over y and dx. Who makes x or g leaves the room: norms, SwiGLU, and
whoever makes a gradient, whose rows are as far apart as those of its tensor.

Beside SwiGLU LoRA's terms cost next to nothing: the group that makes gate and up leaves its term to the group that
reads them, and that one its gradient's to SwiGLU's backward pass, which makes the adapters' gradients too
(`kernels.swiglu`).

With FP8 (row-wise e4m3, `kernels.fp8`) activations and gradients are quantised on the way, and the weights in both
orientations, once with `keep` and in every pass without; other adapters are added in a pass of their own,
`kernels.low_rank`.

Dropout's mask is a function of a seed and is never stored. Modules of a group share it (PEFT draws one for
each: every module sees the same distribution, not the same draw). The trained tensors stay PEFT's own float32
ones; a row works on copies in the compute dtype, and gradients come back in float32.

Shapes: T tokens of the row, D inputs, N outputs and R ranks of a group.
"""

# torch leaves Function.apply untyped
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from medlora.kernels.dispatch import multiplies, roomy, widened
from medlora.kernels.dropout import dropout
from medlora.kernels.fp8 import fp8_linear, quantize_rows
from medlora.kernels.low_rank import add_low_rank_
from medlora.kernels.nf4 import BLOCKSIZE, dequantize_nf4, stored_scales
from medlora.kernels.product import matmul
from medlora.kernels.swiglu import RANKS, swiglu, swiglu_adapted, swiglu_adapted_backward
from medlora.model.modules import Unfusable, adapter_of, quantisation_of

FP8_MULTIPLE = 16  # of a width, which the tensor cores ask for
ALIGNED = 8  # elements of a row: 16 bytes, by which the products read
Codes = tuple[Tensor, Tensor]


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
        gated: whose output [T, 2 D], gate beside up, is the input; the modules read silu(gate) * up.
        fp8: products of the frozen weights in row-wise FP8.

    Raises:
        Unfusable: modules that cannot be computed so.
    """

    def __init__(
        self, modules: list[Any], dtype: torch.dtype, *, gated: Group | None = None, fp8: bool = False
    ) -> None:
        self.bases: list[Any] = [getattr(module, "base_layer", module) for module in modules]
        self.adapters = [adapter_of(module) for module in modules]
        self.gated, self.fp8 = gated, fp8
        self.read_gated = False
        self.tiled = multiplies(self.bases[0].weight.device)
        """Whether SwiGLU's tiles may meet LoRA's."""
        if gated is not None:
            gated.read_gated = True
        self.sizes: list[int] = [base.out_features for base in self.bases]
        self.shape: tuple[int, int] = (sum(self.sizes), self.bases[0].in_features)
        if fp8 and any(size % FP8_MULTIPLE for size in self.shape):
            raise Unfusable(f"FP8 takes widths that are multiples of {FP8_MULTIPLE}, not {self.shape}")
        self.doubles = [quantisation_of(base, dtype) for base in self.bases]
        biases = [base.bias for base in self.bases]
        if any(b is None for b in biases) != all(b is None for b in biases):
            raise Unfusable("only some of the modules that share an input have a bias")
        self.bias = None if biases[0] is None else torch.cat(biases).to(dtype)
        self.dtype = dtype
        self.kept: Tensor | None = None
        self.kept_codes: tuple[Codes, Codes] | None = None
        self.beside: Tensor | None = None
        """The kept weights and the adapters: [[W, scattered b], [a, 0]], [N + R, D + R]."""
        self.lends = False
        """Weights that are not kept are dequantised beside copies of the adapters."""
        self.left: Tensor | None = None
        """h [T, R], whose term the group that is passed next adds."""
        self.b_grads: Tensor | None = None
        """Every b's gradient of the backward pass that is due, where the group that reads this one's output made it."""
        self._check_adapters()
        self._place_adapters()

    def _check_adapters(self) -> None:
        present = [adapter for adapter in self.adapters if adapter]
        if len({(adapter.scaling, adapter.dropout) for adapter in present}) > 1:
            raise Unfusable("modules that share an input differ in LoRA scaling or dropout")
        self.scaling, self.dropout = (present[0].scaling, present[0].dropout) if present else (0.0, 0.0)
        self.masters = [tensor for adapter in present for tensor in (adapter.a, adapter.b)]

    def _place_adapters(self, beside: Tensor | None = None) -> None:
        """Room for the trained tensors in the compute dtype: every a in one [R, D], each b as it is; with `beside`
        below and right of the frozen weights there, so that one product takes both."""
        (N, D), present = self.shape, [adapter for adapter in self.adapters if adapter]
        new = partial(torch.empty, dtype=self.dtype, device=self.bases[0].weight.device)
        alike = len(present) == len(self.sizes) > 1 and len({adapter.b.shape for adapter in present}) == 1
        self.even: Tensor | None = None
        """Every b in one [n, N, r] where all modules have one of one shape: their products go as a batch."""
        if beside is not None:
            self.a = beside[N:, :D]
            if alike:
                (size, r), width = present[0].b.shape, beside.shape[1]
                self.even = beside.as_strided((len(present), size, r), (size * width + r, width, 1), D)
        else:
            self.a = new(sum(len(adapter.a) for adapter in present), D)
            self.even = new(len(present), *present[0].b.shape) if alike else None
        self.copies: list[Tensor] = []
        self.parts: list[tuple[slice, slice, Tensor]] = []
        """(columns of the output, columns of the rank-R product, b) of each adapted module."""
        column, rank = 0, 0
        for size, adapter in zip(self.sizes, self.adapters, strict=True):
            if adapter:
                columns, ranks = slice(column, column + size), slice(rank, rank + len(adapter.a))
                rank = ranks.stop
                if self.even is not None:
                    b = self.even[len(self.parts)]
                else:
                    b = new(*adapter.b.shape) if beside is None else beside[:N, D:][columns, ranks]
                self.copies += [self.a[ranks], b]
                self.parts.append((columns, ranks, b))
            column += size

    @property
    def room(self) -> int:
        """How many columns beside this group's inputs and outputs its products take along: R where the weights lie
        beside the adapters, else none."""
        return len(self.a) if self.beside is not None or self.lends else 0

    @property
    def leaves_term(self) -> bool:
        """Whether h b' is left to the group that reads this one's output."""
        fits = self.even is not None and self.even.shape[2] in RANKS and not self.sizes[0] % ALIGNED
        return self.read_gated and self.tiled and fits

    @property
    def beside_elements(self) -> int:
        """Of the weights and the adapters beside them, or of the weights alone where no product can take both."""
        (N, D), R = self.shape, len(self.a) if self.stackable else 0
        return (N + R) * (D + R)

    @cached_property
    def stackable(self) -> bool:
        """Whether one product can take the weights and the adapters beside them."""
        (N, D), ranks = self.shape, map(len, self.masters[::2])
        odd = D % BLOCKSIZE or any(size % ALIGNED for size in (N, *ranks))
        return bool(self.parts) and not (self.fp8 or self._serves_itself or odd)

    def stacked(self, scratch: Tensor, *, back: bool) -> Tensor:
        """[W, scattered b] [N, D + R], or with `back` [[W], [a]] [N + R, D], in `scratch` unless they are kept."""
        (N, D), R = self.shape, len(self.a)
        if self.beside is not None:
            return self.beside[:, :D] if back else self.beside[:N]
        out = scratch[: (N + R) * (D + R)].view(N + R, D + R)
        self._write_weight(out[:N, :D])
        if back:
            out[N:, :D] = self.a
            return out[:, :D]
        if len(self.sizes) > 1:
            out[:N, D:] = 0
        torch._foreach_copy_([out[c, D:][:, r] for c, r, _ in self.parts], [b for *_, b in self.parts])
        return out[:N]

    def weight(self, scratch: Tensor) -> Tensor:
        """The frozen weights [N, D], in `scratch` unless they are kept or one plain weight can serve."""
        if self.kept is not None:
            return self.kept
        if self._serves_itself:
            plain: Tensor = self.bases[0].weight
            return plain
        return self._write_weight(scratch[: self.shape[0] * self.shape[1]].view(self.shape))

    @property
    def _serves_itself(self) -> bool:
        return len(self.bases) == 1 and self.doubles[0] is None

    def _write_weight(self, out: Tensor) -> Tensor:
        for base, double, rows in zip(self.bases, self.doubles, out.split(self.sizes), strict=True):
            if double is None:
                rows.copy_(base.weight)
            else:
                dequantize_nf4(base.weight.data, stored_scales(base.weight.quant_state), rows, double[0])
        return out

    def keep(self, scratch: Tensor) -> None:
        """Hold the frozen weights as the products take them."""
        if self.beside is not None:
            return
        if self.stackable:
            (N, D), R = self.shape, len(self.a)
            self.beside = scratch.new_zeros(N + R, D + R)
            self.kept = self._write_weight(self.beside[:N, :D])
            self._place_adapters(self.beside)
            return
        w = self.weight(scratch)
        if self.fp8:
            self.kept_codes = quantize_rows(w), quantize_rows(w.t())
        else:
            self.kept = w if self._serves_itself else w.clone()

    def release(self) -> None:
        self.kept = self.kept_codes = None
        if self.beside is not None:
            self.beside = None
            self._place_adapters()

    def codes(self, scratch: Tensor, back: bool) -> Codes:
        """The weights in FP8: rows of W, or with `back` of W'."""
        if self.kept_codes is not None:
            return self.kept_codes[back]
        w = self.weight(scratch)
        return quantize_rows(w.t() if back else w)

    def product(self, x: Tensor, scratch: Tensor, onto: Tensor | None = None, *, back: bool = False) -> Tensor:
        """x W', or with `back` x W; `onto`, where given, is added to and returned."""
        if self.fp8:
            y = fp8_linear(x, *self.codes(scratch, back))
            return y if onto is None else y.add_(onto)
        w = self.weight(scratch) if back else self.weight(scratch).t()
        return matmul(x, w, onto, adds=onto is not None)

    def input(self, x: Tensor, left: Tensor | None) -> Tensor:
        """What the modules read; `left`: the h of the group that made x, if x lacks its term."""
        if self.gated is None:
            return x
        (gate, up), b = x.chunk(2, 1), self.gated.even
        out = roomy(gate, self.room) if self.room else None
        return swiglu(gate, up, out) if left is None or b is None else swiglu_adapted(gate, up, left, b, out)

    def forward(self, x: Tensor, how: Pass, left: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(y [T, N], dropout(x) [T, D], s dropout(x) A' [T, R]); the last two None without adapters."""
        if not self.parts:
            if how.discard:
                return self._nothing(x), None, None
            return self._with_bias(self.product(self.input(x, left), how.scratch)), None, None
        inner = self.input(x, left)
        dropped, both = how.dropout(inner), widened(inner, self.room)
        h_TR = _scaled(dropped, self.a.t(), self.scaling, None if both is None else both[:, self.shape[1] :])
        if how.discard:
            return self._nothing(x), dropped, h_TR
        if self.fp8:
            y = self.product(inner, how.scratch)
            if not self.leaves_term:
                self.add_adapted(h_TR, y)
        else:
            y = roomy(x, 0 if how.p else self.room, self.shape[0])
            if self.leaves_term:
                matmul(inner, self.weight(how.scratch).t(), y)
            elif both is None:
                self.product(inner, how.scratch, self.adapted(h_TR, y))
            else:
                matmul(both, self.stacked(how.scratch, back=False).t(), y)
        return self._with_bias(y), dropped, h_TR

    def _nothing(self, x: Tensor) -> Tensor:
        """The output's shape without its memory."""
        return x.new_empty(()).expand(len(x), self.shape[0])

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y.add_(self.bias)

    def adapted(self, h_TR: Tensor, y: Tensor) -> Tensor:
        """h b' [T, N] in y, zero in the columns of modules without an adapter."""
        if len(self.parts) < len(self.sizes):
            y.zero_()
        if self.even is not None:
            torch.bmm(self.batch(h_TR), self.even.transpose(1, 2), out=self.batch(y))
            return y
        for columns, ranks, b in self.parts:
            torch.mm(h_TR[:, ranks], b.t(), out=y[:, columns])
        return y

    def add_adapted(self, h_TR: Tensor, y: Tensor) -> Tensor:
        """y with h b' added, in place."""
        if self.even is not None:
            return add_low_rank_(y, h_TR, self.even)
        for columns, ranks, b in self.parts:
            add_low_rank_(y[:, columns], h_TR[:, ranks], b[None])
        return y

    def rank_grad(self, grad: Tensor, dh_TR: Tensor) -> Tensor:
        """The gradient of dropout(x) a' [T, R], in `dh_TR`."""
        if self.even is not None:
            dh = self.batch(dh_TR)
            torch.baddbmm(dh, self.batch(grad), self.even, beta=0, alpha=self.scaling, out=dh)
            return dh_TR
        for columns, ranks, b in self.parts:
            _scaled(grad[:, columns], b, self.scaling, dh_TR[:, ranks])
        return dh_TR

    def output_grads(self, grad: Tensor, h_TR: Tensor) -> list[Tensor]:
        """Of each b, float32."""
        made, self.b_grads = self.b_grads, None
        if made is not None:
            return list(made)
        if self.even is not None:
            return list(_float32_product(torch.bmm, self.batch(grad).transpose(1, 2), self.batch(h_TR)))
        return [_float32_product(torch.mm, grad[:, c].t(), h_TR[:, r]) for c, r, _ in self.parts]

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
        left = None
        if group.gated:
            left, group.gated.left = group.gated.left, None
        y, dropped, h_TR = group.forward(x, how, left)
        again = group.gated is not None or (how.lean and bool(group.parts))
        if h_TR is not None and (again or dropped is not x):
            h_TR = h_TR.contiguous()  # beside a tensor that is not kept it would keep that too
        group.left = h_TR if group.leaves_term else None
        ctx.save_for_backward(x if again else dropped, h_TR, left)
        ctx.group, ctx.how, ctx.again = group, how, again
        # the backward pass is next then, and SwiGLU's own makes what it needs
        ctx.dropped = None if not how.discard or _makes(group, h_TR, how) else dropped
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, h_TR, left), group, how = ctx.saved_tensors, ctx.group, ctx.how
        dropped, ctx.dropped = ctx.dropped, None
        wanted = ctx.needs_input_grad[0]
        both = None if how.p else widened(grad, group.room)
        grads: list[Tensor] = []
        dh_TR: Any = None
        da: Any = None
        dx: Any = None
        db: list[Tensor] = []
        if group.parts:
            dh_TR = group.rank_grad(grad, h_TR.new_empty(h_TR.shape) if both is None else both[:, group.shape[0] :])
            db = group.output_grads(grad, h_TR)
            if dropped is None and not (group.gated and wanted):  # else SwiGLU's backward pass makes it
                dropped = how.dropout(group.input(x, left)) if ctx.again else x
            da = None if dropped is None else _float32_product(torch.mm, dh_TR.t(), dropped)
            del dropped
        if wanted:
            dx = _to_input(group, grad, both, dh_TR, how)
        if wanted and group.gated:
            dx, da = _through_swiglu(group, dx, x, how, dh_TR, da, left)
        for (_, ranks, _), each in zip(group.parts, db, strict=True):
            grads += [da[ranks], each]
        return dx, None, None, *grads


def _to_input(group: Group, grad: Tensor, both: Tensor | None, dh_TR: Tensor | None, how: Pass) -> Tensor:
    """The gradient in what the modules read; `both`: grad with dh_TR beside it, where it has room."""
    if _makes(group, dh_TR, how):
        return group.product(grad, how.scratch, back=True)
    if both is not None:
        return matmul(both, group.stacked(how.scratch, back=True))
    onto = None if dh_TR is None or not how.p else how.dropout(dh_TR @ group.a)
    dx = group.product(grad, how.scratch, onto, back=True)
    if dh_TR is None or onto is not None:
        return dx
    if not group.fp8:
        return dx.addmm_(dh_TR, group.a)
    return add_low_rank_(dx, dh_TR, group.a.t().contiguous()[None])  # read across, it would take twice as long


def _through_swiglu(
    group: Group, grad: Tensor, x: Tensor, how: Pass, dh_TR: Any, da: Any, left: Tensor | None
) -> tuple[Tensor, Any]:
    """(the gradient in gate and up, in their own place, since only this group reads them, and not again; a's, where
    there is one). The b's gradients of the group that made them are made on the way, if x lacks its term."""
    gate_up: Any = group.gated
    x = x.detach()
    gate, up = x.chunk(2, 1)
    above = (dh_TR, group.a) if _makes(group, dh_TR, how) else None
    below = None if left is None else (left, gate_up.even)
    missing = dh_TR is not None and da is None and above is None
    made, gate_up.b_grads = swiglu_adapted_backward(grad, gate, up, above, below, value=missing)
    if missing:
        made = _float32_product(torch.mm, dh_TR.t(), how.dropout(grad))
    return x, da if made is None else made


def _makes(group: Group, h_TR: Tensor | None, how: Pass) -> bool:
    """Whether SwiGLU's backward pass adds LoRA's term and makes a's gradient too."""
    fits = h_TR is not None and h_TR.shape[1] in RANKS and not group.shape[1] % ALIGNED
    return group.gated is not None and group.tiled and fits and not how.p


def _scaled(x: Tensor, w: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """scaling * x @ w, in one launch."""
    out = x.new_empty(len(x), w.shape[1]) if out is None else out
    return torch.addmm(out, x, w, beta=0, alpha=scaling, out=out)


def _float32_product(product: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    wide = {"out_dtype": torch.float32} if a.is_cuda and a.dtype != torch.float32 else {}
    c: Tensor = product(a, b, **wide)
    return c.float()
