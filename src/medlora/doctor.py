"""What is installed, what this machine is, and which model sizes it can train."""

from typing import Any

import psutil
import torch

from medlora import assets
from medlora.model.load import compute_dtype, device
from medlora.model.plan import table
from medlora.recipe import Base
from medlora.train.manifest import versions


def examine() -> dict[str, Any]:
    """Versions, device, memory, cache, and the sizes that fit (estimates)."""
    on = device()
    memory = psutil.virtual_memory()
    free = torch.cuda.mem_get_info(on)[0] if on.type == "cuda" else memory.available
    dtype = compute_dtype(Base(), on)
    fits = table(free, width=dtype.itemsize, on_gpu=on.type == "cuda")
    return {
        "versions": versions(),
        "device": {
            "name": torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU",
            "cpu_threads": torch.get_num_threads(),
            "compute_dtype": str(dtype).removeprefix("torch."),
            "free_bytes": free,
            "ram_bytes": memory.total,
        },
        "cache": {
            "folder": str(assets.home()),
            "embedded_base": (assets.home() / "models" / "SmolLM2-135M-Instruct" / "config.json").is_file(),
        },
        "can_train": [{"model": shape.name, "estimated_bytes": needed, "fits": fit} for shape, needed, fit in fits],
    }


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines for a person."""
    device_, cache = report["device"], report["cache"]
    lines = ["Versions"]
    lines += [f"  {name:<14} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines += [
        "",
        f"Device: {device_['name']}, {device_['free_bytes'] / 2**30:.1f} GiB free, "
        f"{device_['cpu_threads']} CPU threads, computes in {device_['compute_dtype']}",
        f"Cache: {cache['folder']} (embedded base {'ready' if cache['embedded_base'] else 'not fetched yet'})",
        "",
        "Training in 4-bit, LoRA r 64 on all linear layers, gradient checkpointing, 2,048 tokens a step (estimates)",
    ]
    for entry in report["can_train"]:
        verdict = "fits" if entry["fits"] else "too large for this machine"
        lines.append(f"  {entry['model']:<16} {entry['estimated_bytes'] / 2**30:6.1f} GiB  {verdict}")
    return lines
