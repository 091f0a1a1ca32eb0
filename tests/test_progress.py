"""The time left that a progress bar promises."""

from collections.abc import Iterator

import pytest

from medlora import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds of a clock that only the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def test_time_left_follows_the_pace_of_this_run_alone(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("Training", 200) as bar:
        bar.skip(100)  # done by an earlier run
        for _ in range(10):
            clock[0] += 2
            bar.advance(note="loss 1.9")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Training 105/200  loss 1.9  190 s left",
        "Training 110/200  loss 1.9  180 s left",
    ]
