"""What watches a run: the progress bar, the metrics file, and a Ctrl-C, or its like, that saves before it stops."""

import json
import math
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from medlora.errors import RecipeError
from medlora.progress import Bar

LOST = getattr(signal, "SIGHUP", None)  # not on Windows
ENDINGS = [number for number in (signal.SIGINT, signal.SIGTERM, LOST) if number]


class Watch(TrainerCallback):  # type: ignore[misc]
    """Counts real tokens and seconds, moves the bar, appends each logged step to metrics.jsonl.

    The host may end a step long before the GPU, and waits for it wherever it next needs a number. So the clock runs on
    between steps, and stops, the device idle, only to save.
    """

    def __init__(self, progress: Bar, metrics: Path) -> None:
        self.progress, self.metrics = progress, metrics
        self.tokens, self.loss = 0, ""
        self._before = 0.0
        self._began: float | None = None

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._began is None else time.perf_counter() - self._began)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:  # a resumed run
            self.progress.skip(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self.stop()
        self.progress.advance(1, f"{self.loss}{self.tokens_per_second:,.0f} tokens/s")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Until the next step begins."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._before, self._began = self.seconds, None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        self.loss = f"loss {float(logs['loss']):.3f}  "
        entry = {"step": state.global_step, **{name: _number(value) for name, value in logs.items()}}
        self.write(entry | {"tokens": self.tokens, "tokens_per_second": round(self.tokens_per_second, 1)})

    def write(self, entry: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Validation(TrainerCallback):  # type: ignore[misc]
    """Measures the held-out loss every so many steps, and after the last.

    Args:
        measure: that loss, of the model as it is.
        watch: whose clock stops meanwhile, and which writes it down.
        best: a file for the trained weights where it was lowest, which are put back in the end; it outlives an
            interruption. None: those of the last step stay.
        lowest: so far.
    """

    def __init__(
        self, measure: Callable[[], float], watch: Watch, every: int, best: Path | None, lowest: float = math.inf
    ) -> None:
        self.measure, self.watch, self.every, self.best, self.lowest = measure, watch, every, best, lowest

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        if step % self.every and step < state.max_steps:
            return
        self.watch.stop()
        loss = self.measure()
        self.watch.write({"step": step, "eval_loss": loss})
        if self.best and loss < self.lowest:
            self.lowest = loss
            part = self.best.with_suffix(".part")
            part.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().cpu().contiguous() for name, p in _trained(model)}, part)
            part.replace(self.best)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.best and self.best.is_file():
            held = load_file(self.best)
            for name, parameter in _trained(model):
                parameter.data.copy_(held[name])


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl-C finishes the step, writes a checkpoint and stops; a second one stops at once. What a scheduler
    or a lost connection sends does as the first, unless it is ignored, as nohup has it."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        here = threading.current_thread() is threading.main_thread()  # no other one is told
        for number in ENDINGS * here:
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == LOST:  # the terminal, which takes nothing any more; a file does
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                if stat.S_ISCHR(os.fstat(stream).st_mode):
                    os.dup2(nowhere, stream)
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


def tensorboard(folder: Path) -> TrainerCallback:
    """Transformers' TensorBoard callback, writing to `folder`.

    Raises:
        RecipeError: TensorBoard is not installed.
    """
    from transformers.integrations import TensorBoardCallback

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RecipeError("training.tensorboard: not installed; pip install 'medlora[tensorboard]'") from None
    return TensorBoardCallback(SummaryWriter(folder))
