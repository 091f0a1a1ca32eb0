"""Read rows from files, folders and the hub; name every row that cannot be used.

A reader yields one `Raw` a row: where it stands ("file:line") and its columns, or why it is bad. Damage that makes
the rest of a file unreadable (a broken CSV quote, wrong text encoding outside JSON lines) stops at once.
"""

import csv
import gzip
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from medlora.errors import DataError
from medlora.recipe import EMBEDDED, Columns, Data

TERMS = Path(__file__).parent / "terms" / "medical_terms.jsonl"
CONVERSATIONS = ("messages", "conversations")
# What is asked and what is answered. Of an instruction, what it is about may stand apart (Alpaca's and Dolly's files).
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("instruction", "output"),
    ("instruction", "response"),
)  # fmt: skip
ABOUT = ("input", "context")
GROUPED = ", which data.group names", "; without whole groups: --set data.group=null"
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
Message = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Raw:
    where: str
    row: Row | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One usable row: raw `text`, or a conversation that ends with the assistant's answer."""

    where: str
    text: str | None
    messages: tuple[tuple[str, str], ...]
    """(role, content) pairs; empty where `text` is given."""
    group: str
    """Rows of one group never stand on both sides of a split."""

    @property
    def content(self) -> str:
        """All that the row says, whoever says it."""
        return self.text or "\n".join(said for _, said in self.messages)


@dataclass(frozen=True, slots=True)
class Source:
    records: list[Record]
    bad: list[Raw] = field(default_factory=list)
    columns: tuple[Columns, ...] = ()
    """Those that the rows were recognised by, where the recipe names none."""


def load(data: Data, path: str | None = None) -> Source:
    """Every usable record of `path` (default: the recipe's `data.path`), and the bad rows.

    Raises:
        DataError: the source is missing, empty or damaged; a column is missing from every row; a bad row where the
            recipe says `on_bad_row: error`; or more bad rows than `max_bad_fraction`.
    """
    path = path or data.path
    records: list[Record] = []
    bad: list[Raw] = []
    named = None if data.columns == Columns() else data.columns
    if path == EMBEDDED and named is None:
        named = Columns(prompt="Please tell me about {term}", completion="text")
    found: dict[Columns, None] = {}
    columns = named
    for raw in raw_rows(path, data):
        if raw.row is None:
            bad.append(raw)
            continue
        recognised = _recognised(tuple(map(str, raw.row)))
        if named is None:
            columns = recognised or columns
        if columns is None:
            raise DataError(
                f"{path}: found the columns {', '.join(map(str, raw.row))}, none of which is known; name them in the "
                "recipe, for example --set data.columns.prompt=COLUMN --set data.columns.completion=COLUMN"
            )
        found[columns] = None
        made = _record(raw.where, raw.row, columns, data.group)
        if isinstance(made, Raw) and not records and recognised not in (None, columns):
            made = replace(made, why=f"{made.why}; with --set data.columns={{}} those of this row are recognised")
        records.append(made) if isinstance(made, Record) else bad.append(made)
    _judge(path, data, records, bad)
    return Source(records, bad, tuple(found) if named is None else ())


def _judge(path: str, data: Data, records: list[Record], bad: list[Raw]) -> None:
    total = len(records) + len(bad)
    if total == 0:
        raise DataError(f"{path}: no rows; the file is empty")
    if bad and (data.on_bad_row == "error" or not records):
        raise DataError(f"{bad[0].where}: {bad[0].why}" + (f" (and {len(bad) - 1} more)" if bad[1:] else ""))
    if len(bad) / total > data.max_bad_fraction:
        raise DataError(
            f"{path}: {len(bad)} of {total} rows are bad, more than data.max_bad_fraction "
            f"({data.max_bad_fraction:g}); the first: {bad[0].where}: {bad[0].why}"
        )


