"""Where the gradients of several micro-batches are summed: on the device, or in host memory.

On the host, the sums of a whole model take nothing of a GPU, which gives a 7B the methods that need the whole gradient
of an update. Every micro-batch but the last moves each sum over the bus and back, beside the backward pass, in a stream
of its own; the first only there, the last only back. Additions are made on the device, so no bit is another.
"""

from collections import deque

import torch
from torch import Tensor

ARENA = 1 << 28  # bytes; pinned memory comes in powers of two, so small pieces share one
IN_FLIGHT = 2  # parts that wait for their copy to the host, before the backward pass waits for the oldest


class Sums(dict[Tensor, Tensor]):
    """Sums by parameter, between the first and the last micro-batch of an update, on the device."""

    def add(self, p: Tensor, part: Tensor) -> None:
        """Adds a micro-batch. The part may be kept and changed."""
        self[p] = self[p].add_(part) if p in self else part

    def take(self, p: Tensor) -> Tensor:
        """The sum, on the device of its parameter. It is given up here."""
        return self.pop(p)


class HostSums(Sums):
    """Sums in pinned host memory. Those of parameters that are there already stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self._arenas: list[Tensor] = []
        self._arena = self._used = 0  # the arena that is being filled, and its bytes in use
        self._stream: torch.cuda.Stream | None = None
        self._waiting: deque[tuple[torch.cuda.Event, Tensor]] = deque()  # what the copies read must not be freed before

    def add(self, p: Tensor, part: Tensor) -> None:
        if not _elsewhere(part):
            super().add(p, part)
        elif part.is_cuda:
            self._add_beside(p, part)
        else:
            self._add(p, part)

    def take(self, p: Tensor) -> Tensor:
        host = self.pop(p)
        if not _elsewhere(p):
            return host
        if self._stream is not None:
            torch.cuda.current_stream(p.device).wait_stream(self._stream)
            self._waiting.clear()
        return _to_device(host, p)

    def _add_beside(self, p: Tensor, part: Tensor) -> None:
        """Adds in the stream of the copies, while the backward pass goes on."""
        current = torch.cuda.current_stream(part.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(part.device)
        self._stream.wait_stream(current)  # it made the part, and may still read what is written over
        with torch.cuda.stream(self._stream):
            self._add(p, part)
            self._waiting.append((self._stream.record_event(), part))
        if len(self._waiting) > IN_FLIGHT:
            current.wait_event(self._waiting.popleft()[0])

    def _add(self, p: Tensor, part: Tensor) -> None:
        if p in self:
            self[p].copy_(_to_device(self[p], p).add_(part), non_blocking=True)
            return
        if not self:  # an update begins
            self._arena = self._used = 0
        self[p] = self._host(part).copy_(part, non_blocking=True)

    def _host(self, part: Tensor) -> Tensor:
        """Host memory for a tensor like this one, until the update ends."""
        if part.is_meta:
            return torch.empty_like(part)
        size = -(-part.nbytes // 64) * 64
        while self._arena < len(self._arenas) and self._used + size > self._arenas[self._arena].nbytes:
            self._arena, self._used = self._arena + 1, 0
        if self._arena == len(self._arenas):
            whole = max(ARENA, 1 << (size - 1).bit_length())
            self._arenas.append(torch.empty(whole, dtype=torch.uint8, pin_memory=part.is_cuda))
        piece = self._arenas[self._arena][self._used : self._used + part.nbytes]
        self._used += size
        return piece.view(part.dtype).view(part.shape)


def _elsewhere(tensor: Tensor) -> bool:
    """Whether it is not in host memory."""
    return tensor.device.type != "cpu"


def _to_device(host: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(host, device=p.device, pin_memory=False).copy_(host, non_blocking=True)
