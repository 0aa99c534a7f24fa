"""Pieces of documents to sequences: packers, one for each --packing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np

from peft_pretraining.batch import IGNORED
from peft_pretraining.data.pieces import Piece
from peft_pretraining.data.position import Position
from peft_pretraining.errors import UserError

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

Packing = Literal["concat", "truncate", "whole"]

MAX_LEFT_OUT = 200  # dialogues in a row that are too long, after which none may ever fit


class TooLong(NamedTuple):
    """How many dialogues were longer than a sequence."""

    shortened: int = 0  # they end after an earlier answer, which fits
    left_out: int = 0  # not even the first answer fits

    def plus(self, other: TooLong) -> TooLong:
        """Both together."""
        return TooLong(self.shortened + other.shortened, self.left_out + other.left_out)


class Sequence(NamedTuple):
    """A packed sequence.

    tokens: (2, L) int32, input ids above targets; or (3, L), with the place of each id in its dialogue below.
    position: position of the reader after this sequence.
    skipped: one line for each document that was skipped since the reader's previous sequence.
    too_long: dialogues that were too long since then.
    epoch: the latest epoch that a document of it comes from; None for that of the position.
    """

    tokens: np.ndarray
    position: Position
    skipped: tuple[str, ...] = ()
    too_long: TooLong = TooLong()
    epoch: int | None = None


class Packer(Protocol):
    """Makes sequences of one length of the pieces of one reader."""

    def add(self, piece: Piece) -> Iterator[Sequence]:
        """The sequences that the piece completes. To be exhausted before the next piece."""

    def end(self) -> Iterator[np.ndarray]:
        """The tokens of what is left, where it has a target."""

    def nothing(self) -> np.ndarray:
        """The tokens of a sequence without targets."""


class Concat:
    """Documents, each followed by EOS, as one stream, cut into windows that share their boundary token only.

    A window is `stream[k*L : (k+1)*L]` above `stream[k*L+1 : (k+1)*L+1]`, so every transition of the stream is a
    target exactly once.
    eos_first: whether the stream begins with the EOS of an earlier document, see Position.
    """

    def __init__(self, *, length: int, eos_id: int, eos_first: bool = False) -> None:
        self.length = length
        self.eos_id = eos_id
        self.stream = np.full(int(eos_first), eos_id, dtype=np.int32)

    def add(self, piece: Piece) -> Iterator[Sequence]:
        """The windows that the piece fills. To be exhausted before the next piece.

        What is left after a window is always a suffix of this piece: windows are cut after each piece, so at most
        `length` tokens were waiting, and they are gone with the first window. That is why a position in a piece
        tells all about the stream.
        """
        eos = np.full(int(piece.last), self.eos_id, dtype=np.int32)
        self.stream = np.concatenate((self.stream, piece.ids.astype(np.int32, copy=False), eos))
        end = piece.position.used + len(piece.ids) + piece.last
        start = 0
        while start + self.length < len(self.stream):
            window = self.stream[start : start + self.length + 1]
            start += self.length
            left = len(self.stream) - start
            position = piece.position._replace(used=end - left)
            if piece.last and left == 1:
                position = piece.position.after(eos_first=True)
            yield Sequence(to_sequence(window, length=self.length, pad_id=self.eos_id), position)
        self.stream = self.stream[start:]

    def end(self) -> Iterator[np.ndarray]:
        """The rest, (2, length) int32, padded with EOS above IGNORED, if it has a target."""
        if len(self.stream) > 1:
            yield to_sequence(self.stream, length=self.length, pad_id=self.eos_id)

    def nothing(self) -> np.ndarray:
        """See Packer."""
        return to_sequence([], length=self.length, pad_id=self.eos_id)


class Truncate:
    """One document a sequence, as the published baselines do: cut at `length` tokens, EOS where it fits, padding.

    Nothing is predicted at the last position and on padding, and tails are never seen. A dialogue is not cut within an
    answer, see Fitting.
    """

    def __init__(self, *, length: int, eos_id: int, pad_id: int) -> None:
        self.length = length
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.fitting = Fitting(length)

    def add(self, piece: Piece) -> Iterator[Sequence]:
        """The sequence of the document, from its first piece."""
        if piece.learned is not None:
            if fits := self.fitting.fit(piece):
                row = to_sequence(fits.ids, length=self.length, pad_id=self.pad_id, learned=fits.learned)
                yield Sequence(row, piece.position.after(), too_long=self.fitting.take())
        elif piece.position.piece == 0:
            tokens = [*piece.ids[: self.length].tolist(), *[self.eos_id] * piece.last][: self.length]
            yield Sequence(to_sequence(tokens, length=self.length, pad_id=self.pad_id), piece.position.after())

    def end(self) -> Iterator[np.ndarray]:
        """Nothing: no tokens wait for another document."""
        return iter(())

    def nothing(self) -> np.ndarray:
        """See Packer."""
        return to_sequence([], length=self.length, pad_id=self.pad_id)


class Whole:
    """Dialogues in their order, as many in a sequence as fit, the rest padding.

    Places count from 0 in each of them, which tells attention where one ends; see loss.block_mask. A dialogue of n ids
    takes n - 1 places, because nothing follows its last one.
    """

    def __init__(self, *, length: int, pad_id: int) -> None:
        self.length = length
        self.pad_id = pad_id
        self.fitting = Fitting(length)
        self.waiting: list[Piece] = []
        self.too_long = TooLong()  # among those that wait, and those left out between them

    def add(self, piece: Piece) -> Iterator[Sequence]:
        """The sequence of what waits, if the piece does not fit beside it.

        Its position is where the piece begins. So nothing waits in a run that goes on from there.
        """
        fits = self.fitting.fit(piece)
        if fits and sum(len(each.ids) - 1 for each in (*self.waiting, fits)) > self.length:
            epoch = self.waiting[-1].position.epoch
            yield Sequence(self._tokens(), piece.position, too_long=self.too_long, epoch=epoch)
            self.waiting, self.too_long = [], TooLong()
        # Counted with its own sequence: a run that goes on before it counts it again.
        self.too_long = self.too_long.plus(self.fitting.take())
        if fits:
            self.waiting.append(fits)

    def end(self) -> Iterator[np.ndarray]:
        """See Packer."""
        if self.waiting:
            yield self._tokens()

    def nothing(self) -> np.ndarray:
        """See Packer."""
        empty = to_sequence([], length=self.length, pad_id=self.pad_id)
        return np.concatenate((empty, np.arange(self.length, dtype=np.int32)[None]))

    def _tokens(self) -> np.ndarray:
        """(3, L) int32. Padding is a dialogue of its own."""
        tokens, start = self.nothing(), 0
        for piece in self.waiting:
            end = start + len(piece.ids) - 1
            part = to_sequence(piece.ids, length=end - start, pad_id=self.pad_id, learned=piece.learned)
            tokens[:2, start:end], tokens[2, start:end] = part, np.arange(end - start)
            start = end
        tokens[2, start:] = np.arange(self.length - start)
        return tokens


class Fitting:
    """Makes dialogues fit a sequence, and counts those that were too long.

    A dialogue that is too long ends after the last answer that fits, so that all answers that are learned are whole and
    have all that was said before them. One whose first answer does not fit is left out.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.too_long = TooLong()
        self._in_a_row = 0  # left out

    def fit(self, piece: Piece) -> Piece | None:
        """The dialogue, at most length + 1 ids of it; None if it is left out. Raises UserError if that never ends."""
        most, learned = self.length + 1, piece.learned
        assert learned is not None
        if len(piece.ids) > most:
            ends = np.flatnonzero(learned[:most] & ~np.append(learned[1:], False)[:most])  # last ids of answers
            if not len(ends):
                self._leave_out()
                return None
            self.too_long = self.too_long.plus(TooLong(shortened=1))
            piece = piece._replace(ids=piece.ids[: ends[-1] + 1], learned=learned[: ends[-1] + 1])
        self._in_a_row = 0
        return piece

    def take(self) -> TooLong:
        """The counts since the last call."""
        taken, self.too_long = self.too_long, TooLong()
        return taken

    def _leave_out(self) -> None:
        self.too_long = self.too_long.plus(TooLong(left_out=1))
        self._in_a_row += 1
        if self._in_a_row == MAX_LEFT_OUT:
            raise UserError(
                f"{MAX_LEFT_OUT} dialogues in a row are too long: not even their first answers end within --max_length "
                f"{self.length} tokens. Raise it, or take shorter dialogues."
            )


def make_packer(packing: Packing, tokenizer: Tokenizer, *, length: int, eos_first: bool = False) -> Packer:
    """The packer of that name. eos_first: see Concat."""
    if packing == "concat":
        return Concat(length=length, eos_id=tokenizer.eos_id, eos_first=eos_first)
    if packing == "whole":
        return Whole(length=length, pad_id=tokenizer.pad_id)
    assert packing == "truncate", packing
    return Truncate(length=length, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def to_sequence(
    tokens: list[int] | np.ndarray, *, length: int, pad_id: int, learned: np.ndarray | None = None
) -> np.ndarray:
    """(2, length) int32 from at most length + 1 tokens: inputs above targets, padded with pad_id above IGNORED.

    learned: which of the tokens are targets; None for all.
    """
    sequence = np.empty((2, length), dtype=np.int32)
    inputs, targets = tokens[:length], tokens[1:]
    sequence[0, : len(inputs)], sequence[0, len(inputs) :] = inputs, pad_id
    sequence[1, : len(targets)], sequence[1, len(targets) :] = targets, IGNORED
    if learned is not None:
        sequence[1, : len(targets)][~learned[1:]] = IGNORED
    return sequence
