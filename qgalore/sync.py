"""Sums of gradients over data-parallel ranks, without a wrapper around the model.

The loss of every rank is divided by the target tokens of all ranks, so gradients are summed, not averaged. Every rank
gets the same bits, and therefore the same weights.

The sums of an update are an `Exchange`. Collectives must be started in the same order on every rank, and ranks may
finish their gradients in different orders, or have none for some parameter. So an exchange has an order of its own: a
gradient is sent as soon as all before it are sent, and what is missing on a rank when backward is over counts as zeros
there.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 1 << 14  # elements; parameters up to this size are sent together, at the end
IN_FLIGHT = 2  # sums on their way before the next gradient waits for the oldest: each keeps its gradient alive


class GradSync:
    """Sums tensors over the ranks of a process group.

    With one process, nothing is sent.
    """

    def __init__(
        self,
        *,
        at_rank_size: bool = True,
        enabled: bool = True,
        group: dist.ProcessGroup | None = None,
        order: Iterable[Tensor] = (),
    ) -> None:
        """
        at_rank_size: whether each gradient is summed in its subspace if it can be, so that r numbers travel instead of
            n. Otherwise whole gradients are summed before the step, as clipping by their norm needs.
        enabled: False where something else has summed the gradients, such as FSDP2.
        group: the process group; None for the default one.
        order: parameters in the order in which backward comes to them, for the best overlap. Others follow.
        """
        self.group = group
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        self.parallel = enabled and several
        self.at_rank_size = self.parallel and at_rank_size
        self._places = {p: place for place, p in enumerate(order)}

    def exchange(self, parameters: Iterable[Tensor], *, inside: bool) -> "Exchange":
        """An exchange of one gradient for each of the parameters, whose order is the same on every rank.

        inside: whether the optimizer asks, which sums at rank size or not at all.
        """
        last = len(self._places)
        ordered = sorted(parameters, key=lambda p: self._places.get(p, last))
        return Exchange(ordered, sync=self, active=self.at_rank_size if inside else self.parallel)

    def start(self, tensor: Tensor) -> dist.Work:
        """Starts to sum a contiguous tensor over the ranks, in place."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work


class Exchange:
    """The sums over the ranks of one update, or of one micro-batch. It can be used again after `finish`.

    `send` and `finish` yield what has arrived: parameters and their sums, the same bits on every rank. Where nothing is
    to be sent, with one process for example, everything arrives at once.
    """

    def __init__(self, parameters: Iterable[Tensor], *, sync: GradSync, active: bool) -> None:
        """active: whether anything is sent."""
        self.sync, self.active, self._order = sync, active, list(parameters)
        self._begin()

    def _begin(self) -> None:
        self._given: set[Tensor] = set()  # what this rank has a part of
        self._parts: dict[Tensor, Tensor] = {}  # those parts until they arrive as sums
        self._queue = deque(p for p in self._order if p.numel() > SMALL)  # not on their way yet
        self._flying: deque[tuple[Tensor, dist.Work]] = deque()

    def send(self, p: Tensor, part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Gives this rank's part of a sum, which may be written over."""
        if not self.active:
            yield p, part
            return
        self._given.add(p)
        self._parts[p] = part.contiguous()
        self._start()
        while len(self._flying) > IN_FLIGHT:
            yield self._land()

    def finish(self, missing: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Sends the rest. Parameters that have a gradient on no rank do not arrive.

        missing: makes the part of a parameter that this rank has no gradient of: zeros, of the shape and dtype that the
            other ranks send.
        """
        if not self.active or not self._order:
            return
        absent = [p for p in self._order if p not in self._given]
        self._parts |= {p: missing(p).contiguous() for p in absent}
        self._start()
        bucket, work = self._start_bucket(absent)
        landed = [self._land() for _ in range(len(self._flying))] if absent else []
        while self._flying:
            yield self._land()
        work.wait()
        present = set(self._order)
        if absent:  # only then is it worth waiting for the device
            there = bucket[-len(self._order) :].tolist()
            present = {p for p, ranks in zip(self._order, there, strict=True) if ranks}
        landed += [(p, self._parts[p]) for p in self._open_bucket(bucket)]
        self._order.sort(key=lambda p: p not in present)  # so that what no rank needs holds nothing up the next time
        self._begin()
        yield from ((p, total) for p, total in landed if p in present)

    def _start(self) -> None:
        while self._queue and self._queue[0] in self._parts:
            p = self._queue.popleft()
            self._flying.append((p, self.sync.start(self._parts[p])))

    def _land(self) -> tuple[Tensor, Tensor]:
        p, work = self._flying.popleft()
        work.wait()  # on a GPU its stream waits, not this process
        return p, self._parts.pop(p)

    @property
    def _small(self) -> list[Tensor]:
        return [p for p in self._order if p.numel() <= SMALL]

    def _start_bucket(self, absent: Collection[Tensor]) -> tuple[Tensor, dist.Work]:
        """All small parts in one tensor, and then for each parameter whether this rank has its gradient."""
        parts = [self._parts[p].flatten() for p in self._small]
        gone = set(absent)
        there = torch.tensor([p not in gone for p in self._order], dtype=torch.float32)
        bucket = torch.cat([*parts, there.to(self._order[0].device)])  # promotes to float32 or wider
        return bucket, self.sync.start(bucket)

    def _open_bucket(self, bucket: Tensor) -> list[Tensor]:
        """Writes the sums over the small parts. Returns the parameters."""
        small = self._small
        sizes = [self._parts[p].numel() for p in small]
        for p, piece in zip(small, bucket[: sum(sizes)].split(sizes), strict=True):
            self._parts[p].view(-1).copy_(piece)
        return small
