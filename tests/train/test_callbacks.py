"""The clock of a run, beside a device that lags behind the host."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medlora.train import callbacks
from medlora.train.callbacks import Watch


class Device:
    """Ten seconds a step, of which the host waits for none until it asks."""

    def __init__(self) -> None:
        self.now, self.due = 0.0, 0.0

    def launch(self) -> None:
        self.due = max(self.now, self.due) + 10
        self.now += 1  # what launching takes

    def synchronize(self) -> None:
        self.now = max(self.now, self.due)


def test_the_clock_counts_what_the_device_takes_and_not_what_saving_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, shown = Device(), []
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    progress: Any = SimpleNamespace(advance=lambda _, text: shown.append(text))
    watch = Watch(progress, tmp_path / "metrics.jsonl")
    for step in range(1, 7):
        state, control = SimpleNamespace(global_step=step), SimpleNamespace(should_save=step == 3)
        watch.on_step_begin(None, state, control)
        watch.count(500)
        device.launch()
        watch.on_step_end(None, state, control)
        device.synchronize()  # the loss is asked for
        watch.on_log(None, state, control, {"loss": 2.0})
        device.now += 100 * control.should_save
    assert device.now == 160
    watch.on_train_end(None, None, None)
    assert watch.seconds == 60 and watch.tokens_per_second == 50
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["tokens_per_second"] for entry in logged] == [50] * 6
    assert shown[2].endswith("50 tokens/s")  # where it saves


def test_the_last_step_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    progress: Any = SimpleNamespace(advance=lambda *_: None)
    watch, control = Watch(progress, tmp_path / "metrics.jsonl"), SimpleNamespace(should_save=False)
    for _ in range(3):
        watch.on_step_begin(None, None, control)
        device.launch()
        watch.on_step_end(None, None, control)
    watch.on_train_end(None, None, control)
    assert watch.seconds == 30
