"""What is installed, what this machine is, which model sizes it can train, and how a recipe would run on it."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from medlora import assets
from medlora.errors import RecipeError
from medlora.model.base import FAMILIES, load_config
from medlora.model.load import compute_dtype, device
from medlora.model.memory import free_bytes
from medlora.model.plan import Shape, Work, capacity_of, choose, plans, resources, table
from medlora.recipe import Base, Recipe
from medlora.train.manifest import versions


def examine() -> dict[str, Any]:
    """Versions, device, memory, cache, and the sizes that fit (estimates)."""
    on, free = device(), free_bytes(device())
    dtype = compute_dtype(Base(), on)
    fits = table(free, width=dtype.itemsize, on_gpu=on.type == "cuda")
    return {
        "versions": versions(),
        "device": {
            "name": torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU",
            "cpu_threads": torch.get_num_threads(),
            "compute_dtype": str(dtype).removeprefix("torch."),
            "free_bytes": free,
            "ram_bytes": psutil.virtual_memory().total,
        },
        "cache": {
            "folder": str(assets.home()),
            "embedded_base": (assets.home() / "models" / "SmolLM2-135M-Instruct" / "config.json").is_file(),
        },
        "python_compiles_anew": compiles_anew(torch.__spec__.cached),
        "can_train": [{"model": shape.name, "estimated_bytes": needed, "fits": fit} for shape, needed, fit in fits],
    }


def compiles_anew(cached: str | None) -> bool:
    """Whether every start compiles a package whose compiled module `cached` would be: it is not there, and Python may
    not or cannot leave it."""
    if cached is None or Path(cached).is_file():
        return False
    folder = next(parent for parent in Path(cached).parents if parent.is_dir())
    return sys.dont_write_bytecode or not os.access(folder, os.W_OK)


def plan(recipe: Recipe, gpus: int = 1) -> dict[str, Any]:
    """How `recipe` would run on this machine, on each of so many GPUs like the first: the plan and its predicted peak,
    from its data and the base's shape.

    Raises:
        RecipeError: a run whose memory is not planned, as that of the plain engine. Others as `train.run.prepare`.
    """
    from medlora.train.run import prepare

    prepared, on = prepare(recipe), device()
    recipe = prepared.recipe
    config = load_config(prepared.base)
    if recipe.training.engine == "plain" or config.model_type not in FAMILIES:
        raise RecipeError(
            "only the packed engine plans its memory; it takes bases of the LLaMA family and engine: auto"
        )
    work = Work.of(recipe, prepared.corpus.train, gpus, **resources(on, compute_dtype(recipe.base, on).itemsize))
    capacity = capacity_of(recipe, free_bytes(on))
    chosen = choose(plans(Shape.of(config), work), capacity)
    return {"recipe": recipe.name, "line": chosen.describe(capacity), "capacity_bytes": capacity} | asdict(chosen)


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines for a person."""
    device_, cache = report["device"], report["cache"]
    lines = ["Versions"]
    lines += [f"  {name:<14} {version or 'not installed'}" for name, version in report["versions"].items()]
    if report["python_compiles_anew"]:
        lines += [
            "",
            "Python compiles its packages anew at every start, having no place to keep them; give it one:",
            "  export PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=~/.cache/python",
        ]
    lines += [
        "",
        f"Device: {device_['name']}, {device_['free_bytes'] / 2**30:.1f} GiB free, "
        f"{device_['cpu_threads']} CPU threads, computes in {device_['compute_dtype']}",
        f"Cache: {cache['folder']} (embedded base {'ready' if cache['embedded_base'] else 'not fetched yet'})",
        "",
        "Training in 4-bit, LoRA r 64 on all linear layers, layers recomputed, 2,048 tokens a step (estimates)",
    ]
    for entry in report["can_train"]:
        verdict = "fits" if entry["fits"] else "too large for this machine"
        lines.append(f"  {entry['model']:<16} {entry['estimated_bytes'] / 2**30:6.1f} GiB  {verdict}")
    return lines
