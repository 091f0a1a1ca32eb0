"""Free memory within a container's limits, from files in the kernel's own form."""

from pathlib import Path

import psutil
import pytest
import torch

from medlora.model import memory

GIB = 2**30
CPU = torch.device("cpu")


def group(folder: Path, version: int, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cached}\nfile 7\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OURS", tmp_path / "own")
    return tmp_path


def test_a_job_has_what_the_tightest_group_above_it_leaves(tree: Path) -> None:
    (tree / "own").write_text("0::/slurm/job_7/step_0\n")
    group(tree / "cgroup/slurm/job_7/step_0", 2, "max", GIB, 0)
    group(tree / "cgroup/slurm/job_7", 2, str(3 * GIB), 2 * GIB, GIB // 2)
    group(tree / "cgroup/slurm", 2, str(500 * GIB), 2 * GIB, 0)
    assert memory.free_bytes(CPU) == min(psutil.virtual_memory().available, 3 * GIB // 2)


def test_a_container_of_the_first_version_sees_the_host_s_path_and_its_own_root(tree: Path) -> None:
    (tree / "own").write_text("5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n")
    group(tree / "cgroup/memory", 1, str(2 * GIB), GIB, GIB // 4)
    assert memory.free_bytes(CPU) == min(psutil.virtual_memory().available, 5 * GIB // 4)


def test_without_groups_all_that_is_free_counts(tree: Path) -> None:
    assert memory.free_bytes(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.05)
    group(tree / "cgroup", 2, "max", GIB, 0)
    (tree / "own").write_text("0::/\n")
    assert memory.free_bytes(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.05)


def test_what_cannot_be_read_limits_nothing(tree: Path) -> None:
    (tree / "own").write_text("0::/a/b\n")
    for name, text in (("a/b/memory.max", ""), ("a/memory.max", str(GIB)), ("memory.max", str(3 * GIB))):
        (tree / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "cgroup" / name).write_text(text)
    (tree / "cgroup/memory.current").write_text(str(GIB))  # and no memory.stat
    assert memory.free_bytes(CPU) == min(psutil.virtual_memory().available, 2 * GIB)
