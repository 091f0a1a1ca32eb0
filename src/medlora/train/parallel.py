"""Several GPUs: each holds the whole base, takes its share of every step's documents, and all add up their gradients.

The loss is the token mean over the whole step wherever its documents lie, so the mathematics are those of one GPU. The
first process is the command's own, and alone writes files, measures and answers. The others train the same recipe on
the same rows in the same order, from the same draws, so that all weights stay alike; they keep nothing, and end with
the first. One that ends by itself ends the run: nobody could tell the others apart from one that is late.
"""

# torch leaves Tensor.split untyped
# mypy: allow-untyped-calls
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medlora.errors import DataError, ModelError, RunError
from medlora.model.packed import Batch, dealt, only
from medlora.recipe import Recipe

PATIENCE = timedelta(days=7)  # the first may measure for hours before it trains


class Team:
    """One of the processes that share every step. They meet by a file, within `group`."""

    def __init__(self, rank: int, size: int, meeting: Path) -> None:
        self.rank, self.size, self.meeting = rank, size, meeting
        self.gradients: Tensor | None = None
        """Of all that is trained, end to end, as of the last step."""
        self.others: list[subprocess.Popen[bytes]] = []
        """Those that this one has started."""
        self.over = threading.Event()

    @contextmanager
    def group(self) -> Iterator[None]:
        """Wait for the others to come, and be one of them until the first leaves, which ends them."""
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        place = f"file://{self.meeting}"
        dist.init_process_group(backend, place, world_size=self.size, rank=self.rank, timeout=PATIENCE)
        try:
            yield
        finally:
            self.end()
            dist.destroy_process_group()

    def end(self) -> None:
        self.over.set()
        for process in self.others:
            process.kill()
            process.wait()

    def share(self, batch: Batch) -> Batch | None:
        """This process's documents of a packed row; None where there are too few."""
        parts = dealt([stop - start for start, stop in pairwise(batch["borders"])], self.size)
        return only(batch, parts[self.rank]) if self.rank < len(parts) else None

    @contextmanager
    def draws(self) -> Iterator[None]:
        """Dropout of this process's own, after which all go on from one state: rows are shuffled by it."""
        seed = int(torch.randint(2**62, (1,)))
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed + self.rank)
            yield

    def added_up(self, weights: Sequence[Any], loss: Tensor) -> Tensor:
        """The loss of all shares; every weight's gradient becomes that of all shares too.

        Raises:
            ModelError: the library that moves them fails.
        """
        mine = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        every = torch.cat([g.flatten() for g in mine] + [loss.to(mine[0].dtype).reshape(1)])
        sizes = [g.numel() for g in mine]
        try:
            dist.all_reduce(every)
        except dist.DistError as error:
            first = str(error).partition("\n")[0]
            raise ModelError(f"the GPUs cannot share gradients: {first} (NCCL_DEBUG=INFO tells more)") from None
        self.gradients, total = every[:-1], every[-1].clone()  # who keeps the loss would keep them all
        for weight, grad in zip(weights, self.gradients.split(sizes), strict=True):
            weight.grad = grad.view_as(weight)
        return total


def enough(recipe: Recipe, gpus: int) -> None:
    """Raises RunError where `gpus` are not there, or have nothing to share, and where this process is one of several
    that were started alike, whose runs would be the same."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RunError("torchrun, or accelerate launch, has started this several times; start it once, with --gpus N")
    shown, samples = len(_visible()), recipe.training.samples
    if shown < gpus > 1:
        there = f"{shown} GPU{'s' * (shown != 1)}"
        raise RunError(f"--gpus {gpus}: this machine shows {there}; see nvidia-smi and CUDA_VISIBLE_DEVICES")
    if samples < gpus:
        raise RunError(f"--gpus {gpus}: a step has {samples} samples; set training.gradient_accumulation_steps higher")


@contextmanager
def beside(folder: Path, gpus: int, fingerprint: str, optim: str, checkpoint: Path | None) -> Iterator[Team]:
    """The first of `gpus` processes, while the others run: the run in `folder`, whose rows have this fingerprint, from
    `checkpoint` on, with this optimizer."""
    places = _visible()
    with TemporaryDirectory() as meeting:
        team = Team(0, gpus, Path(meeting) / "meeting")
        logs = [folder / f"gpu-{rank}.log" for rank in range(1, gpus)]
        for rank, log in enumerate(logs, 1):
            command = [folder, rank, gpus, team.meeting, fingerprint, optim, checkpoint or ""]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "medlora", "follow", *map(str, command)],
                    stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True,  # without Ctrl-C
                    env=os.environ | {"CUDA_VISIBLE_DEVICES": places[rank]},
                )  # fmt: skip
            team.others.append(process)
            threading.Thread(target=_watch, args=(process, rank, log, team.over), daemon=True).start()
        try:
            yield team
        finally:
            team.end()
            for log in logs:
                log.unlink()


def _visible() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _watch(process: "subprocess.Popen[bytes]", rank: int, log: Path, over: threading.Event) -> None:
    """End this process, whose next step would wait for the other's gradients, if that ends first."""
    process.wait()
    if not over.is_set():
        last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2].removeprefix("error: ")
        why = last or f"exit status {process.returncode}"
        sys.stderr.write(f"error: the process of GPU {rank} ended: {why}; see {log}\n")
        sys.stderr.flush()
        os._exit(ModelError.exit_code)


def belong() -> None:
    """End with the process that has started this one, and by nothing else: a scheduler tells both, and the first has a
    checkpoint to write."""
    from medlora.train.callbacks import ENDINGS

    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # until nobody is left to write
    os._exit(1)


def follow(folder: Path, rank: int, gpus: int, meeting: Path, fingerprint: str, optim: str, checkpoint: str) -> None:
    """Train the run in `folder` beside the first process, until that ends this one; arguments as of `beside`.

    Raises:
        DataError: other rows than the first has read. Others as `medlora.train.run.prepare`.
    """
    from medlora.model.adapter import add_lora
    from medlora.model.load import load_model
    from medlora.recipe import load_recipe
    from medlora.train.run import prepare
    from medlora.train.trainer import choose_engine, make_trainer, running

    recipe = load_recipe(folder / "recipe.yaml", [f"training.optim={optim}", "training.save_steps=null"])
    prepared = prepare(recipe)
    if prepared.corpus.fingerprint != fingerprint:
        raise DataError(f"{recipe.data.path}: changed while the run began")
    model = add_lora(load_model(prepared.base, recipe.base), recipe.lora, recipe.training.seed)
    rows, team = prepared.corpus.train, Team(rank, gpus, meeting)
    engine = choose_engine(model, recipe, rows, gpus)
    with TemporaryDirectory() as nothing:
        trainer = make_trainer(recipe, model, prepared.tokenizer, rows, engine, Path(nothing), [], team)
        with running(trainer), team.group():
            trainer.train(resume_from_checkpoint=checkpoint or None)
            threading.Event().wait()
