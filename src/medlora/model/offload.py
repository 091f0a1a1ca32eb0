"""What a recomputed layer keeps, in host memory until the backward pass comes back for it.

Layers go out in order and come back in reverse, so when one is asked for, the one before it is already on
its way: copies run on a stream of their own, beside the layers' products. Host memory is pinned, since only
from there copies are asynchronous, and torch's allocator hands the same blocks out again in the next step.
"""

# torch leaves its stream untyped
# mypy: allow-untyped-calls
from typing import Any

import torch
from torch import Tensor


class Offload:
    """What one row has sent to the host.

    Args:
        stream: that copies run on; None on a CPU.
    """

    def __init__(self, stream: Any) -> None:
        self.host: list[Tensor] = []
        self.back: dict[int, tuple[Tensor, Any]] = {}
        """Tensors on their way to the device, by their place in `host`, each with the event of its arrival."""
        self.stream = stream

    def send(self, x: Tensor) -> int:
        """Copy x to the host; what `fetch` takes to bring it back."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        if x.is_cuda:
            self.stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(self.stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(self.stream)
        else:
            host.copy_(x)
        self.host.append(host)
        return len(self.host) - 1

    def fetch(self, place: int, device: torch.device) -> Tensor:
        """The tensor again, on `device`; the last one sent first."""
        self._set_out(place, device)
        x, arrived = self.back.pop(place)
        if arrived is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(arrived)
            x.record_stream(current)
        del self.host[place:]  # layers come back in reverse: nothing after this one is asked for again
        if place:
            self._set_out(place - 1, device)
        return x

    def _set_out(self, place: int, device: torch.device) -> None:
        if place in self.back:
            return
        if self.stream is None:
            self.back[place] = self.host[place].clone(), None
            return
        with torch.cuda.stream(self.stream):
            x = self.host[place].to(device, non_blocking=True)
            self.back[place] = x, self.stream.record_event()
