"""Where a run is in the endless order of its documents, in a few integers that JSON can hold.

The order of documents is a pure function of the seed, so that a position needs no content: an epoch consists of parts
(one for local files, one a shard for the hub), a part of files, and the records of a part come block by block. To go
on, a reader opens the file at the line where its block begins, reads this block again and skips what it has read.

A run has a fixed number of virtual readers, which share documents by a rule, `owner`, and have a position each. Its
progress is all of these positions, and does not depend on the ranks and workers that read for them (see readers.py).

A run from before virtual readers had one reader for each worker of each rank. The same rules held for these, so its
positions are read as those of so many virtual readers. Where they are too few to be shared out, the run gets new
readers and keeps the old positions as `EarlierReaders`: a document has been read if its old reader was past it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON, one entry a reader."""
        return [position.to_json() for position in self.positions]

    @classmethod
    def from_json(cls, saved: list[dict[str, Any]]) -> EarlierReaders:
        """The inverse of to_json."""
        return cls(tuple(map(Position.from_json, saved)))


@dataclass(frozen=True)
class Progress:
    """How far a run has come in the data, whatever the number of its ranks and workers."""

    readers: tuple[Position, ...]  # position of each virtual reader
    sequences: int = 0  # sequences that all ranks together have had
    earlier: tuple[EarlierReaders, ...] = ()  # earlier readers that still matter, oldest first

    @classmethod
    def merged(cls, ranks: Sequence[Progress]) -> Progress:
        """The progress of a run, from what each of its ranks knows after the same number of batches.

        The position of a reader is right on the rank that had its last sequence, and an earlier one on others.
        """
        assert len({one.sequences for one in ranks}) == 1
        furthest = tuple(map(max, zip(*(one.readers for one in ranks), strict=True)))
        return replace(ranks[0], readers=furthest)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of a few integers a reader."""
        return {
            "sequences": self.sequences,
            "readers": [position.to_json() for position in self.readers],
            "earlier": [layout.to_json() for layout in self.earlier],
        }

    @classmethod
    def from_json(cls, saved: Any) -> Progress:
        """The inverse of to_json, also of what checkpoints before virtual readers had: a list, one entry a rank.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        if isinstance(saved, list):
            saved = _of_ranks(saved)
        readers = EarlierReaders.from_json(saved["readers"]).positions
        if not readers:
            raise ValueError("no readers")
        return cls(readers, int(saved["sequences"]), tuple(map(EarlierReaders.from_json, saved["earlier"])))


def _of_ranks(saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The workers of ranks as virtual readers, whose turns went from rank to rank, then to the next worker."""
    if not saved or {one["world_size"] for one in saved} != {len(saved)}:
        raise ValueError(f"{len(saved)} ranks of {saved[0]['world_size'] if saved else 'none'}")
    turns = zip(*(one["readers"] for one in saved), strict=True)
    readers = [position for turn in turns for position in turn]
    return {"sequences": saved[0]["turn"] * len(saved), "readers": readers, "earlier": saved[0]["earlier"]}


def resume_progress(saved: Any, *, shares: int, readers: int, rank: int = 0) -> Progress:
    """Where a run goes on: exactly where it was.

    Only if it is from before virtual readers, and its readers cannot be shared out, new readers take over document by
    document: those that were cut in the middle, at most one a reader, are read again from their start, with a warning.

    saved: what Progress.to_json gave, or the positions in an old checkpoint, see Progress.from_json.
    shares: number of ranks x workers that there are now.
    readers: number of virtual readers of a new run on this data.
    rank: this rank; the first one warns.

    Raises UserError if `saved` is not the position of a whole run.
    """
    try:
        before = Progress.from_json(saved)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the saved data position cannot be used ({error}). Resume from another checkpoint.") from error
    epoch = min(position.epoch for position in before.readers)
    if len(before.readers) == readers or len(before.readers) % shares == 0:
        return replace(before, earlier=_that_matter(before.earlier, epoch=epoch))
    if rank == 0:
        logger.warning(
            f"the data was read by {len(before.readers)} readers, which {shares} processes cannot share: the order "
            f"goes on with {readers}, but documents that were cut in the middle are read again from their start"
        )
    earlier = _that_matter((*before.earlier, EarlierReaders(before.readers)), epoch=epoch)
    return Progress((Position(epoch=epoch),) * readers, earlier=earlier)


def _that_matter(layouts: tuple[EarlierReaders, ...], *, epoch: int) -> tuple[EarlierReaders, ...]:
    """The layouts that had reached this epoch, which is the first one that is still being read."""
    return tuple(layout for layout in layouts if max(position.epoch for position in layout.positions) >= epoch)
