"""Every format is read, every bad row is named, damage stops with one sentence."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MEDQUAD

from medlora.data.sources import load
from medlora.errors import DataError
from medlora.recipe import Columns, Data

Write = Callable[..., Path]
ROW = '{"prompt": "What is gout?", "completion": "Arthritis."}'


def data(path: Path | str, **fields: Any) -> Data:
    return Data(path=str(path), **fields)


def messages(path: Path | str, **fields: Any) -> list[tuple[tuple[str, str], ...]]:
    return [record.messages for record in load(data(path, **fields)).records]


GOUT = (("user", "What is gout?"), ("assistant", "Arthritis."))


def test_json_lines_json_csv_and_parquet_give_the_same_record(write: Write, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([json.loads(ROW)]), tmp_path / "a.parquet")
    files = [
        write("a.jsonl", ROW + "\n\n"),
        write("bom.jsonl", "\ufeff" + ROW),
        write("a.json", f"[{ROW}]"),
        write("b.json", f'{{"data": [{ROW}]}}'),
        write("a.csv", 'prompt,completion\n"What is gout?",Arthritis.\n'),
        write("a.tsv", "prompt\tcompletion\nWhat is gout?\tArthritis.\n"),
        write("a.jsonl.gz", gzip.compress(ROW.encode())),
        tmp_path / "a.parquet",
    ]
    for file in files:
        assert messages(file) == [GOUT], file.name


def test_columns_are_mapped_filled_and_detected(write: Write) -> None:
    file = write("a.jsonl", '{"q": "What is gout?", "a": "Arthritis.", "focus": "gout"}')
    assert messages(file, columns=Columns(prompt="q", completion="a")) == [GOUT]
    assert messages(file, columns=Columns(prompt="What is {focus}?", completion="a")) == [GOUT]
    chat = write("chat.jsonl", json.dumps({"messages": [{"role": r, "content": c} for r, c in GOUT]}))
    assert messages(chat) == [GOUT]
    text = load(data(write("t.txt", "one\ntwo\n\n\nthree\n"))).records
    assert [(r.text, r.where.rpartition(":")[2]) for r in text] == [("one\ntwo", "1"), ("three", "5")]


def test_the_formats_that_others_train_on_are_recognised(write: Write) -> None:
    """With nothing of a question left out."""
    alpaca = [
        {"instruction": "Answer truthfully.", "input": "What is gout?", "output": "Arthritis."},
        {"instruction": "What is gout?", "input": "", "output": "Arthritis."},
        {"Instruction": "What is gout?", "output": "Arthritis."},
        {"instruction": "What is gout?", "context": None, "response": "Arthritis.", "category": "closed"},
    ]
    source = load(data(write("alpaca.jsonl", "\n".join(map(json.dumps, alpaca)))))
    first = (("user", "Answer truthfully.\n\nWhat is gout?"), ("assistant", "Arthritis."))
    assert [record.messages for record in source.records] == [first, GOUT, GOUT, GOUT]
    assert [columns.prompt for columns in source.columns] == [
        "{instruction}\n\n{input}", "Instruction", "{instruction}\n\n{context}",
    ]  # fmt: skip
    turns = [{"from": who, "value": said} for who, said in zip(("human", "gpt"), dict(GOUT).values(), strict=True)]
    assert messages(write("sharegpt.json", json.dumps([{"id": 1, "conversations": turns}]))) == [GOUT]
    assert messages(write("capitals.csv", "Qtype,Question,Answer\ninfo,What is gout?,Arthritis.\n")) == [GOUT]
    semicolons = write("excel.csv", '\ufeffprompt;completion\r\n"What is gout?";"Arthritis."\r\n')
    assert messages(semicolons) == [GOUT]
    commas = write("commas.tsv", "Prompt\tCompletion\ta, b, c, d\nWhat is gout?\tArthritis.\t1\n")
    assert messages(commas) == [GOUT]


def test_medquad_xml_and_a_hub_style_folder(write: Write, tmp_path: Path) -> None:
    xml = """<?xml version="1.0"?><Document source="CDC"><Focus>Gout</Focus><QAPairs><QAPair pid="1">
      <Question qtype="information">What is gout?</Question><Answer>Arthritis.</Answer></QAPair></QAPairs></Document>"""
    write("xml/1.xml", xml)
    source = load(data(tmp_path / "xml", group="focus"))
    assert [(r.messages, r.group) for r in source.records] == [(GOUT, "Gout")]
    write("hub/data/train.jsonl", ROW + "\n")
    assert messages(tmp_path / "hub") == [GOUT]


def test_a_hub_style_folder_of_several_configurations(write: Write) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("de", "en"))
    folder = write("hub/README.md", f"---\nconfigs:\n{configs}---\n").parent
    for name in ("de", "en"):
        write(f"hub/{name}.jsonl", ROW.replace("Arthritis", name) + "\n")
    assert messages(folder, name="en")[0][1] == ("assistant", "en.")
    for name in (None, "fr"):
        with pytest.raises(DataError, match=r"set data.name to one of its configurations, \['de', 'en'\]"):
            load(data(folder, name=name))


@pytest.mark.skipif(not MEDQUAD.is_dir(), reason="MedQuAD is not beside this checkout")
def test_the_published_medquad_collection_is_read_whole() -> None:
    import xml.etree.ElementTree as ET

    folder = MEDQUAD / "xml" / "9_CDC_QA"
    pairs = sum(len(ET.parse(file).findall(".//QAPair")) for file in folder.glob("*.xml"))
    source = load(data(folder, group="focus", max_bad_fraction=1.0))
    assert len(source.records) + len(source.bad) == pairs > 50


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none.jsonl", None, ["no such file or folder", "data.path"]),
        ("empty.jsonl", "", ["no rows", "empty"]),
        ("empty.csv", "", ["no rows"]),
        ("header.csv", "prompt,completion\n", ["no rows"]),
        ("quote.csv", 'prompt,completion\nq,a\n"broken,b\nc,d\n', ["line 3", "broken quoting"]),
        ("latin.csv", b"prompt,completion\nq,caf\xe9\n", ["line 2", "UTF-8", "0xe9", "iconv"]),
        ("latin.txt", b"caf\xe9", ["line 1", "UTF-8"]),
        ("bad.json", '{"a": [1,}', ["line 1", "not valid JSON"]),
        ("lines.json", '{"a": 1}\n{"a": 2}', [".jsonl"]),
        ("what.docx", "x", ["unknown kind of file", ".jsonl"]),
        ("broken.parquet", b"PAR1nope", ["not a readable Parquet"]),
        ("columns.jsonl", '{"foo": "a", "bar": "b"}', ["foo, bar", "data.columns.prompt"]),
        ("truncated.jsonl.gz", gzip.compress(ROW.encode(), mtime=0)[:-9], ["cannot be read"]),
    ],
)
def test_damage_gives_one_sentence(write: Write, tmp_path: Path, name: str, content: Any, parts: list[str]) -> None:
    file = tmp_path / name if content is None else write(name, content)
    with pytest.raises(DataError) as error:
        load(data(file))
    assert name in str(error.value) and "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_wrong_column_is_named_with_those_there_are(write: Write) -> None:
    file = write("a.jsonl", ROW)
    way_out = r"no column `frage`; the row has prompt, completion; with --set data.columns=\{\}"
    with pytest.raises(DataError, match=way_out):
        load(data(file, columns=Columns(prompt="frage", completion="completion")))
    with pytest.raises(DataError, match="no column `patient`, which data.group names; .* --set data.group=null"):
        load(data(file, group="patient"))


BAD = "\n".join([ROW] * 3 + ["{broken"] + [ROW] * 3)


def test_a_bad_line_is_skipped_and_named_or_stops_as_the_recipe_says(write: Write) -> None:
    file = write("a.jsonl", BAD)
    source = load(data(file, max_bad_fraction=0.2))
    assert len(source.records) == 6
    assert [raw.where for raw in source.bad] == [f"{file}:4"] and "not valid JSON" in source.bad[0].why
    with pytest.raises(DataError, match="a.jsonl:4: not valid JSON"):
        load(data(file, on_bad_row="error"))
    with pytest.raises(DataError, match=r"1 of 7 rows are bad, more than data.max_bad_fraction \(0.05\)"):
        load(data(file))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"prompt": "q", "completion": " "}', "`completion` is empty"),
        (b'{"prompt": "q", "completion": 3}', "holds int, not text"),
        (b'{"prompt": "q"}', "no column `completion`"),
        (b'{"instruction": "", "input": "", "output": "a"}', "is empty"),
        (b'{"messages": [{"role": "user"}]}', "{role, content} or {from, value} objects"),
        (b'{"messages": "q"}', "{role, content} or {from, value} objects"),
        (b'["q", "a"]', "a JSON object is expected"),
        (b'{"prompt": "caf\xe9", "completion": "a"}', "not UTF-8"),
    ],
)
def test_why_a_row_is_bad(write: Write, line: bytes, why: str) -> None:
    source = load(data(write("a.jsonl", ROW.encode() + b"\n" + line), max_bad_fraction=0.5))
    assert len(source.records) == 1 and why in source.bad[0].why


def test_a_conversation_must_end_with_the_assistant(write: Write) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
    with pytest.raises(DataError, match="must end with an answer"):
        load(data(write("a.jsonl", row)))


def test_an_unknown_hub_id_offline_says_so() -> None:
    with pytest.raises(DataError, match="the hub did not give it"):
        load(data("nobody/no-such-data-set"))
