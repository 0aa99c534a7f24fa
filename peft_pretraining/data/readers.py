"""Virtual readers: what makes the order of the data the same for any number of ranks and workers.

A run has a fixed number of virtual readers, V. Each reads its own documents and packs them into its own endless
sequences. Sequence j of the run is the next one of reader j mod V. The ranks take these sequences in turn, and the
workers of a rank take those of the rank in turn. So an update has the same sequences however it is split, and a run is
where its V readers are.

Here is one worker. It is due every S-th sequence, where S = ranks x workers. If S divides V, these come from V / S
readers that are its own, and no document is read by two workers. If not, several workers read the same documents, and
each passes over the sequences that are due to the others: right, but slower.

Where readers share files, as they do all local ones, one walk over the files serves all readers of the worker, and
deals each document to its reader. Readers with shorter documents run ahead of the others, whose documents wait. If too
many bytes wait, the readers behind go on with a walk of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import count, takewhile
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from peft_pretraining.data.order import Skipped
from peft_pretraining.data.packing import Packing, Sequence, make_packer
from peft_pretraining.data.pieces import Piece, encode
from peft_pretraining.data.position import Position, Progress
from peft_pretraining.data.sources import DocumentSource
from peft_pretraining.errors import UserError

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

BACKLOG = 64 * 2**20  # bytes of token ids that may wait for their readers
EMPTY_EPOCHS = 20  # times that each document was due to the readers of a walk, after which there is no document
MAX_SKIPPED = 64  # bad documents that a reader keeps to itself while it looks for a good one


def useful_workers(workers: int, *, world_size: int, readers: int) -> int:
    """The largest number of workers, of at most `workers`, that have readers of their own. At least 1."""
    own = readers // gcd(world_size, readers)
    return max(number for number in range(1, max(1, workers) + 1) if own % number == 0)


class Readers:
    """The virtual readers of one worker."""

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        packing: Packing,
        progress: Progress,
        first: int,
        step: int,
    ) -> None:
        """Reads nothing yet.

        max_length: tokens of a sequence, L.
        progress: where the run is in the data.
        first: number of the first sequence that this worker is due, counted from the start of the run.
        step: number of sequences from one that it is due to the next.
        """
        self.source, self.tokenizer = source, tokenizer
        self.max_length, self.packing = max_length, packing
        self.progress, self.first, self.step = progress, first, step
        every = gcd(step, len(progress.readers))
        own = range(first % every, len(progress.readers), every)
        self._waiting: dict[int, deque[Piece | Skipped]] = {reader: deque() for reader in own}
        self._walks: dict[int, _Walk] = {}
        self._backlog = 0  # bytes of all that waits
        together = source.together(len(progress.readers))
        for readers in [list(own)] if together else [[reader] for reader in own]:
            self._begin_walk({reader: progress.readers[reader] for reader in readers})

    def sequences(self) -> Iterator[Sequence]:
        """The sequences that this worker is due, without end."""
        readers, had = len(self.progress.readers), self.progress.sequences
        streams = {reader: self._pack(reader) for reader in self._waiting}
        done = {reader: (had - reader + readers - 1) // readers for reader in streams}  # sequences of each, so far
        for number in count(self.first, self.step):
            reader, before = number % readers, number // readers
            for _ in range(done[reader], before):
                next(streams[reader])  # another worker's
            done[reader] = before + 1
            yield next(streams[reader])

    def _pack(self, reader: int) -> Iterator[Sequence]:
        position, length = self.progress.readers[reader], self.max_length
        packer = make_packer(self.packing, self.tokenizer, length=length, eos_first=position.eos_first)
        reported = position.reported
        skipped: list[str] = []
        for item in self._documents(reader):
            if isinstance(item, Piece):
                for sequence in packer.add(item):
                    position = sequence.position
                    yield sequence._replace(skipped=tuple(skipped)) if skipped else sequence
                    skipped.clear()
                continue
            if reported:
                reported -= 1
                continue
            skipped.append(item.reason)
            if len(skipped) == MAX_SKIPPED:  # report them now, with a sequence that has no targets
                position = position._replace(reported=position.reported + MAX_SKIPPED)
                yield Sequence(packer.nothing(), position, tuple(skipped))
                skipped.clear()

    def _documents(self, reader: int) -> Iterator[Piece | Skipped]:
        """What the reader packs: what waits for it, else what its walk comes to, which may be for others."""
        waiting = self._waiting[reader]
        while True:
            while not waiting:
                walk = self._walks[reader]
                item = next(walk.items)
                if self._walks[item.reader] is not walk:
                    continue  # that reader has parted since this was tokenized
                self._waiting[item.reader].append(item)
                self._backlog += _size(item)
                if self._backlog > BACKLOG and item.reader != reader:
                    self._part_ways()
            item = waiting.popleft()
            self._backlog -= _size(item)
            yield item

    def _begin_walk(self, starts: dict[int, Position]) -> None:
        self._walks |= dict.fromkeys(starts, _Walk(starts, self._walk(starts)))

    def _walk(self, starts: dict[int, Position]) -> Iterator[Piece | Skipped]:
        """The tokenized documents of these readers, epoch after epoch without end."""
        readers, earlier = len(self.progress.readers), self.progress.earlier
        begin = min(start.epoch for start in starts.values())
        last = begin  # epoch in which there was a document
        for epoch in count(begin):
            documents = self.source.read(epoch=epoch, readers=readers, starts=starts, earlier=earlier)
            for item in encode(documents, self.tokenizer, starts=starts):
                if isinstance(item, Piece):
                    last = epoch
                yield item
            # Shares move on with the epoch, so even where readers outnumber documents each has one soon.
            if epoch - last >= EMPTY_EPOCHS * readers // len(starts):
                raise UserError(f"no document with text in {self.source.name}. Is it empty?")

    def _part_ways(self) -> None:
        """Lets the half of a walk's readers that most waits for begin a walk of their own, from what waits first."""
        sizes = {reader: sum(map(_size, items)) for reader, items in self._waiting.items()}
        largest = max(self._walks.values(), key=lambda walk: sum(sizes[reader] for reader in walk.starts)).starts
        starts = {}
        for reader in sorted(largest, key=sizes.__getitem__)[(len(largest) + 1) // 2 :]:
            items = self._waiting[reader]
            bad = list(takewhile(lambda item: isinstance(item, Skipped), items))  # they stay: they have no position
            if len(bad) < len(items):
                starts[reader] = items[len(bad)].position  # type: ignore[union-attr]
                self._backlog -= sizes[reader]
                items.clear()
                items.extend(bad)
                del largest[reader]
        if starts:
            self._begin_walk(starts)


class _Walk(NamedTuple):
    """A walk over the files for some readers."""

    starts: dict[int, Position]  # where each of them began
    items: Iterator[Piece | Skipped]  # what belongs to them, without end


def _size(item: Piece | Skipped) -> int:
    """Bytes of memory. Token ids of shards take none: they are mapped."""
    if isinstance(item, Skipped):
        return 0
    whole = item.ids if item.ids.base is None else item.ids.base
    return item.ids.nbytes if isinstance(whole, np.ndarray) and whole.flags.owndata else 0
