"""How much memory is free: of a GPU, or of the host within the limits of the container or batch job that we run in."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

GROUPS, OURS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# by version of control groups: the folder of its memory controller, limit, use, and what of the use is page cache
V2 = "", "memory.max", "memory.current", "inactive_file"
V1 = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def free_bytes(device: torch.device) -> int:
    """What could be allocated now; on a GPU with what torch holds and has not given out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(min([psutil.virtual_memory().available, *_limits()]))


def _limits() -> Iterator[int]:
    """What each control group above this process still allows; a group without a limit says nothing, or 2^63."""
    for line in OURS.read_text().splitlines() if OURS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, used, cached = V1 if controllers else V2
        group = GROUPS / root / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such group or limit ("max"), or none of our business
                free = int((folder / limit).read_text()) - int((folder / used).read_text())
                with suppress(OSError, ValueError):
                    stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                    free += int(stat.get(cached, 0))
                yield free
