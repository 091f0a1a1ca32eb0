"""Packed rows: several documents in one row without padding, attention and positions kept inside each.

The token mean over a packed row equals the token mean over the same documents in padded micro-batches, so
packing changes the speed and not the mathematics. While packed rows pass, the decoder's forward is swapped:
on a GPU for `fused.Fused` as a whole; on a CPU, and where a model is unfusable, Transformers' own decoder
layers run and only their attention function and, on a CPU, the forward of norms and PEFT's LoRA layers are ours.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlora.data.prompts import IGNORE, Example
from medlora.kernels import cpu
from medlora.kernels.attention import by_document
from medlora.kernels.cross_entropy import linear_cross_entropy
from medlora.kernels.dispatch import is_hopper
from medlora.model.base import FAMILIES
from medlora.model.fused import Fused
from medlora.model.modules import Unfusable

ATTENTION = "medlora_varlen"
Batch = dict[str, Any]
TRIAL, OFF = (64, 37), (0.2, 0.4)  # tokens of its documents; how far both ways may lie apart, without and with FP8
NOISE, LOUD = 0.02, 64.0  # as trained weights are; a factor of the loss, above where float16 rounds to zero
TRIED: WeakKeyDictionary[Any, dict[bool, str | None]] = WeakKeyDictionary()
PER_TOKEN = ("input_ids", "labels", "position_ids")  # of a batch


def unsupported(model: Any, max_length: int) -> str | None:
    """Why this model cannot take packed rows, or None if it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not of the LLaMA family ({', '.join(FAMILIES)})"
    window = getattr(config, "sliding_window", None)
    if window and window < max_length:
        return f"its attention window ({window}) is shorter than data.max_length ({max_length})"
    return _distrusted(model)


def unfused(model: Any, fp8: bool = False) -> str | None:
    """Why packed rows of this model pass through Transformers' layers, or None if through the fused ones."""
    found = _fused(model, fp8=fp8)
    return found if isinstance(found, str) else None


def _fused(model: Any, **how: Any) -> Fused | str:
    causal = causal_of(model)
    if causal.lm_head.weight.device.type != "cuda":
        return "the fused layers are for a GPU"
    try:
        fused = Fused(causal, **how)
    except Unfusable as reason:
        return str(reason)
    return (_distrusted(model, fp8=True) if fused.fp8 else None) or fused


def _distrusted(model: Any, *, fp8: bool = False) -> str | None:
    """Why the kernels are not to be used on this GPU, if there is a reason; every one's tests ran on Hopper."""
    causal = causal_of(model)
    device = causal.lm_head.weight.device
    if device.type != "cuda" or is_hopper(device):
        return None
    tried = TRIED.setdefault(causal, {})
    if fp8 not in tried:
        tried[fp8] = trial(model, fp8=fp8)
    return tried[fp8]


