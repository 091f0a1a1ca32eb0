"""Import the stack in about half of its time; for a process of our own, since it leaves traces in it."""

import gc
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from inspect import getmodulename
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from medlora.recipe import Base

HIDDEN = ("scipy", "sklearn", "torchaudio", "torchvision")
"""What the stack imports wherever it is installed, for pictures, sounds and a search that is not used here. What is
imported meanwhile takes it for missing, later too."""
LATER = ("bitsandbytes", "peft")
"""What loading a base and an adapter will import: here rather than there."""


@contextmanager
def without_gc() -> Iterator[None]:
    """What imports make stays, and looking it through for garbage takes a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def importing(base: "Base | None" = None) -> Iterator[None]:
    """For commands that load a model: nothing of `HIDDEN` is imported, and nothing is searched twice. Meanwhile `base`
    is read ahead, until the command ends.

    Raises:
        ModelError, AssetError: there is no such base.
    """
    hidden = [name for name in HIDDEN if name not in sys.modules]
    distributions, interval = importlib.metadata.packages_distributions, sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # a thread that reads has little to do each time, and would wait for that
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    importlib.metadata.packages_distributions = _distributions  # both Transformers and TRL ask for them
    try:
        with without_gc():
            if base:
                from medlora.model.load import read_ahead

                click.get_current_context().call_on_close(read_ahead(base))
            _models_searched_once()
            for name in LATER:
                import_module(name)
            yield
    finally:
        importlib.metadata.packages_distributions = distributions
        sys.setswitchinterval(interval)
        for name in hidden:
            sys.modules.pop(name, None)


@cache
def _distributions() -> dict[str, list[str]]:
    """As importlib.metadata tells them, which looks whether each installed file is there."""
    found: dict[str, list[str]] = {}
    for each in importlib.metadata.distributions():
        named = (each.read_text("top_level.txt") or "").split()
        files = [] if named else (each.read_text("RECORD") or "").splitlines()
        held = {file.split("/")[0] if "/" in file else getmodulename(file.split(",")[0]) for file in files}
        for name in named or held:
            if name and "." not in name:
                found.setdefault(name, []).append(each.name)
    return found


def _models_searched_once() -> None:
    """Transformers reads the source of all its models for their names, and again for `transformers.models`: what it
    remembers holds fewer folders than there are."""
    import transformers
    from transformers.utils import import_utils

    if "transformers.models" in sys.modules:
        return
    search = import_utils.define_import_structure
    found = search(Path(transformers.__file__).parent / "models", prefix="models")  # remembered as a whole
    names = {
        backends: {
            name.removeprefix("models."): objects for name, objects in each.items() if name.startswith("models.")
        }
        for backends, each in found.items()
    }
    import_utils.define_import_structure = lambda path: names
    try:
        import transformers.models
    finally:
        import_utils.define_import_structure = search
