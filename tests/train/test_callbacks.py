"""The clock of a run, beside a device that lags behind the host; and what ends a run early."""

import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medlora.train import callbacks
from medlora.train.callbacks import Interrupt, Watch


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


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_what_ends_a_process_ends_it_after_the_step(sent: str, capfd: pytest.CaptureFixture[str]) -> None:
    state, control = SimpleNamespace(global_step=3, max_steps=9), SimpleNamespace(should_save=False)
    before = [signal.getsignal(number) for number in callbacks.ENDINGS]
    with Interrupt() as interrupt:
        os.kill(os.getpid(), getattr(signal, sent))
        os.kill(os.getpid(), signal.SIGTERM)  # as where a session ends
        interrupt.on_step_end(None, state, control)
        assert control.should_save and control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in callbacks.ENDINGS] == before


def test_a_run_in_a_thread_leaves_signals_alone() -> None:
    def enter() -> None:
        with Interrupt():
            entered.append([signal.getsignal(number) for number in callbacks.ENDINGS])

    entered: list[Any] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [[signal.getsignal(number) for number in callbacks.ENDINGS]]


def test_what_nohup_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.asked
    finally:
        signal.signal(signal.SIGHUP, before)