def trial(model: Any, *, fp8: bool = False) -> str | None:
    """What is wrong with the fused layers where this model lies, if anything: a short row passes two of them, and its
    documents, each by itself, two of Transformers'; hidden states, loss and adapters' gradients are compared.

    Raises:
        torch.OutOfMemoryError: the device is full.
    """
    decoder, training = causal_of(model).model, model.training
    every, decoder.layers = decoder.layers, decoder.layers[:2]
    weights = [p for p in decoder.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    try:
        with torch.random.fork_rng([]), torch.enable_grad():
            for p in weights:
                if not p.any():  # of a new adapter: the other half's gradients would be zero
                    p.data.copy_(torch.randn(p.shape) * NOISE)
            rows = [torch.randint(model.config.vocab_size, (n,)) for n in TRIAL]
            theirs, ours = _by_transformers(model.eval(), weights, rows), _by_fused(model, weights, rows, fp8)
    except torch.OutOfMemoryError:
        raise
    except Unfusable:  # nor do they serve then
        return None
    except Exception as error:  # whatever a compiler or driver says
        first = str(error).strip().partition("\n")[0]
        return f"a trial of the fused layers ended with {type(error).__name__}: {first}"
    finally:
        decoder.layers = every
        model.train(training)
        for p, old in zip(weights, before, strict=True):
            p.data.copy_(old)
    off = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    worst = max(off, key=lambda each: math.inf if math.isnan(each) else each)
    return None if worst <= OFF[fp8] else f"in a trial on this GPU the fused layers were {worst:.0%} off"


def _by_fused(model: Any, weights: list[nn.Parameter], rows: list[Tensor], fp8: bool) -> list[Tensor]:
    causal = causal_of(model)
    batch = pack([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows])
    with packing(model, True, fp8=fp8):
        hidden = _hidden(causal, batch)
        return _seen(weights, hidden, _summed_loss(causal, hidden, batch))


def _by_transformers(model: Any, weights: list[nn.Parameter], rows: list[Tensor]) -> list[Tensor]:
    causal = causal_of(model)
    head = causal.lm_head.weight
    with autocast_of(head):
        hidden = [
            causal.model(input_ids=row[None].to(head.device), use_cache=False).last_hidden_state[0] for row in rows
        ]
        logits = [(x[:-1].to(head.dtype) @ head.T).float() for x in hidden]
    target = torch.cat([row[1:] for row in rows]).to(head.device)
    return _seen(weights, torch.cat(hidden), F.cross_entropy(torch.cat(logits), target, reduction="sum"))


def _seen(weights: list[nn.Parameter], hidden: Tensor, loss: Tensor) -> list[Tensor]:
    """Hidden states [T, D], the loss and its gradients, float32 on the host."""
    grads = torch.autograd.grad(LOUD * loss, weights) if weights else ()
    return [x.detach().float().cpu() for x in (hidden, loss, *grads)]


def pack(examples: Sequence[Example | dict[str, Any]]) -> Batch:
    """One row: input_ids, labels, position_ids [1, T] int64, the documents' borders [0, ..., T], and how many
    tokens of each are labelled: the host knows it here, and would have to wait for a GPU to count them again."""
    rows = [e if isinstance(e, dict) else {"input_ids": e.input_ids, "labels": e.labels} for e in examples]
    labels = [[IGNORE, *row["labels"][1:]] for row in rows]  # no document foretells the next one's first token
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row["input_ids"]]]),
        "labels": torch.tensor([[i for each in labels for i in each]]),
        "labelled": [len(each) - each.count(IGNORE) for each in labels],
        "position_ids": torch.cat([torch.arange(len(each)) for each in labels])[None],
        "borders": [0, *accumulate(map(len, labels))],
    }


