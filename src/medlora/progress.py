"""Progress on standard error: a live bar on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
LINE_EVERY = 10.0  # seconds, where there is no terminal


class Bar:
    """`advance` moves it; `note` is what stands behind it, for example the loss and the tokens a second."""

    def __init__(self, title: str, total: int, live: Progress | None) -> None:
        self._title, self._total, self._live = title, total, live
        self._done, self._started, self._printed = 0, time.monotonic(), time.monotonic()
        self._task = live.add_task(title, total=total, note="") if live else None
        self._skipped = 0

    def skip(self, steps: int) -> None:
        """Start at this step: what came before says nothing about the time left."""
        self._done = self._skipped = steps
        if self._live and self._task is not None:
            self._live.reset(self._task, completed=steps, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        if self._live and self._task is not None:
            self._live.update(self._task, completed=self._done, note=note)
        elif time.monotonic() - self._printed >= LINE_EVERY or self._done == self._total:
            self._printed = time.monotonic()
            each = (self._printed - self._started) / max(self._done - self._skipped, 1)
            left = each * (self._total - self._done)
            console.print(f"{self._title} {self._done}/{self._total}  {note}  {left:.0f} s left")


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar over `total` steps."""
    if not console.is_terminal:
        yield Bar(title, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console) as live:
        yield Bar(title, total, live)
