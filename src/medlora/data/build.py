"""From a recipe to train and held-out examples, with every row accounted for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from medlora.data.identifiers import Found, search
from medlora.data.prompts import Example, Tokenizer, encode, fit
from medlora.data.sources import Raw, Record, load
from medlora.data.split import fingerprint, refuse_overlap, split
from medlora.errors import DataError
from medlora.recipe import Columns, Recipe


@dataclass(frozen=True, slots=True)
class Corpus:
    train: list[Example]
    valid: list[Example]
    bad: list[Raw]
    long: int
    policy: str
    fingerprint: str
    """sha256 of the train and held-out records, before tokenization."""
    columns: tuple[Columns, ...] = ()
    """Those that the rows were recognised by."""
    identifiers: Found = field(default_factory=Found)
    """In the rows, or, where they are dropped, in those that were."""
    drops: bool = False
    """Whether rows with identifiers are left out."""

    @property
    def train_tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.train)

    def summary(self) -> list[str]:
        """Lines that account for every row."""
        trained = sum(example.trained for example in self.train)
        lines = [
            f"{len(self.train):,} rows to train on ({self.train_tokens:,} tokens, {trained:,} with loss), "
            f"{len(self.valid):,} held out"
        ]
        for columns in self.columns:
            named = columns.model_dump(exclude_none=True).items()
            lines.append("columns recognised: " + ", ".join(f"{what} from {name!r}" for what, name in named))
        if self.bad:
            shown = "; ".join(f"{raw.where}: {raw.why}" for raw in self.bad[:3])
            lines.append(f"left out {len(self.bad):,} bad rows: {shown}{'; ...' * (len(self.bad) > 3)}")
        if self.long:
            verb = {"drop": "dropped", "split": "split", "truncate": "truncated"}[self.policy]
            lines.append(f"{verb} {self.long:,} rows longer than data.max_length")
        if self.identifiers.rows:
            left_out = "left out " if self.drops else ""
            lines.append(f"{left_out}{self.identifiers.describe()}; see data.on_identifiers")
        return lines


class Records(NamedTuple):
    """Before tokenization."""

    train: list[Record]
    valid: list[Record]
    bad: list[Raw]
    columns: tuple[Columns, ...]
    """Those that the rows were recognised by."""
    dropped: Found
    """Rows that were left out for identifiers."""


def read_records(recipe: Recipe) -> Records:
    """What a recipe's data holds.

    Raises:
        DataError: as `sources.load`, `split.split` and `split.refuse_overlap`; or all rows were dropped.
    """
    source = load(recipe.data)
    bad, columns, dropped = source.bad, source.columns, Found()
    if recipe.data.valid_path:
        held = load(recipe.data, recipe.data.valid_path)
        train, valid, bad = source.records, held.records, bad + held.bad
        columns = tuple(dict.fromkeys([*columns, *held.columns]))
        refuse_overlap(train, valid)
    else:
        train, valid = split(source.records, recipe.data.valid_fraction, recipe.data.split_seed)
    if recipe.data.on_identifiers == "drop":  # from either side: a report shows held-out rows
        dropped = search([*train, *valid])
        train, valid = ([r for r in records if r.where not in dropped.rows] for records in (train, valid))
        if not train:
            raise DataError(f"no row is left: {dropped.describe()}; set data.on_identifiers to report")
    return Records(train[: recipe.data.max_rows], valid[: recipe.evaluation.max_rows], bad, columns, dropped)


def build(recipe: Recipe, tokenizer: Tokenizer) -> Corpus:
    """Everything a run learns from and is measured on. No weights are needed yet.

    Raises:
        DataError: as `read_records`, `prompts.encode` and `prompts.fit`; or identifiers that the recipe refuses.
    """
    train, valid, bad, columns, dropped = read_records(recipe)
    data = recipe.data
    identifiers = search([*train, *valid]) if data.on_identifiers in ("report", "error") else dropped
    if data.on_identifiers == "error" and identifiers.rows:
        raise DataError(f"{identifiers.describe()}; look at them, or set data.on_identifiers to report, drop or ignore")
    fitted = fit(encode(tokenizer, train, recipe.prompt), data.max_length, data.on_long_row)
    held = fit(encode(tokenizer, valid, recipe.prompt), data.max_length, data.on_long_row) if valid else None
    return Corpus(
        train=fitted.examples,
        valid=held.examples if held else [],
        bad=bad,
        long=fitted.long + (held.long if held else 0),
        policy=data.on_long_row,
        fingerprint=fingerprint([*train, *valid]),
        columns=columns,
        identifiers=identifiers,
        drops=data.on_identifiers == "drop",
    )


def preview(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(token text, has loss) for each token of a row."""
    pieces = tokenizer.convert_ids_to_tokens(example.input_ids)
    shown = [str(piece).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\\n") for piece in pieces]
    return [(piece, label != -100) for piece, label in zip(shown, example.labels, strict=True)]


def to_dataset(examples: Sequence[Example]) -> "object":
    """A `datasets.Dataset` with `input_ids` and `labels`."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]})
