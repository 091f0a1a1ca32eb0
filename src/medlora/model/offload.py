"""What a recomputed layer keeps, in host memory until the backward pass comes back for it.

Layers go out in order and come back in reverse, so when one is asked for, the one before it is already on
its way: copies run on a stream of their own, beside the layers' products. Device memory is that of the layers' stream,
which waits before it is freed, so that a CUDA graph can be captured of all this. Host memory is pinned, since only from
there copies are asynchronous, and torch's allocator hands the same blocks out again in the next step.
"""

# torch leaves its stream untyped
# mypy: allow-untyped-calls
from typing import Any

import torch
from torch import Tensor

AHEAD = 2  # tensors that may be on their way to the host while layers go on


class Offload:
    """What one row has sent to the host.

    Args:
        stream: that copies run on; None on a CPU.
        room: pinned tensors to copy to, made with the longest row, which comes first; without, each row makes its own.
    """

    def __init__(self, stream: Any, room: list[Tensor] | None = None) -> None:
        self.room = room
        self.host: list[Tensor] = []
        self.leaving: list[tuple[Tensor, Any]] = []
        """The last tensors sent, each with the event of its departure."""
        self.back: dict[int, tuple[Tensor, Any]] = {}
        """Tensors on their way to the device, by their place in `host`, each with the event of its arrival."""
        self.stream = stream

    def send(self, x: Tensor) -> int:
        """Copy x to the host; what `fetch` takes to bring it back."""
        host = self._host(x)
        if x.is_cuda:
            if len(self.leaving) == AHEAD:
                self._wait(self.leaving.pop(0)[1])
            self.stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(self.stream):
                host.copy_(x, non_blocking=True)
                self.leaving.append((x, self.stream.record_event()))
        else:
            host.copy_(x)
        self.host.append(host)
        return len(self.host) - 1

    def settle(self) -> None:
        """Have the layers' stream wait for what is under way."""
        for _, done in (*self.back.values(), *self.leaving):
            self._wait(done)
        self.leaving.clear()

    def _wait(self, done: Any) -> None:
        if done is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(done)

    def _host(self, x: Tensor) -> Tensor:
        if self.room is not None and len(self.host) < len(self.room):
            return self.room[len(self.host)][: len(x)]
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        if self.room is not None:
            self.room.append(host)
        return host

    def fetch(self, place: int, device: torch.device) -> Tensor:
        """The tensor again, on `device`; the last one sent first."""
        if self.leaving:
            self.settle()
        self._set_out(place, device)
        x, arrived = self.back.pop(place)
        self._wait(arrived)
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
        x = torch.empty_like(self.host[place], device=device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # until who had its memory before has passed
        with torch.cuda.stream(self.stream):
            x.copy_(self.host[place], non_blocking=True)
            self.back[place] = x, self.stream.record_event()
