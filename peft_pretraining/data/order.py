"""The order of documents: a pure function of the seed, the epoch and the files, shuffled block by block.

Consecutive records form a block of at most BUFFER_RECORDS and BUFFER_BYTES, and each block is permuted by itself. A
sliding shuffle buffer would mix a little further, but its content is the result of all that went before; a block can be
read again from where it begins.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from peft_pretraining.data.position import Block, EarlierReaders, Position, owner
from peft_pretraining.errors import UserError

F = TypeVar("F")


class Dialogue(NamedTuple):
    """A document of which only some stretches are to be learned.

    text: the whole of it, with special tokens spelled out.
    answers: begin and end of each stretch, in characters, in their order.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


# A document, or where it is tokenized already, the token ids of each of its pieces.
Text = str | Dialogue | list[np.ndarray]


def content_of(text: str | Dialogue) -> str:
    """The whole text of a document."""
    return text.text if isinstance(text, Dialogue) else text


# One block, which is what a reader holds in memory. 10,000 lines of C4 are 22 MB.
BUFFER_RECORDS = 10_000
BUFFER_BYTES = 64 * 2**20

# Virtual readers of a new run: 1, 2, 4, 8 or 16 processes share them evenly. The more they are, the more one process
# has to read ahead as they part: with 96, its first 6M tokens took a fifth longer.
READERS = 16


class Document(NamedTuple):
    """A document, or a piece of a long one."""

    text: Text
    position: Position  # its place in the data
    last: bool = True  # whether the document ends with it
    reader: int = 0  # whose it is


class Skipped(NamedTuple):
    """Stands in the place of a document that cannot be read."""

    reason: str  # one line that names the file and the line
    reader: int = 0  # whose it would be


class Undecoded(Protocol):
    """A record: a document that has not been decoded yet."""

    @property
    def line(self) -> int:
        """Number of the line or row, from 1, at which reading can begin."""

    @property
    def size(self) -> int:
        """Approximate size in bytes."""

    def text(self) -> Text:
        """Decodes. Raises UserError."""


def in_one_part(files: Sequence[F], *, seed: int, epoch: int, shuffle: bool) -> list[list[F]]:
    """The parts of an epoch that is one part: blocks of the shuffle span small files."""
    if not shuffle:
        return [list(files)]
    return [random.Random(f"documents {seed} {epoch}").sample(files, len(files))]


class OrderedDocuments(Generic[F]):
    """Documents in parts, files and records, which a subclass defines. `F` is its type of a file."""

    readers: int = READERS  # see DocumentSource

    def __init__(self, *, seed: int, shuffle: bool) -> None:
        self.seed = seed
        self.shuffle = shuffle

    def parts(self, epoch: int) -> list[list[F]]:
        """The files of each part, in the order of the epoch. Every epoch has the same number of parts."""
        raise NotImplementedError

    def records(self, file: F, *, line: int) -> Iterator[Undecoded]:
        """The records of a file, in file order, beginning with the one at `line`."""
        raise NotImplementedError

    def keeps(self, text: str) -> bool:
        """Whether a document belongs to this source."""
        return True

    def together(self, readers: int) -> bool:
        """See DocumentSource.together."""
        return readers > len(self.parts(0))

    def read(
        self,
        *,
        epoch: int,
        readers: int = 1,
        starts: Mapping[int, Position] | None = None,
        earlier: Sequence[EarlierReaders] = (),
    ) -> Iterator[Document | Skipped]:
        """See DocumentSource.read."""
        parts = self.parts(epoch)
        share = {"parts": len(parts), "readers": readers}
        starts = dict.fromkeys(range(readers), Position()) if starts is None else starts
        for part, files in enumerate(parts):
            here = starts
            if readers <= len(parts):
                whose = owner(epoch, part, 0, **share)
                if whose not in starts:
                    continue
                here = {whose: starts[whose]}
            begin = min(start.begin(epoch, part) for start in here.values())
            begin = max([begin, *(layout.begin(epoch, part, parts=len(parts)) for layout in earlier)])
            for block, number, record in self._part(epoch, part, files, begin=begin):
                place = (epoch, part, number)
                reader = owner(*place, **share)
                start = here.get(reader)
                if start is None or place < start.place:
                    continue
                if any(layout.has_read(*place, parts=len(parts)) for layout in earlier):
                    continue
                yield from self.decode(record, Position(*place, block), reader=reader)

    def _part(self, epoch: int, part: int, files: list[F], *, begin: Block) -> Iterator[tuple[Block, int, Undecoded]]:
        """The records of a part from a block on, each with its block and its number."""
        for block, records in self._blocks(files, begin):
            if self.shuffle:
                random.Random(f"documents {self.seed} {epoch} {part} {block.document}").shuffle(records)
            records.reverse()
            number = block.document
            while records:  # popped, so that a block is gone before the next one is read
                yield block, number, records.pop()
                number += 1

    def _blocks(self, files: list[F], begin: Block) -> Iterator[tuple[Block, list[Undecoded]]]:
        room = BUFFER_RECORDS if self.shuffle else 1
        block, held, size, count = begin, list[Undecoded](), 0, begin.document
        for file, record in self._walk(files, begin):
            if held and (len(held) >= room or size + record.size > BUFFER_BYTES):
                yield block, held
                block, held, size = Block(file, record.line, count), [], 0
            held.append(record)
            size += record.size
            count += 1
        if held:
            yield block, held

    def _walk(self, files: list[F], begin: Block) -> Iterator[tuple[int, Undecoded]]:
        for number in range(begin.file, len(files)):
            for record in self.records(files[number], line=begin.line if number == begin.file else 1):
                yield number, record

    def decode(self, record: Undecoded, position: Position, *, reader: int = 0) -> Iterator[Document | Skipped]:
        try:
            text = record.text()
        except UserError as error:
            yield Skipped(str(error), reader)
            return
        if isinstance(text, list) or self.keeps(content_of(text)):
            yield Document(text, position, reader=reader)
