"""Documents to sequences: long documents are cut into pieces, tokenized and packed; sequences have positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from peft_pretraining.batch import IGNORED
from peft_pretraining.data.order import Document, Skipped, Text
from peft_pretraining.data.position import Position

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

Packing = Literal["concat", "truncate"]

CHUNK = 64  # documents given to the tokenizer at a time
PIECE = 1_000_000  # characters: a longer document is tokenized in pieces, a chunk is no longer by more than one


class Piece(NamedTuple):
    """Token ids of a document or of a piece of it.

    ids: the token ids, without EOS, an array of integers.
    position: position of the first one in the data.
    last: whether EOS follows.
    reader: the virtual reader that packs it.
    """

    ids: np.ndarray
    position: Position
    last: bool
    reader: int = 0


class Sequence(NamedTuple):
    """A packed sequence.

    tokens: (2, L) int32, input ids above targets.
    position: position of the reader after this sequence.
    skipped: one line for each document that was skipped since the reader's previous sequence.
    """

    tokens: np.ndarray
    position: Position
    skipped: tuple[str, ...] = ()


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


class Truncate:
    """One document a sequence, as the published baselines do: cut at `length` tokens, EOS where it fits, padding.

    Nothing is predicted at the last position and on padding, and tails are never seen.
    """

    def __init__(self, *, length: int, eos_id: int, pad_id: int) -> None:
        self.length = length
        self.eos_id = eos_id
        self.pad_id = pad_id

    def add(self, piece: Piece) -> Iterator[Sequence]:
        """The sequence of the document, from its first piece."""
        if piece.position.piece == 0:
            tokens = [*piece.ids[: self.length].tolist(), *[self.eos_id] * piece.last][: self.length]
            yield Sequence(to_sequence(tokens, length=self.length, pad_id=self.pad_id), piece.position.after())

    def end(self) -> Iterator[np.ndarray]:
        """Nothing: no tokens wait for another document."""
        return iter(())


def make_packer(packing: Packing, tokenizer: Tokenizer, *, length: int, eos_first: bool = False) -> Concat | Truncate:
    """The packer of that name. eos_first: see Concat."""
    if packing == "concat":
        return Concat(length=length, eos_id=tokenizer.eos_id, eos_first=eos_first)
    assert packing == "truncate", packing
    return Truncate(length=length, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def to_sequence(tokens: list[int] | np.ndarray, *, length: int, pad_id: int) -> np.ndarray:
    """(2, length) int32 from at most length + 1 tokens: inputs above targets, padded with pad_id above IGNORED."""
    sequence = np.empty((2, length), dtype=np.int32)
    inputs, targets = tokens[:length], tokens[1:]
    sequence[0, : len(inputs)], sequence[0, len(inputs) :] = inputs, pad_id
    sequence[1, : len(targets)], sequence[1, len(targets) :] = targets, IGNORED
    return sequence


def encode(
    documents: Iterable[Document | Skipped], tokenizer: Tokenizer, *, starts: Mapping[int, Position] | None = None
) -> Iterator[Piece | Skipped]:
    """The pieces of documents that are not empty, tokenized in chunks. Skipped documents keep their place.

    Documents that come as token ids pass as they are.
    starts: for each reader the position that it begins at; the used part of its document is left out.
    """
    for chunk in _chunks(_cut(documents, starts or {})):
        texts = [item.text for item in chunk if isinstance(item, Document) and isinstance(item.text, str)]
        encoded = iter(tokenizer.encode(texts) if texts else [])
        for item in chunk:
            if isinstance(item, Skipped):
                yield item
                continue
            # The text is one piece by now. As an array it takes a ninth of a list, and may have to wait for its reader.
            ids = np.array(next(encoded), dtype=np.int32) if isinstance(item.text, str) else item.text[0]
            position = item.position
            if len(ids) or position.piece or not item.last:
                yield Piece(ids[position.used :], position, item.last, item.reader)


def _chunks(items: Iterator[Document | Skipped]) -> Iterator[list[Document | Skipped]]:
    chunk: list[Document | Skipped] = []
    characters = 0
    for item in items:
        chunk.append(item)
        characters += len(item.text) if isinstance(item, Document) and isinstance(item.text, str) else 0
        if len(chunk) == CHUNK or characters >= PIECE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _cut(documents: Iterable[Document | Skipped], starts: Mapping[int, Position]) -> Iterator[Document | Skipped]:
    for document in documents:
        if isinstance(document, Skipped):
            yield document
            continue
        start = starts.get(document.reader, Position())
        resumed = document.position.place == start.place
        for number, (text, last) in enumerate(_pieces(document.text)):
            if resumed and number < start.piece:
                continue
            used = start.used if resumed and number == start.piece else 0
            yield Document(text, document.position._replace(piece=number, used=used), last, document.reader)


def _pieces(text: Text) -> Iterator[tuple[Text, bool]]:
    if isinstance(text, str):
        return cut_text(text)
    return (([ids], number == len(text)) for number, ids in enumerate(text, start=1))


def cut_text(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts a text into pieces of at most PIECE characters, before white space if possible.

    Yields each piece with whether it is the last one.
    """
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        cut = max(text.rfind(space, start + 1, end) for space in (" ", "\n"))
        cut = cut if cut > 0 else end
        yield text[start:cut], False
        start = cut
    yield text[start:], True
