"""Energy counters against made-up ones, and on a GPU against its own power reading."""

import ctypes
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medlora.train import energy


def package(folder: Path, name: str, used: int, wrap: int = 10**9) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "max_energy_range_uj").write_text(f"{wrap}\n")
    (folder / name / "energy_uj").write_text(f"{used}\n")
    return folder / name / "energy_uj"


def test_packages_add_up_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 5_000_000), package(tmp_path, "intel-rapl:1", 0)
    core = package(tmp_path, "intel-rapl:0:0", 0)
    used = energy.cpu(tmp_path)
    for counter, value in ((first, 7_000_000), (second, 500_000), (core, 10**8)):
        counter.write_text(f"{value}\n")
    assert used is not None and used() == pytest.approx(2.5)


def test_a_counter_that_wrapped_around_still_gives_what_was_used(tmp_path: Path) -> None:
    counter = package(tmp_path, "intel-rapl:0", 999_000_000, wrap=999_999_999)
    used = energy.cpu(tmp_path)
    counter.write_text("1000000\n")
    assert used is not None and used() == pytest.approx(2.0)


def test_without_counters_there_is_no_figure(tmp_path: Path) -> None:
    assert energy.cpu(tmp_path) is None


def nvml(*readings: int, failed: int = 0) -> Any:
    left = list(readings)

    def read(device: Any, out: Any) -> int:
        ctypes.cast(out, ctypes.POINTER(ctypes.c_ulonglong))[0] = left.pop(0)
        return failed

    return SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByUUID=lambda uuid, out: 0,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )


def test_nvml_counts_in_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab-cd"))
    used = energy.gpu(library=nvml(1_000, 251_000))
    assert used is not None and used() == pytest.approx(250.0)
    assert energy.gpu(library=nvml(0, failed=3)) is None  # NVML_ERROR_NOT_SUPPORTED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_busy_gpu_uses_energy() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    with energy.Meter() as meter:
        stop = time.monotonic() + 2
        while time.monotonic() < stop:
            (a @ a).sum().item()
    assert meter.joules is not None and 20 < meter.joules < 4000  # 10 W to 2 kW