def raw_rows(path: str, data: Data) -> Iterator[Raw]:
    """What a file, a folder or a hub data set holds, line by line, the broken ones among them."""
    place = TERMS if path == EMBEDDED else Path(path).expanduser()
    if place.is_dir():
        xml = sorted(place.rglob("*.xml"))
        yield from (raw for file in xml for raw in _medquad(file)) if xml else _hub(str(place), data)
    elif place.is_file():
        yield from _reader(place)(place)
    elif _looks_like_hub_id(path):
        yield from _hub(path, data)
    else:
        raise DataError(f"{path}: no such file or folder; set data.path to a file, a folder or a hub id")


def _looks_like_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).suffix.startswith(".json")


def _reader(file: Path) -> Callable[[Path], Iterator[Raw]]:
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text}
    readers |= {".parquet": parquet_rows, ".xml": _medquad}
    reader = readers.get(suffixes[-1]) if suffixes else None
    if reader is None:
        raise DataError(f"{file}: unknown kind of file; use {', '.join(readers)}, or one of them with .gz")
    return reader


def _bytes(file: Path) -> bytes:
    try:
        return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def decoded(file: Path) -> str:
    """The text of a file, also of a .gz. Raises DataError where it is not UTF-8."""
    content = _bytes(file)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x}); "
            f"convert it, for example: iconv -f LATIN1 -t UTF-8 {file.name}"
        ) from None


def _jsonl(file: Path) -> Iterator[Raw]:
    for number, line in enumerate(_bytes(file).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if line.strip():
            yield _json_row(f"{file}:{number}", line)


def _json_row(where: str, line: bytes) -> Raw:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Raw(where, None, f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})")
    except json.JSONDecodeError as error:
        return Raw(where, None, f"not valid JSON: {error.msg} at column {error.colno}")
    if not isinstance(row, dict):
        return Raw(where, None, f"a JSON object is expected, found {type(row).__name__}")
    return Raw(where, row)


def _json(file: Path) -> Iterator[Raw]:
    text = decoded(file)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line is JSON lines: name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}{hint}") from None
    if isinstance(rows, dict):  # {"data": [...]} or {"id": {...}}
        rows = next((value for value in rows.values() if isinstance(value, list)), list(rows.values()))
    for number, row in enumerate(rows, 1):
        where = f"{file}:row {number}"
        yield Raw(where, row) if isinstance(row, dict) else Raw(where, None, "not a JSON object")


def _csv(file: Path) -> Iterator[Raw]:
    """By whatever its header has most of: Excel writes semicolons where a comma is the decimal sign."""
    text = decoded(file)
    delimiter = "\t" if ".tsv" in file.suffixes else max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            where, start = f"{file}:{start}", reader.line_num + 1
            if header is None:
                header = cells
            elif len(cells) == len(header):
                yield Raw(where, dict(zip(header, cells, strict=True)))
            elif cells:
                yield Raw(where, None, f"{len(cells)} cells, but the header has {len(header)}")
    except csv.Error as error:
        raise DataError(f"{file}, line {start}: broken quoting in the row that starts here: {error}") from None


