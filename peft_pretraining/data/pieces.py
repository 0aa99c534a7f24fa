"""Documents to pieces: long documents are cut, and all are tokenized in chunks; pieces have positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from peft_pretraining.data.chat import encode_dialogues
from peft_pretraining.data.order import Dialogue, Document, Skipped, Text, content_of
from peft_pretraining.data.position import Position

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

CHUNK = 64  # documents given to the tokenizer at a time
PIECE = 1_000_000  # characters: a longer document is tokenized in pieces, a chunk is no longer by more than one


class Piece(NamedTuple):
    """Token ids of a document or of a piece of it.

    ids: the token ids, without EOS, an array of integers.
    position: position of the first one in the data.
    last: whether EOS follows.
    reader: the virtual reader that packs it.
    learned: for each id whether it is a target, an array of bool; None: all are. A piece that has it is a dialogue.
    """

    ids: np.ndarray
    position: Position
    last: bool
    reader: int = 0
    learned: np.ndarray | None = None


def encode(
    documents: Iterable[Document | Skipped], tokenizer: Tokenizer, *, starts: Mapping[int, Position] | None = None
) -> Iterator[Piece | Skipped]:
    """The pieces of documents that are not empty, tokenized in chunks. Skipped documents keep their place.

    Documents that come as token ids pass as they are; dialogues come with which of their ids are learned.
    starts: for each reader the position that it begins at; the used part of its document is left out.
    """
    for chunk in _chunks(_cut(documents, starts or {})):
        texts = [item.text for item in chunk if isinstance(item, Document)]
        encoded = iter(_encode([text for text in texts if isinstance(text, str)], tokenizer))
        dialogues = [text for text in texts if isinstance(text, Dialogue)]
        answered = iter(encode_dialogues(tokenizer, dialogues) if dialogues else ())
        for item in chunk:
            if isinstance(item, Skipped):
                yield item
                continue
            position, learned = item.position, None
            if isinstance(item.text, str):
                ids = next(encoded)
            elif isinstance(item.text, Dialogue):
                ids, learned = next(answered)
            else:
                ids = item.text[0]  # it is one piece by now
            if len(ids) or position.piece or not item.last:
                yield Piece(ids[position.used :], position, item.last, item.reader, learned)


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Token ids as arrays: they take a ninth of a list, and may have to wait for their reader."""
    return (np.array(ids, dtype=np.int32) for ids in (tokenizer.encode(texts) if texts else ()))


def _chunks(items: Iterator[Document | Skipped]) -> Iterator[list[Document | Skipped]]:
    chunk: list[Document | Skipped] = []
    characters = 0
    for item in items:
        chunk.append(item)
        characters += _characters(item.text) if isinstance(item, Document) else 0
        if len(chunk) == CHUNK or characters >= PIECE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _characters(text: Text) -> int:
    """Of what is to be tokenized."""
    return 0 if isinstance(text, list) else len(content_of(text))


def _cut(documents: Iterable[Document | Skipped], starts: Mapping[int, Position]) -> Iterator[Document | Skipped]:
    for document in documents:
        if isinstance(document, Skipped):
            yield document
            continue
        if isinstance(document.text, Dialogue):  # it is never cut, and has its end in its text
            yield document._replace(last=False)
            continue
        start = starts.get(document.reader, Position())
        resumed = document.position.place == start.place
        for number, (text, last) in enumerate(_pieces(document.text)):
            if resumed and number < start.piece:
                continue
            used = start.used if resumed and number == start.piece else 0
            yield Document(text, document.position._replace(piece=number, used=used), last, document.reader)


def _pieces(text: str | list[np.ndarray]) -> Iterator[tuple[Text, bool]]:
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
