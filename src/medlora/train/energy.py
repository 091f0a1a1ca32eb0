"""Energy of a piece of work, where the device counts it: NVML's counter of the GPU, or RAPL's of the CPU packages."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Context manager; afterwards `joules` is what was used inside it, or None where the device does not say.

    Args:
        gpus: how many are at work, the current device and those after it.
    """

    def __init__(self, gpus: int = 1) -> None:
        self.joules: float | None = None
        self.gpus = gpus
        self._used: list[Callable[[], float] | None] = []

    def __enter__(self) -> "Meter":
        self._used = [gpu(i) for i in range(self.gpus)] if torch.cuda.is_available() else [cpu()]
        return self

    def __exit__(self, *_: object) -> None:
        used = [each() for each in self._used if each]
        self.joules = sum(used) if len(used) == len(self._used) else None


def cpu(folder: Path = POWERCAP) -> Callable[[], float] | None:
    """Joules that all CPU packages use from now on; None without readable counters. They wrap around once at most."""
    counters = [domain / "energy_uj" for domain in folder.glob("intel-rapl:*") if domain.name.count(":") == 1]
    try:
        ranges = [int((counter.parent / "max_energy_range_uj").read_text()) for counter in counters]
        start = [int(counter.read_text()) for counter in counters]
    except OSError:  # root's alone on most systems
        return None
    if not counters:
        return None

    def used() -> float:
        now = [int(counter.read_text()) for counter in counters]
        return sum((b - a) % (wrap + 1) for a, b, wrap in zip(start, now, ranges, strict=True)) / 1e6

    return used


def gpu(after: int = 0, library: Any = None) -> Callable[[], float] | None:
    """Joules that a CUDA device, so many after the current one, uses from now on (Volta and later); None where NVML
    does not count them."""
    try:
        nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device() + after).uuid}".encode()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(device)):
        return None

    def read() -> int | None:
        millijoules = ctypes.c_ulonglong()
        failed = nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
        return None if failed else millijoules.value

    start = read()
    return None if start is None else lambda: ((read() or start) - start) / 1e3
