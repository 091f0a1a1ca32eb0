"""What a task is made of, and how its rows are read from a file or from the hub."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from medlora.data.prompts import IGNORE, Example, Tokenizer, encode, fit
from medlora.data.sources import Record, decoded, parquet_rows
from medlora.errors import DataError
from medlora.recipe import Recipe

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Kind = Literal["loss", "choice", "letter", "answer", "memory"]
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice:
    """A question with options, exactly one of them right."""

    id: str
    question: str
    """As a reader needs it, with its abstract where it has one, without the options."""
    texts: tuple[str, ...]
    """The options as a reader sees them."""
    answer: int
    """Index of the right option, from 0."""
    group: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    """What the model sees before an option."""
    options: tuple[str, ...] = ()
    """What is scored after the prompt and a space: letters, or the options themselves."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A text to predict, or a conversation whose last turn is predicted or answered."""

    id: str
    record: Record
    group: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.record.content

    def examples(self, tokenizer: Tokenizer, recipe: Recipe) -> list[Example]:
        """Token ids and labels, as in training; none where the recipe drops a row of this length.

        Raises:
            DataError: as `prompts.encode`; a row that is too long, with `on_long_row: error`.
        """
        rows = encode(tokenizer, [self.record], recipe.prompt)
        fits = len(rows[0].input_ids) <= recipe.data.max_length
        if not fits and recipe.data.on_long_row == "drop":
            return []
        return fit(rows, recipe.data.max_length, recipe.data.on_long_row).examples


@dataclass(frozen=True, slots=True)
class Text(Passage):
    """Plain text, every token predicted, the first one from the begin or else the end token.

    A text longer than the recipe's `max_length` is scored in windows of that length.
    """

    def examples(self, tokenizer: Tokenizer, recipe: Recipe) -> list[Example]:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = list(tokenizer(self.text, add_special_tokens=False)["input_ids"])
        whole = Example(self.id, [first, *ids], [IGNORE, *ids])
        return fit([whole], recipe.data.max_length, "split").examples


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    kind: Kind
    items: list[Choice] | list[Passage]
    settings: Row
    """Everything that decides what is measured: few_shot, limit, source, sha256 of the items, notes."""


