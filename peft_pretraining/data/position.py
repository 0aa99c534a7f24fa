"""Where a run is in the endless order of its documents, in a few integers that JSON can hold.

The order of documents is a pure function of the seed, so that a position needs no content: an epoch consists of parts
(one for local files, one a shard for the hub), a part of files, and the records of a part come block by block. To go
on, a reader opens the file at the line where its block begins, reads this block again and skips what it has read.

Readers (ranks x workers) share documents by a rule, `owner`. A run with another number of readers keeps the old
readers' positions as `EarlierReaders`: a document has been read if its owner among earlier readers was past it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from loguru import logger

from peft_pretraining.errors import UserError


class Block(NamedTuple):
    """Where a block of records begins. Blocks of one part compare like their places."""

    file: int  # number of the file within the part
    line: int  # 1-based line (or row) of the file
    document: int  # number of its first record within the part


PART_START = Block(0, 1, 0)
PART_END = Block(sys.maxsize, 0, 0)


class Position(NamedTuple):
    """Where a reader resumes: every earlier document of this reader is finished.

    The last four fields say how much of the current document has been consumed.
    document: number of the current document within the part, in shuffled order. It need not belong to the reader, and
        need not exist.
    """

    epoch: int = 0
    part: int = 0
    document: int = 0
    block: Block = PART_START  # that of the document, or an earlier one of the part
    piece: int = 0  # long documents are tokenized in pieces: the pieces before this one are done
    used: int = 0  # tokens of the piece that are done
    eos_first: bool = False  # whether the EOS of the document before is still to be trained from
    reported: int = 0  # bad documents from here on that have been reported

    @property
    def place(self) -> tuple[int, int, int]:
        """What positions are compared by: epoch, part, document."""
        return self[:3]

    def after(self, *, eos_first: bool = False) -> Position:
        """The position behind this document."""
        return self._replace(document=self.document + 1, piece=0, used=0, eos_first=eos_first)

    def begin(self, epoch: int, part: int) -> Block:
        """The block of that part before which nothing is left to read: PART_START, PART_END, or the one in hand."""
        if (self.epoch, self.part) == (epoch, part):
            return self.block
        return PART_END if (self.epoch, self.part) > (epoch, part) else PART_START

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: integers and a list of them."""
        return {**self._asdict(), "block": list(self.block)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Position:
        """The inverse of to_json."""
        return cls(**{**saved, "block": Block(*saved["block"])})


def owner(epoch: int, part: int, document: int, *, parts: int, readers: int) -> int:
    """The reader of this document. Readers take whole parts if there are enough of them, else every n-th document.

    Turns move on with the epoch, so that readers all get some documents even if they outnumber them.
    """
    turn = part if readers <= parts else part + document
    return (turn - epoch) % readers


@dataclass(frozen=True)
class EarlierReaders:
    """The positions of the readers before their number changed."""

    positions: tuple[Position, ...]

    def has_read(self, epoch: int, part: int, document: int, *, parts: int) -> bool:
        """Whether the document's reader was past it. A document that was cut in the middle is read again."""
        reader = owner(epoch, part, document, parts=parts, readers=len(self.positions))
        return (epoch, part, document) < self.positions[reader].place

    def begin(self, epoch: int, part: int, *, parts: int) -> Block:
        """The block of the part before which every document has been read."""
        readers = len(self.positions)
        owners = {owner(epoch, part, number, parts=parts, readers=readers) for number in range(readers)}
        return min(self.positions[reader].begin(epoch, part) for reader in owners)

    @cached_property
    def json(self) -> list[dict[str, Any]]:
        return [position.to_json() for position in self.positions]

    @classmethod
    def from_json(cls, saved: list[dict[str, Any]]) -> EarlierReaders:
        return cls(tuple(map(Position.from_json, saved)))


@dataclass(frozen=True)
class Progress:
    """How far one rank has come in the data."""

    positions: tuple[Position, ...]  # position of each of its workers
    world_size: int  # number of ranks
    turn: int = 0  # the worker that the next sequence comes from
    earlier: tuple[EarlierReaders, ...] = ()  # earlier readers that still matter, oldest first

    @classmethod
    def at_start(
        cls, *, world_size: int, workers: int, epoch: int = 0, earlier: tuple[EarlierReaders, ...] = ()
    ) -> Progress:
        """The progress of a rank at its start.

        workers: number of its workers, at least 1.
        epoch: the epoch that it begins with.
        """
        return cls((Position(epoch=epoch),) * workers, world_size=world_size, earlier=earlier)

    def advance(self, position: Position) -> Progress:
        """After one more sequence, which leaves the worker whose turn it was at `position`."""
        positions = (*self.positions[: self.turn], position, *self.positions[self.turn + 1 :])
        return replace(self, positions=positions, turn=(self.turn + 1) % len(positions))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of a few integers a worker; earlier readers are shared, not copied."""
        return {
            "world_size": self.world_size,
            "turn": self.turn,
            "readers": [position.to_json() for position in self.positions],
            "earlier": [readers.json for readers in self.earlier],
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Progress:
        """The inverse of to_json."""
        positions = tuple(map(Position.from_json, saved["readers"]))
        earlier = tuple(map(EarlierReaders.from_json, saved["earlier"]))
        return cls(positions, world_size=saved["world_size"], turn=saved["turn"], earlier=earlier)


def resume_progress(saved: Sequence[dict[str, Any]], *, rank: int, world_size: int, workers: int) -> Progress:
    """Where `rank` goes on, from the saved positions of all ranks of the run before.

    The same ranks and workers go on exactly where they were. Others share out what is left, document by document: the
    documents that were cut in the middle, at most one a reader, are read again from their start, with a warning.

    Raises UserError if `saved` is not the position of a whole run.
    """
    try:
        ranks = [Progress.from_json(one) for one in saved]
        if not ranks or {one.world_size for one in ranks} != {len(ranks)}:
            raise ValueError(f"{len(ranks)} ranks of {ranks[0].world_size if ranks else 'none'}")
        turns = zip(*(one.positions for one in ranks), strict=True)
        before = EarlierReaders(tuple(position for turn in turns for position in turn))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the saved data position cannot be used ({error}). Resume from another checkpoint.") from error
    epoch = min(position.epoch for position in before.positions)
    own = (len(ranks), len(ranks[0].positions))
    if own == (world_size, workers):
        return replace(ranks[rank], earlier=_that_matter(ranks[rank].earlier, epoch=epoch))
    if rank == 0:
        logger.warning(
            f"the data was read by {own[0]} ranks x {own[1]} workers, now by {world_size} x {workers}: "
            "the order goes on, but documents that were cut in the middle are read again from their start"
        )
    earlier = _that_matter((*ranks[0].earlier, before), epoch=epoch)
    return Progress.at_start(world_size=world_size, workers=workers, epoch=epoch, earlier=earlier)


def _that_matter(layouts: tuple[EarlierReaders, ...], *, epoch: int) -> tuple[EarlierReaders, ...]:
    """The layouts that had reached this epoch, which is the first one that is still being read."""
    return tuple(layout for layout in layouts if max(position.epoch for position in layout.positions) >= epoch)
