"""The weights of a LLaMA-family model as decoding reads them: linear modules that share an input are one product.

A decoded token reads every weight once, so bytes are time. On a GPU the 4-bit codes are what is read. On a CPU a
float32 product of one row runs at the speed of memory on one core; weights that half precision holds as they are
(NF4 values and anything that came from bfloat16, which is to say nearly every base) are kept in float16 and multiplied
in float32 by FBGEMM, which halves the bytes and uses every core. The sums stay float32.

Codes and plain weights are laid side by side once, and the modules' own tensors become views of that: no second copy.
LoRA stays unmerged, so that one base answers with any of its adapters and with none. Adapters of a product are stacked
to one A [s n R, D] and one B [N, s n R] (s adapters, n modules, R the largest rank); a mask [T, s n R] picks each
row's own.

Shapes: T rows, D inputs, N outputs of a product.
"""

# torch leaves Tensor.split untyped
# mypy: allow-untyped-calls
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlora.kernels.nf4 import DoubleQuant, dequantize_nf4
from medlora.kernels.swiglu import swiglu


class Unknown(Exception):
    """The engine does not know this model; the message says why."""


class Weight(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> x W' + bias [T, N]."""


class Dense(NamedTuple):
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Half(NamedTuple):
    """float16 weights packed by FBGEMM, float32 sums."""

    packed: Any

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return y


class Nf4(NamedTuple):
    """bitsandbytes' codes, dequantised for each product: for many rows."""

    bases: list[Any]
    double: list[DoubleQuant | None]
    shape: tuple[int, int]
    bias: Tensor | None
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)

    def dense(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.bases[0].weight.device)
        rows = out.split([base.out_features for base in self.bases])
        for base, double, part in zip(self.bases, self.double, rows, strict=True):
            dequantize_nf4(base.weight.data, base.weight.quant_state.absmax, part, double)
        return out


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
        shape = (sum(base.out_features for base in bases), bases[0].in_features)
        try:
            double = [DoubleQuant.of(base.weight.quant_state) for base in bases]
        except ValueError as error:
            raise Unknown(str(error)) from None
        return Nf4(list(bases), double, shape, bias, dtype)
    for base in bases:
        if type(base) is not nn.Linear or base.weight.dtype != dtype:
            raise Unknown(f"{type(base).__name__} in {base.weight.dtype} is neither NF4 nor a plain {dtype} weight")
    return half(bases, bias) or Dense(side_by_side(bases), bias)


def half(bases: Sequence[Any], bias: Tensor | None) -> Half | None:
    """Packed float16, where a CPU has the product and no weight moves by more than the rounding of the largest."""
    weight = bases[0].weight
    if weight.is_cuda or weight.dtype != torch.float32 or "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    whole = torch.cat([base.weight.data for base in bases])
    error = (whole.half().float() - whole).abs_().max()
    if not error <= whole.abs().max() * 2**-24:
        return None
    return Half(torch.ops.quantized.linear_prepack_fp16(whole, bias))


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
    """Which adapter each row of a pass takes: `slots`, one a row, -1 for none, on the host and on the device."""

    def __init__(self, slots: Sequence[int], adapters: int, device: torch.device) -> None:
        self.any = any(slot >= 0 for slot in slots)
        self.mixed = adapters > 1 or any(slot < 0 for slot in slots)
        self.slots = torch.tensor(slots, dtype=torch.int32).to(device)
        self.adapters, self._masks = adapters, dict[tuple[int, torch.dtype], Tensor]()

    def mask(self, ranks: int, dtype: torch.dtype) -> Tensor:
        """[T, adapters * ranks] of ones and zeros; `ranks` columns an adapter."""
        if (ranks, dtype) not in self._masks:
            own = self.slots[:, None] == torch.arange(self.adapters, device=self.slots.device)
            self._masks[ranks, dtype] = own.repeat_interleave(ranks, 1).to(dtype)
        return self._masks[ranks, dtype]


class Projection:
    """One product: y = x W' + the chosen adapter's scaling x A' B'.

    With `gated` the input is [T, 2 D], gate beside up, and the product reads silu(gate) * up.

    Raises:
        Unknown: as `weight_of`, or an adapter that is a variant of LoRA or is merged.
    """

    def __init__(
        self, modules: Sequence[Any], names: Sequence[str], dtype: torch.dtype, *, gated: bool = False
    ) -> None:
        bases = [getattr(module, "base_layer", module) for module in modules]
        self.weight, self.gated = weight_of(bases, dtype), gated
        found = [[_lora(module, name) for module in modules] for name in names]
        self.ranks = max((len(lora.a) for row in found for lora in row if lora), default=0)
        n, device = len(modules), bases[0].weight.device
        columns = len(names) * n * self.ranks
        self.a = torch.zeros(columns, bases[0].in_features, dtype=dtype, device=device)
        self.b = torch.zeros(sum(base.out_features for base in bases), columns, dtype=dtype, device=device)
        self.per_adapter = n * self.ranks
        self.copies: list[tuple[Tensor, Tensor, float]] = []
        rows = self.b.split([base.out_features for base in bases])
        for i, lora in enumerate(lora for row in found for lora in row):
            if lora:
                ranks = slice(i * self.ranks, i * self.ranks + len(lora.a))
                self.copies.append((self.a[ranks], lora.a, 1.0))
                self.copies.append((rows[i % n][:, ranks], lora.b, lora.scaling))

    def __call__(self, x: Tensor, choice: Choice, residual: Tensor | None = None) -> Tensor:
        """x [T, D] -> [T, N], added to `residual` [T, N] if given."""
        if self.gated:
            x = gated(x)
        y = self.weight(x)
        if self.ranks and choice.any:
            h_TR = x @ self.a.t()
            if choice.mixed:
                h_TR = h_TR * choice.mask(self.per_adapter, x.dtype)
            y.addmm_(h_TR, self.b.t())
        return y if residual is None else y.add_(residual)

    def refresh(self) -> None:
        """Take the trained tensors over."""
        for to, master, scaling in self.copies:
            to.copy_(master.detach() * scaling)


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up of gate beside up [T, 2 F]."""
    gate, up = x.chunk(2, 1)
    return swiglu(gate, up) if x.is_cuda else F.silu(gate).mul_(up)


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
