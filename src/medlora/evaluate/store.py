"""What was scored, as it was scored: one append-only JSON-lines file a task and side.

The first line says what is measured and how; each further line is one item, on disk as soon as it is scored. An
evaluation that was interrupted therefore goes on where it stopped, and refuses to go on with other settings.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from medlora.errors import DataError

Line = dict[str, Any]


class Store:
    """The items of one task and side. Use it as a context manager.

    Raises:
        DataError: the file holds something else, or items that were scored otherwise.
    """

    def __init__(self, folder: Path, header: Line) -> None:
        self.file = folder / f"{header['task']}.{header['side']}.jsonl"
        self.lines: list[Line] = []
        folder.mkdir(parents=True, exist_ok=True)
        held = _whole_lines(self.file)
        if held:
            _same_header(self.file, held[0], header)
            self.lines = held[1:]
        self._handle = self.file.open("a", encoding="utf-8")
        if not held:
            self._write(header)

    @property
    def done(self) -> set[str]:
        return {line["id"] for line in self.lines}

    def add(self, line: Line) -> None:
        self.lines.append(line)
        self._write(line)

    def _write(self, line: Line) -> None:
        self._handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._handle.flush()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._handle.close()


def _whole_lines(file: Path) -> list[Line]:
    """Every finished line; one that a crash cut short is removed from the file."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines: list[Line] = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise DataError(f"{file}:{number}: not a line of an evaluation; remove the file to score again") from None
    if len(whole) < len(content):
        with file.open("rb+") as handle:
            handle.truncate(len(whole))
    return lines


def _same_header(file: Path, held: Line, given: Line) -> None:
    flat = [{**line, **{f"settings.{k}": v for k, v in line.get("settings", {}).items()}} for line in (held, given)]
    for name in [*flat[0], *flat[1]]:
        old, new = flat[0].get(name), flat[1].get(name)
        if name != "settings" and old != new:
            raise DataError(
                f"{file}: was scored with {name} {old!r}, now {new!r}; remove the file to score again, "
                "or evaluate as before to go on with it"
            )