def split(batch: Batch, limit: int) -> list[Batch]:
    """A packed row's documents as packed rows of about equal length, as few as need no more than `limit` tokens each
    but where one document does. Does not wait for the device that the row lies on."""
    lengths = [stop - start for start, stop in pairwise(batch["borders"])]
    rows = -(-sum(lengths) // limit)
    while True:
        parts = dealt(lengths, rows)
        if rows >= len(lengths) or max(sum(lengths[d] for d in part) for part in parts) <= limit:
            return [batch] if len(parts) == 1 else [only(batch, part) for part in parts]
        rows += 1


def dealt(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Documents by index, the longest first, each to the part that has fewest tokens; parts without any left out."""
    parts: list[list[int]] = [[] for _ in range(rows)]
    totals = [0] * rows
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        least = totals.index(min(totals))
        parts[least].append(document)
        totals[least] += lengths[document]
    return [part for part in parts if part]


def only(batch: Batch, documents: list[int]) -> Batch:
    """Some of a packed row's documents as a packed row."""
    borders = batch["borders"]
    spans = [slice(borders[d], borders[d + 1]) for d in documents]
    taken = {name: torch.cat([batch[name][:, span] for span in spans], 1) for name in PER_TOKEN}
    lengths = (span.stop - span.start for span in spans)
    return taken | {"labelled": [batch["labelled"][d] for d in documents], "borders": [0, *accumulate(lengths)]}


def packed_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy float32, number of predicted tokens) of a packed row.

    `model` is a causal LM of the LLaMA family or a `PeftModel` of one, inside `packing(model)`.
    """
    causal = causal_of(model)
    return _summed_loss(causal, _hidden(causal, batch), batch), torch.tensor(sum(batch["labelled"]))


def _summed_loss(causal: Any, hidden: Tensor, batch: Batch) -> Tensor:
    head = causal.lm_head.weight
    target = batch["labels"][0, 1:].to(head.device)
    hidden = hidden[:-1].to(head.dtype)
    if head.device.type == "cpu" and not _is_fused(causal):
        predicted = (target != IGNORE).nonzero()[:, 0]
        return cpu.linear_cross_entropy(hidden.index_select(0, predicted), head, target[predicted])
    return linear_cross_entropy(hidden, head, target, IGNORE, labelled=sum(batch["labelled"]))


def _is_fused(causal: Any) -> bool:
    return isinstance(vars(causal.model).get("forward"), Fused)


def _hidden(causal: Any, batch: Batch) -> Tensor:
    """[T, D], after the final norm."""
    head = causal.lm_head.weight
    with nullcontext() if _is_fused(causal) else autocast_of(head):
        out = causal.model(
            input_ids=batch["input_ids"].to(head.device),
            position_ids=batch["position_ids"].to(head.device),
            use_cache=False,
            borders=batch["borders"],
        )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


@contextmanager
def packing(model: Any, fuse: bool | None = None, **how: Any) -> Iterator[Fused | None]:
    """Route packed rows through medlora's kernels, yielding the fused layers where they serve; put everything back
    at the end.

    Args:
        fuse: whether the fused layers serve; by default on a GPU, where the model allows it.
        how: how the fused layers compute; see `Fused`.

    Raises:
        Unfusable: `fuse` is true and the model does not allow it.
    """
    fused = _fused(model, **how) if fuse is None else Fused(causal_of(model), **how) if fuse else "not asked for"
    if isinstance(fused, str):
        with _unfused_packing(model):
            yield None
        return
    decoder = causal_of(model).model
    decoder.forward = fused
    try:
        yield fused
    finally:
        del decoder.forward
        fused.close()


@contextmanager
def _unfused_packing(model: Any) -> Iterator[None]:
    from peft.tuners.lora import Linear
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    before = model.config._attn_implementation
    lora = [m for m in model.modules() if isinstance(m, Linear) and _fusable(m)]
    norms = [m for m in model.modules() if hasattr(m, "variance_epsilon") and _frozen_on_cpu(m.weight)]
    model.config._attn_implementation = ATTENTION
    for module in lora:
        module.forward = _lora_forward.__get__(module)
    for norm in norms:
        norm.forward = partial(cpu.rms_norm, w=norm.weight, eps=norm.variance_epsilon)
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for module in lora + norms:
            del module.forward


def causal_of(model: Any) -> Any:
    """The causal LM itself, below an adapter or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: None,
    *,
    scaling: float,
    borders: list[int],
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: q [1, H, T, C], k, v [1, K, T, C] -> [1, T, H, C]."""
    if q.device.type == "cpu":
        return cpu.varlen_attention(q[0], k[0], v[0], borders, scaling).transpose(0, 1)[None], None
    return by_document(q, k, v, borders, scaling).transpose(1, 2), None


def _fusable(module: Any) -> bool:
    return type(module.base_layer) is nn.Linear and _frozen_on_cpu(module.base_layer.weight)


def _frozen_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and not weight.requires_grad


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = self.base_layer
    if self.disable_adapters or "default" not in self.active_adapters:
        return F.linear(x, base.weight, base.bias)
    drop = self.lora_dropout["default"]
    p = drop.p if self.training and isinstance(drop, nn.Dropout) else 0.0
    a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
    y = cpu.lora_linear(x, base.weight, a, b, self.scaling["default"], p)
    return y if base.bias is None else y + base.bias


def autocast_of(head: Tensor) -> torch.autocast:
    """On a GPU PEFT's own layers run, whose float32 adapters need autocast beside a base of half the width."""
    narrow = head.dtype if head.dtype == torch.float16 else torch.bfloat16
    return torch.autocast(head.device.type, dtype=narrow, enabled=head.is_cuda and head.dtype == narrow)