def _text(file: Path) -> Iterator[Raw]:
    """A record is a block of lines; blank lines stand between records."""
    block: list[str] = []
    start = 1
    for number, line in enumerate([*decoded(file).splitlines(), ""], 1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield Raw(f"{file}:{start}", {"text": "\n".join(block)})
            block = []


def parquet_rows(file: Path) -> Iterator[Raw]:
    """The rows of a Parquet file. Raises DataError where it is none."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        rows = pq.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    yield from (Raw(f"{file}:row {number}", row) for number, row in enumerate(rows, 1))


def _medquad(file: Path) -> Iterator[Raw]:
    """One question-answer pair a row: focus, qtype, question, answer, source (Ben Abacha et al., 2019)."""
    try:
        document = ET.fromstring(_bytes(file))
    except ET.ParseError as error:
        yield Raw(f"{file}:{error.position[0]}", None, f"not valid XML: {error}")
        return
    focus = (document.findtext("Focus") or "").strip()
    for pair in document.iter("QAPair"):
        question = pair.find("Question")
        row = {
            "source": document.get("source", ""),
            "focus": focus,
            "qtype": question.get("qtype", "") if question is not None else "",
            "question": " ".join((pair.findtext("Question") or "").split()),
            "answer": " ".join((pair.findtext("Answer") or "").split()),
        }
        yield Raw(f"{file}:pair {pair.get('pid', '?')}", row)


def _hub(path: str, data: Data) -> Iterator[Raw]:
    from datasets import load_dataset

    try:
        rows = load_dataset(path, data.name, split=data.split, revision=data.revision)
    except Exception as error:  # the hub client has no common base class
        raise DataError(_hub_reason(path, data, error)) from None
    yield from (Raw(f"{path}[{data.split}]:row {number}", dict(row)) for number, row in enumerate(rows, 1))


def _hub_reason(path: str, data: Data, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    several = re.search(r"(?:Config name is missing|BuilderConfig).*?(\[.*?\])", str(error), re.DOTALL)
    if several:
        return f"{path}: set data.name to one of its configurations, {several[1]}"
    if "Unknown split" in text:
        return f"{path}: no split `{data.split}`; {text.split('. ')[-1]}"
    if Path(path).is_dir():
        return f"{path}: no data files that can be read (.xml, .parquet, .jsonl, .csv): {text}"
    return (
        f"{path}: not a file here, and the hub did not give it ({text}); check the name and the network, "
        "or set data.path to a local file"
    )


@lru_cache
def _recognised(columns: tuple[str, ...]) -> Columns | None:
    """Those whose names are known, in capitals or not."""
    names = {name.lower(): name for name in columns}
    for name in CONVERSATIONS:
        if name in names:
            return Columns(messages=names[name])
    for prompt, completion in PAIRS:
        if prompt in names and completion in names:
            about = [names[name] for name in ABOUT if name in names and prompt == "instruction"]
            asked = "\n\n".join(f"{{{name}}}" for name in (names[prompt], *about)) if about else names[prompt]
            return Columns(prompt=asked, completion=names[completion])
    return Columns(text=names["text"]) if "text" in names else None


def _record(where: str, row: Row, columns: Columns, group_column: str | None) -> Record | Raw:
    try:
        text = _cell(row, columns.text) if columns.text else None
        if columns.messages:
            messages = _conversation(row, columns.messages)
        elif columns.prompt and columns.completion:
            pair = _cell(row, columns.prompt), _cell(row, columns.completion)
            messages = (("user", pair[0]), ("assistant", pair[1]))
        else:
            messages = ()
        content = text or "\n".join(f"{role}: {said}" for role, said in messages)
        group = str(_column(row, group_column, *GROUPED)) if group_column else content
    except ValueError as error:
        return Raw(where, None, str(error))
    return Record(where, text, messages, group)


def _column(row: Row, name: str, asked: str = "", way_out: str = "") -> Any:
    if name not in row:
        raise ValueError(f"no column `{name}`{asked}; the row has {', '.join(map(str, row))}{way_out}")
    return row[name]


def _cell(row: Row, name: str) -> str:
    if "{" in name:
        try:
            value = name.format_map({column: "" if held is None else held for column, held in row.items()})
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"`{name}` cannot be filled: no column {error}") from None
    else:
        value = _column(row, name)
    if not isinstance(value, str):
        raise ValueError(f"column `{name}` holds {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"column `{name}` is empty")
    return value.strip()


def _conversation(row: Row, name: str) -> tuple[tuple[str, str], ...]:
    turns = _column(row, name)
    said = [_turn(turn) for turn in turns] if isinstance(turns, list) else [None]
    messages = tuple((role, content.strip()) for role, content in filter(None, said))
    if len(messages) < len(said):
        raise ValueError(f"column `{name}` must be a list of {{role, content}} or {{from, value}} objects")
    if not messages or messages[-1][0] != "assistant" or not messages[-1][1]:
        raise ValueError(f"column `{name}` must end with an answer of the assistant")
    return messages


def _turn(turn: Any) -> tuple[str, str] | None:
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(turn, dict) and role in turn and content in turn:
            return ROLES.get(str(turn[role]), str(turn[role])), str(turn[content])
    return None
