"""The model card of an exported model: what it is, what was measured of it, and what nobody knows."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from medlora import __version__
from medlora.evaluate import summary
from medlora.evaluate.loss import HeldOut
from medlora.recipe import EMBEDDED, Base, Recipe, load_recipe
from medlora.train import manifest as manifests


@dataclass(frozen=True, slots=True)
class Check:
    """Held-out rows by both models."""

    adapter: HeldOut
    """By the adapter on its base, as it was trained."""
    exported: HeldOut
    """By the files that were written."""


@dataclass(frozen=True, slots=True)
class About:
    """What is known of a model, without a place of this machine in it."""

    name: str
    base: str
    recipe: Recipe | None = None
    """None, and nothing below it, for an adapter without its run."""
    manifest: dict[str, Any] | None = None
    evaluation: tuple[str, ...] = ()
    """Lines of its table."""

    @property
    def data(self) -> str:
        return Path(self.manifest["data"]["path"]).name if self.manifest else "data that is not known here"

    @property
    def sentence(self) -> str:
        return f"{self.base}, tuned on {self.data} by medlora {__version__}. Not medical advice."


def about(run: Path | None, adapter: Path, base: Base) -> About:
    """Read what lies beside an adapter.

    Raises:
        RunError, DataError: a damaged run or evaluation.
    """
    model = "SmolLM2-135M-Instruct" if base.model == EMBEDDED else base.model
    model = Path(model).name if Path(model).expanduser().exists() else model
    if run is None:
        return About(adapter.resolve().name, model)
    folder = run / summary.FOLDER
    evaluated = summary.describe(summary.summarize(folder)) if list(folder.glob("*.jsonl")) else []
    recipe, manifest = load_recipe(run / "recipe.yaml"), manifests.read(run)
    return About(manifest["name"], model, recipe, manifest, tuple(evaluated))


def card(told: About, dtype: str, check: Check | None, *, onto_nf4: bool) -> str:
    """README.md, with the header that the hub reads."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((files("medlora.export") / "card.md.jinja").read_text(encoding="utf-8"))
    return template.render(about=told, dtype=dtype, check=check, onto_nf4=onto_nf4, version=__version__)
