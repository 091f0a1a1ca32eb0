"""The weights of a LLaMA-family model as decoding reads them: linear modules that share an input are one product.

A decoded token reads every weight once, so bytes are time. On a GPU the 4-bit codes are what is read. On a CPU a
float32 product of one row runs at the speed of memory on one core; weights that half precision holds as they are
(NF4 values and anything that came from bfloat16, which is to say nearly every base) are kept in float16 and multiplied
in float32 by FBGEMM, which halves the bytes and uses every core. The sums stay float32. It takes half the time of a
bfloat16 product of few rows too, so a CPU with those keeps both forms of a small model: one for prompts, one for steps
of any size. What a row gets must not depend on its company, which of a CPU's products only FBGEMM's keeps: steps have
adapters in float16 too, whose rounding is an eighth of bfloat16's but for values below 6e-5.

Codes, plain weights and adapters that nobody trains are laid side by side once, and the modules' own tensors become
views of that: no second copy.
LoRA stays unmerged, so that one base answers with any of its adapters and with none, each row with its own.

Shapes: T rows, D inputs, N outputs of a product; S adapters, G modules, R the largest rank.
"""

# torch leaves Tensor.split untyped
# mypy: allow-untyped-calls
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlora.kernels.nf4 import store_scales, stored_scales
from medlora.kernels.nf4_batch import MAX_ROWS as BATCH_ROWS
from medlora.kernels.nf4_batch import nf4_batch, serves
from medlora.kernels.nf4_linear import MAX_ROWS, LoraTerms, NF4Weights, nf4_linear, padded_rank
from medlora.kernels.rms_norm import rms_norm
from medlora.kernels.swiglu import swiglu

LEAN = 2**24  # weights dequantised at a time where memory is short: 32 MiB in 16 bits
Norm = tuple[Tensor, float]
"""Weight [D] and epsilon of an RMSNorm."""


class Unknown(Exception):
    """The engine does not know this model; the message says why."""


class Weight(Protocol):
    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x [T, D] -> x W' + bias [T, N], added to `onto` in its place where that is given."""


class Dense(NamedTuple):
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if onto is None:
            return F.linear(x, self.weight, self.bias)
        y = onto.addmm_(x, self.weight.t())
        return y if self.bias is None else y.add_(self.bias)


class Half(NamedTuple):
    """float16 weights packed by FBGEMM, float32 sums."""

    packed: Any

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> "Half":
        """From float32 [N, D], rounded."""
        return cls(torch.ops.quantized.linear_prepack_fp16(weight, bias))

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return y if onto is None else onto.add_(y)


class Nf4:
    """bitsandbytes' codes: read as they are for few rows and for a batch, dequantised for many.

    The modules' own tensors become views of codes and scales side by side, so that there is one copy.
    """

    def __init__(self, bases: Sequence[Any], bias: Tensor | None, dtype: torch.dtype) -> None:
        states = [base.weight.quant_state for base in bases]
        self.codes = NF4Weights.of([base.weight.data for base in bases], states)
        self.pieces, self.by_pieces = self.codes.pieces(LEAN), False
        """Whether prompts have them dequantised piece by piece."""
        self.bias, self.dtype = bias, dtype
        self.kept: Tensor | None = None
        """[N, D], where memory allowed to dequantise for good."""
        blocks = self.codes.absmax.flatten().split([stored_scales(state).numel() for state in states])
        for base, state, part, scales in zip(bases, states, self.codes.parts(), blocks, strict=True):
            base.weight.data = part
            if state.nested == (self.codes.double is not None):
                store_scales(state, scales)

    def reads_codes(self, x: Tensor) -> bool:
        return len(x) <= MAX_ROWS and self.bias is None

    def reads_batch(self, x: Tensor) -> bool:
        """Whether nf4_batch serves, which is faster than kept weights too: bench/kernels_decode.py."""
        return len(x) <= BATCH_ROWS and self.bias is None and serves(x.device, self.dtype)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if self.kept is not None:
            return Dense(self.kept, self.bias)(x, onto)
        y, first = x.new_empty(len(x), self.codes.N) if onto is None else onto, 0
        for piece in self.pieces if self.by_pieces else (self.codes,):
            w = piece.dequantize(torch.empty(piece.N, piece.D, dtype=self.dtype, device=x.device))
            torch.addmm(columns := y[:, first : first + piece.N], x, w.t(), beta=int(onto is not None), out=columns)
            first += piece.N
        return y if self.bias is None else y.add_(self.bias)


