"""A run's model as files for other tools: a folder that Transformers, vLLM and others read, or one GGUF file."""

import shutil
import tempfile
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from medlora.data.build import read_records
from medlora.data.prompts import Example, Tokenizer, encode, fit
from medlora.errors import DataError, ModelError
from medlora.evaluate.loss import held_out_loss
from medlora.export.card import Check, about, card
from medlora.export.gguf import require_equal, write_gguf
from medlora.export.merge import merge, stored_dtype
from medlora.model.adapter import base_of, find_adapter, load_adapter, own_tokenizer
from medlora.model.base import Resolved, load_config, load_tokenizer, resolve
from medlora.model.load import compute_dtype, device, load_model
from medlora.model.memory import free_bytes
from medlora.recipe import Base, load_recipe
from medlora.train import manifest as manifests

CHECKED = 4096  # tokens
WORSE = 0.01  # share by which the loss may rise
GGUF = ".gguf"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "q8_0": 34 / 32}
"""A weight's."""


@dataclass(frozen=True, slots=True)
class Exported:
    path: Path
    dtype: str
    check: Check | None
    unchecked: str
    """Why there is no check."""


def export(
    source: Path,
    output: Path,
    dtype: str = "auto",
    *,
    onto_nf4: bool = False,
    check: bool = True,
    say: Callable[[str], None] = print,
) -> Exported:
    """Merge the adapter of a run (or an adapter folder) into `output`: a GGUF file where that ends in .gguf, else a
    folder with a model card. Nothing lies there unless all of it does.

    Args:
        dtype: `auto` (that of the base's files), a dtype, or for GGUF q8_0: 8 bits, with a scale for 32 numbers.
        onto_nf4: as `merge`.
        check: measure held-out rows of the run, some 4,096 tokens, by the adapter and by what was written.

    Raises:
        ModelError: as `merge` and `write_gguf`; `output` exists; or the loss rises by more than 1 %.
        DataError: the run's data cannot be read again.
    """
    adapter = find_adapter(source)
    run = adapter.parent if (adapter.parent / manifests.NAME).is_file() and adapter.name == "adapter" else None
    base = base_of(adapter)
    resolved = resolve(base)
    config = load_config(resolved)
    stored = stored_dtype(config) if dtype in ("auto", "q8_0") else dtype
    dtype = stored if dtype == "auto" else dtype
    tokenizer = load_tokenizer(resolved, own_tokenizer(adapter))
    _refuse(output, dtype, config, tokenizer)
    told = about(run, adapter, base)
    rows = _held_out(run, tokenizer) if check and run else []
    _make(output.parent)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=output.parent) as work:
        made = Path(work) / output.name
        say(f"Merging into {resolved.path}")
        model = merge(adapter, base, resolved, tokenizer, stored, onto_nf4)
        numbers = model.num_parameters()
        _require_room(output, numbers * BYTES[dtype])
        if output.suffix == GGUF:
            write_gguf(made, model, tokenizer, dtype, told.name, told.sentence)
        else:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        del model
        unchecked = _unchecked(check, rows, numbers, base)
        found = None if unchecked else _check(made, output, adapter, base, resolved, rows)
        if made.is_dir():
            (made / "README.md").write_text(card(told, dtype, found, onto_nf4=onto_nf4), encoding="utf-8")
        made.replace(output)
    return Exported(output, dtype, found, unchecked)


def _refuse(output: Path, dtype: str, config: Any, tokenizer: Tokenizer) -> None:
    """What needs no weights to be known."""
    if output.exists():
        raise ModelError(f"{output}: exists already; name another file or folder")
    if output.suffix == GGUF:
        require_equal(config, tokenizer)
    elif dtype == "q8_0":
        raise ModelError(f"{output}: q8_0 is a type of GGUF files; name one that ends in {GGUF}, or another --dtype")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be made: {error.strerror}; name another place") from None


def _require_room(output: Path, needed: float) -> None:
    """Safetensors tell a full disk by an error of their own."""
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ModelError(f"{output}: takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; write elsewhere")


def _held_out(run: Path, tokenizer: Tokenizer) -> list[Example]:
    """Rows that the run held out, in order, up to CHECKED tokens; none where it held out none."""
    recipe = load_recipe(run / "recipe.yaml")
    try:
        valid = read_records(recipe).valid
    except DataError as error:
        raise DataError(f"{error}; without the run's data, --no-check exports what cannot be measured") from None
    if not valid:
        return []
    fitted = fit(encode(tokenizer, valid, recipe.prompt), recipe.data.max_length, recipe.data.on_long_row).examples
    ends = list(accumulate(len(example.input_ids) for example in fitted))
    return fitted[: max(1, bisect(ends, CHECKED))]


def _unchecked(asked: bool, rows: list[Example], numbers: int, base: Base) -> str:
    """Why the files are not measured, or nothing."""
    if not asked:
        return "--no-check"
    if not rows:
        return "no held-out rows lie beside the adapter"
    on = device()
    needed, free = numbers * compute_dtype(base, on).itemsize, free_bytes(on)
    if needed > free:
        return f"it takes {needed / 2**30:.1f} GiB, and {on} has {free / 2**30:.1f} free"
    return ""


def _check(made: Path, output: Path, adapter: Path, base: Base, resolved: Resolved, rows: list[Example]) -> Check:
    plain = Base(model=str(made), quantization="none", compute_dtype=base.compute_dtype)
    before = held_out_loss(load_adapter(load_model(resolved, base), adapter, resolved), rows, "Held-out loss, adapter")
    after = held_out_loss(load_model(resolve(plain), plain), rows, "Held-out loss, exported")
    if not after.loss <= (1 + WORSE) * before.loss:  # nor if it is no number
        raise ModelError(
            f"{output}: not written: held-out loss {after.loss:.3f}, and {before.loss:.3f} by the adapter on its base; "
            "try --onto-nf4 and --dtype float16 or float32, use the adapter as it is, or --no-check"
        )
    return Check(before, after)