def make_task(
    name: str, kind: Kind, items: Sequence[Choice] | Sequence[Passage], source: str, limit: int | None, **more: Any
) -> Task:
    """A task over the first `limit` items.

    Raises:
        DataError: no items, or an id that stands twice.
    """
    if not items:
        raise DataError(f"{source}: no items for {name}; the file is empty")
    twice = [i for i, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{source}: {name}: the id {twice[0]!r} stands on several items; give each item its own")
    kept = list(items)[:limit]
    digest = hashlib.sha256(repr(kept).encode()).hexdigest()
    settings = {"source": source, "sha256": digest, "limit": limit, "items": len(kept), **more}
    return Task(name, kind, kept, settings)  # type: ignore[arg-type]


def spread(found: Sequence[T], count: int) -> list[T]:
    """`count` of them at even distances, the first among them: no hand picks them."""
    return [found[i * len(found) // count] for i in range(count)] if len(found) > count else list(found)


def read_rows(file: Path) -> list[tuple[str, Row]]:
    """(where, row) of JSON lines, a JSON list, a JSON object of rows by id (the key becomes `id`), .parquet; also .gz.

    Raises:
        DataError: missing, not readable, or not such a file.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file; give --data TASK=PATH")
    if ".parquet" in file.suffixes:
        return [(raw.where, raw.row or {}) for raw in parquet_rows(file)]
    text = decoded(file)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}") from None
        rows = [(f"{file}:{number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [(where, _object(where, _parsed(where, line))) for where, line in rows]
    if isinstance(whole, dict) and all(isinstance(value, dict) for value in whole.values()):
        return [(f"{file}:{key}", {"id": key, **value}) for key, value in whole.items()]
    if not isinstance(whole, list):
        return [(f"{file}:1", _object(f"{file}:1", whole))]
    return [(f"{file}:row {n}", _object(f"{file}:row {n}", row)) for n, row in enumerate(whole, 1)]


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None


def _object(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    return row


def read_csv(file: Path) -> list[tuple[str, list[str]]]:
    """(where, cells) of a CSV without a header. Raises DataError where it cannot be read."""
    reader = csv.reader(io.StringIO(decoded(file), newline=""), strict=True)
    try:
        return [(f"{file}:{reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: broken quoting: {error}") from None


def hub_rows(path: str, split: str, name: str | None = None) -> list[tuple[str, Row]]:
    """(where, row) of a split of a hub data set.

    Raises:
        DataError: the hub does not give it.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(path, name, split=split)
    except Exception as error:  # the hub client has no common base class
        raise DataError(
            f"{path}: the hub did not give its split `{split}` ({type(error).__name__}); check the name and the "
            "network, or give a local file with --data TASK=PATH"
        ) from None
    return [(f"{path}[{split}]:row {number}", dict(row)) for number, row in enumerate(rows, 1)]


def rows_of(source: str | None, hub: str, split: str, name: str | None = None) -> tuple[str, list[tuple[str, Row]]]:
    """(source as text, rows): of the local file `source`, of the hub id `source`, or of the published data set.

    Raises:
        DataError: as `read_rows` and `hub_rows`.
    """
    if source and (Path(source).expanduser().exists() or source.count("/") != 1 or Path(source).suffix):
        return source, read_rows(Path(source).expanduser())
    return source or hub, hub_rows(source or hub, split, name)


def text_of(where: str, row: Row, *names: str) -> str:
    """The first of the named fields that the row has, as text without outer space.

    Raises:
        DataError: none is there, or it holds no text.
    """
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise DataError(f"{where}: no field `{names[0]}`; the row has {', '.join(map(str, row)) or 'nothing'}")
    if not isinstance(row[name], str) or not row[name].strip():
        raise DataError(f"{where}: `{name}` must be text; {row[name]!r} given")
    return str(row[name]).strip()


def index_of(where: str, value: Any, count: int) -> int:
    """A right answer given as a letter or as an index from 0.

    Raises:
        DataError: it names none of the `count` options.
    """
    index = LETTERS.find(value.strip().upper()) if isinstance(value, str) and len(value.strip()) == 1 else value
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        allowed = f"A to {LETTERS[count - 1]} or 0 to {count - 1}"
        raise DataError(f"{where}: the answer {value!r} names none of the {count} options ({allowed})")
    return index


def lettered(texts: Sequence[str]) -> str:
    """Each option on a line of its own: `A. ...`."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))


def with_examples(
    items: Sequence[Choice], examples: Sequence[Choice], few_shot: int, head: str = ""
) -> tuple[Choice, ...]:
    """Each item with `few_shot` answered examples before its prompt, in the manner of lm-evaluation-harness.

    Raises:
        DataError: there are fewer examples.
    """
    from dataclasses import replace

    if few_shot > len(examples):
        raise DataError(f"--few-shot {few_shot}: there are only {len(examples)} examples; give fewer")
    shown = "".join(f"{e.prompt} {e.options[e.answer]}\n\n" for e in examples[:few_shot])
    return tuple(replace(item, prompt=head + shown + item.prompt) for item in items)


def choice_task(
    name: str,
    found: tuple[str, list[tuple[str, Row]]],
    make: Callable[[str, Row], Choice],
    few_shot: int,
    limit: int | None,
    **more: Any,
) -> Task:
    """A task whose first `few_shot` rows serve as examples and are not scored.

    Raises:
        DataError: whatever `make` finds wrong with a row, and as `make_task` and `with_examples`.
    """
    source, rows = found
    items = [make(where, row) for where, row in rows]
    asked = with_examples(items[few_shot:], items[:few_shot], few_shot)
    return make_task(name, "choice", asked, source, limit, few_shot=few_shot, **more)