def weight_of(bases: Sequence[Any], dtype: torch.dtype) -> Weight:
    """The fastest form of linear modules that read one input.

    Raises:
        Unknown: they are neither plain weights in `dtype` nor NF4.
    """
    biases = [base.bias for base in bases]
    if any(b is None for b in biases) != all(b is None for b in biases):
        raise Unknown("only some of the modules that share an input have a bias")
    bias = None if biases[0] is None else torch.cat([b.data for b in biases]).to(dtype)
    if hasattr(bases[0].weight, "quant_state"):
        try:
            return Nf4(bases, bias, dtype)
        except ValueError as error:
            raise Unknown(str(error)) from None
    packed = half(bases, bias) if dtype == torch.float32 else None
    if packed:
        return packed
    for base in bases:
        if type(base) is not nn.Linear or base.weight.dtype != dtype:
            raise Unknown(f"{type(base).__name__} in {base.weight.dtype} is neither NF4 nor a plain {dtype} weight")
    return Dense(side_by_side(bases), bias)


def half(bases: Sequence[Any], bias: Tensor | None) -> Half | None:
    """Packed float16, where a CPU has the product and no weight moves by more than the rounding of the largest."""
    if bases[0].weight.is_cuda or "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    whole = torch.cat([base.weight.data for base in bases]).float()
    error = (whole.half().float() - whole).abs_().max()
    if not error <= whole.abs().max() * 2**-24:
        return None
    return Half.of(whole, bias)


def stack(bases: Sequence[Any], a: Tensor) -> Half:
    """Weights with every a below them, so that one product gives what both make of a row."""
    biases = [base.bias.data.float() for base in bases if base.bias is not None]
    bias = torch.cat([*biases, a.new_zeros(len(a))]) if biases else None
    return Half.of(torch.cat([*(base.weight.data.float() for base in bases), a]), bias)


def side_by_side(bases: Sequence[Any]) -> Tensor:
    """[N, D] of plain weights, which become views of it."""
    if len(bases) == 1:
        single: Tensor = bases[0].weight.data
        return single
    whole = torch.cat([base.weight.data for base in bases])
    for base, rows in zip(bases, whole.split([base.out_features for base in bases]), strict=True):
        base.weight.data = rows
    return whole


class Choice:
    """Which adapter each row of a pass takes.

    Args:
        slots: one a row, -1 for none; None where they may change behind the host's back, in `on_device`.
        step: the pass takes conversations a step further, rather than reading prompts.
    """

    def __init__(self, slots: Sequence[int] | None, on_device: Tensor, *, step: bool = False) -> None:
        self.step = step
        self.slots = on_device
        self.any = slots is None or any(slot >= 0 for slot in slots)
        self.same = slots[0] if slots and len(set(slots)) == 1 else None
        self.found: dict[int, Tensor] = {}
        """What `rows_of` found in this pass."""

    def rows_of(self, table: Tensor) -> Tensor:
        """Of a table [S + 1, n] each row's line [T, n], or the line [n] that all take; looked up once a pass."""
        if self.same is not None:
            return table[self.same]
        if id(table) not in self.found:
            self.found[id(table)] = table[self.slots]
        return self.found[id(table)]


class Projection:
    """One product: y = f(x) W' + the chosen adapter's scaling f(x) A' B' + residual.

    f is a norm where one is given; with `gated` the modules are gate and up, and silu(gate) * up comes out.

    Args:
        for_steps: whether steps go through float32 and weights of their own in `Half`, where those are exact.
        stacked: these are such weights.

    Raises:
        Unknown: as `weight_of`, or an adapter that is a variant of LoRA or is merged.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        names: Sequence[str],
        dtype: torch.dtype,
        *,
        gated: bool = False,
        for_steps: bool = False,
        stacked: bool = False,
    ) -> None:
        bases = [getattr(module, "base_layer", module) for module in modules]
        self.weight, self.gated = weight_of(bases, dtype), gated
        self.for_steps: Projection | None = None
        if for_steps and not isinstance(self.weight, Nf4):
            with suppress(Unknown):
                self.for_steps = Projection(modules, names, torch.float32, gated=gated, stacked=True)
        sizes, device = [base.out_features for base in bases], bases[0].weight.device
        found = [[_lora(module, name) for module in modules] for name in names]
        S, G = len(names), len(modules)
        r = max((len(lora.a) for row in found for lora in row if lora), default=0)
        R = self.ranks = padded_rank(r) if isinstance(self.weight, Nf4) else r
        self.a = torch.zeros(S, G * R, bases[0].in_features, dtype=dtype, device=device)
        self.b = torch.zeros(S, sum(sizes), R, dtype=dtype, device=device)
        self.scaling = torch.tensor([[lora.scaling if lora else 0.0 for lora in row] for row in found]).to(device)
        every = torch.block_diag(*self.scaling.repeat_interleave(R, 1)).view(S, S * G * R) if S else self.scaling
        self.factors = torch.cat([every, every.new_zeros(1, S * G * R)]).to(dtype) if S else every
        """[S + 1, S G R]: of each rank, by the row's adapter; the last line, -1, is for none."""
        self.wide: Tensor | None = None
        """Kept weights and below them every a, [N + S G R, D]: one product gives what both make of x."""
        self.block = self.b.new_zeros(S * G * R, sum(sizes)) if R and isinstance(self.weight, Half) else None
        """Every b', each in its module's columns: on a CPU a product costs its call, not its zeros."""
        self.stacked = bases if stacked and self.block is not None else None
        self.half_block: Half | None = None
        """`block` in float16, once `weight` has every a below it."""
        scalings = set(self.scaling.flatten().tolist()) - {0.0}
        self.scale = scalings.pop() if S == 1 == len(scalings) and device.type == "cuda" else None
        """Of all ranks, which a prompt's products with b take along; a CPU's rows must not hang on their company."""
        alike = S == 1 and (device.type == "cuda" or dtype == torch.float32)  # else oneDNN refuses the strides
        self.sizes, self.batched = sizes, _every_nth(found[0], sizes, r) if alike else None
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.parts: list[tuple[slice, slice, Tensor]] = []
        """(columns of y, ranks, b) of each adapted module."""
        for s, row in enumerate(found):
            columns = 0
            for g, (lora, size) in enumerate(zip(row, sizes, strict=True)):
                if lora:
                    r, first = len(lora.a), (s * G + g) * R
                    b = self.b[s, columns : columns + size, :r]
                    if self.block is not None:
                        b = self.block[first : first + r, columns : columns + size].t()
                    self.parts.append((slice(columns, columns + size), slice(first, first + r), b))
                    self.copies += [(self.a[s, g * R : g * R + r], lora.a), (b, lora.b)]
                columns += size
        for to, master in self.copies:
            if master.dtype == dtype and not master.requires_grad and to.stride(1) == 1:
                master.data = to.copy_(master)

    def __call__(
        self, x: Tensor, choice: Choice, *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x [T, D] -> [T, N], or [T, N / 2] if gated; `residual` [T, N] may be overwritten."""
        adapted = self.ranks > 0 and choice.any
        if isinstance(self.weight, Nf4):
            codes = self.weight.codes
            terms = LoraTerms(self.a, self.b, self.scaling, choice.slots) if adapted else None
            if self.weight.reads_codes(x):
                return nf4_linear(x, codes, terms, norm=norm, gated=self.gated, residual=residual)
            if choice.step and self.weight.reads_batch(x):
                y = nf4_batch(x, codes, terms, norm=norm, residual=residual, out=residual)
                return gated(y) if self.gated else y
        if self.for_steps and choice.step:
            wide = x.float() if norm is None else F.rms_norm(x.float(), x.shape[1:], norm[0].float(), norm[1])
            y = self.for_steps(wide, choice).to(x.dtype)
            return y if residual is None else residual.add_(y)
        x = rms_norm(x, *norm) if norm else x
        if self.half_block:
            y, h_TR = self.weight(x).tensor_split([sum(self.sizes)], 1)
            if adapted:
                y = self.half_block(h_TR * choice.rows_of(self.factors), y)
            return gated(y) if self.gated else y
        if adapted and self.wide is not None:
            y, h_TR = F.linear(x, self.wide).tensor_split([sum(self.sizes)], 1)
            self._add(y, h_TR, choice)
            y = y if residual is None else residual.add_(y)
        else:
            y = self.weight(x, residual)
            if adapted:
                self._add(y, x @ self.a.flatten(0, 1).t(), choice)
        return gated(y) if self.gated else y

    def _add(self, y: Tensor, h_TR: Tensor, choice: Choice) -> None:
        scale = self.scale if choice.same == 0 else None
        if scale is None:
            h_TR *= choice.rows_of(self.factors)
            scale = 1.0
        if self.block is not None:
            y.addmm_(h_TR, self.block)
            return
        if self.batched:
            add_alike(y, h_TR, self.b[0], len(self.sizes), self.batched, scale)
            return
        for columns, ranks, b in self.parts:
            y[:, columns].addmm_(h_TR[:, ranks], b.t(), alpha=scale)

    def keep(self) -> None:
        """Dequantise NF4 weights for good."""
        assert isinstance(self.weight, Nf4)
        codes, every = self.weight.codes, self.a.flatten(0, 1)
        wide = self.a.new_empty(codes.N + len(every), codes.D)
        self.weight.kept = codes.dequantize(wide[: codes.N])
        if len(every) % 8 == 0 and self.weight.bias is None:  # else rows would not begin where vector loads do
            self.wide = wide
            self._refresh_wide()

    def _refresh_wide(self) -> None:
        if self.wide is not None:
            self.wide[sum(self.sizes) :] = self.a.flatten(0, 1)

    def refresh(self) -> None:
        """Take the trained tensors over."""
        for to, master in self.copies:
            to.copy_(master.detach())
        self._refresh_wide()
        if self.stacked and self.block is not None:
            self.half_block = Half.of(self.block.t().contiguous())
            self.weight = stack(self.stacked, self.a.flatten(0, 1))
        if self.for_steps:
            self.for_steps.refresh()


def _every_nth(loras: "Sequence[_Lora | None]", sizes: Sequence[int], R: int) -> slice | None:
    """Which modules have an adapter, if they are several of one shape at even steps among modules of one size."""
    which = [g for g, lora in enumerate(loras) if lora]
    if len(which) < 2 or len(set(sizes)) > 1 or any(lora and len(lora.a) < R for lora in loras):
        return None
    even = range(which[0], which[-1] + 1, which[1] - which[0])
    return slice(even.start, even.stop, even.step) if list(even) == which else None


def add_alike(y: Tensor, h: Tensor, b: Tensor, modules: int, which: slice = slice(None), scale: float = 1.0) -> None:
    """y [T, G N] += scale h [T, G R] b' of b [G N, R], module by module of one size, as one product."""
    y_GTN, h_GTR = (t.unflatten(1, (modules, -1)).transpose(0, 1)[which] for t in (y, h))
    y_GTN.baddbmm_(h_GTR, b.unflatten(0, (modules, -1))[which].transpose(1, 2), alpha=scale)


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up of gate beside up [T, 2 F]; on a GPU in gate's place."""
    gate, up = x.chunk(2, 1)
    return swiglu(gate, up, gate) if x.is_cuda else F.silu(gate).mul_(up)


class _Lora(NamedTuple):
    a: Tensor
    b: Tensor
    scaling: float


def _lora(module: Any, name: str) -> _Lora | None:
    if not hasattr(module, "base_layer"):
        return None
    if not hasattr(module, "lora_A"):
        raise Unknown(f"{type(module).__name__} is not LoRA")
    if module.merged:
        raise Unknown("an adapter is merged into the base")
    if name in module.lora_variant or module.lora_bias.get(name):
        raise Unknown("an adapter is a variant of LoRA (DoRA, biases, ...)")
    if name not in module.lora_A:
        return None
    return _Lora(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
