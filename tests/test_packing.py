"""Packing: the token stream exactly, and a position behind each sequence from which the rest can be made again."""

import random
from itertools import chain

import numpy as np
import pytest
from support.batches import TOKENIZER

from peft_pretraining.batch import IGNORED
from peft_pretraining.data import pieces
from peft_pretraining.data.order import Document, Skipped
from peft_pretraining.data.packing import Concat, Sequence, Truncate, make_packer
from peft_pretraining.data.pieces import Piece, cut_text, encode
from peft_pretraining.data.position import Position


def pieces_of(token_lists: list[list[int]]) -> list[Piece]:
    return [Piece(np.array(ids, dtype=int), Position(document=i), last=True) for i, ids in enumerate(token_lists)]


def test_concat_reproduces_the_token_stream() -> None:
    lists = [[1, 2, 3], [], [4], list(range(10, 31)), [5, 6]]
    stream = [token for ids in lists for token in (*ids, 0)]
    for length in (2, 3, 4, 7, 31, 32, 33, 100):
        packer = Concat(length=length, eos_id=0)
        windows = [sequence.tokens for piece in pieces_of(lists) for sequence in packer.add(piece)] + list(packer.end())
        inputs = np.concatenate([window[0] for window in windows])
        targets = np.concatenate([window[1] for window in windows])
        count = len(stream) - 1
        assert targets[:count].tolist() == stream[1:]  # every transition, once, in order
        assert inputs[:count].tolist() == stream[:-1]
        assert (targets[count:] == IGNORED).all() and len(targets) - count < length
        assert all(window.shape == (2, length) and window.dtype == np.int32 for window in windows)


def test_truncate_is_one_padded_document_a_sequence() -> None:
    packer = Truncate(length=4, eos_id=8, pad_id=9)
    found = [packer.add(piece) for piece in pieces_of([[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]])]
    short, exact, long = (sequence for (sequence,) in map(list, found))
    assert short.tokens.tolist() == [[1, 2, 8, 9], [2, 8, IGNORED, IGNORED]]
    assert exact.tokens.tolist() == long.tokens.tolist() == [[1, 2, 3, 4], [2, 3, 4, IGNORED]]
    assert [sequence.position.document for sequence in (short, exact, long)] == [1, 2, 3]


def test_long_texts_are_cut_before_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 10)
    assert list(cut_text("ten chars!")) == [("ten chars!", True)]
    assert list(cut_text("one two\nthree four")) == [("one two", False), ("\nthree", False), (" four", True)]
    assert list(cut_text("x" * 25)) == [("x" * 10, False), ("x" * 10, False), ("x" * 5, True)]
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("ab \n", k=rng.randrange(60)))
        found = list(cut_text(text))
        assert "".join(piece for piece, _ in found) == text
        assert all(0 < len(piece) <= 10 for piece, _ in found) or text == ""
        assert [last for _, last in found] == [False] * (len(found) - 1) + [True]


def test_a_long_document_has_the_tokens_of_its_pieces_and_one_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 10)
    asked: list[list[str]] = []

    class Recorder(type(TOKENIZER)):  # type: ignore[misc]
        def encode(self, texts: list[str]) -> list[list[int]]:
            asked.append(texts)
            return super().encode(texts)

    text = "word " * 20
    found = list(encode([Document(text, Position())], Recorder()))
    assert [id for piece in found for id in piece.ids] == list(text.encode())  # type: ignore[union-attr]
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]  # type: ignore[union-attr]
    assert all(sum(map(len, texts)) < 2 * 10 for texts in asked)


def test_what_is_skipped_keeps_its_place_and_empty_documents_vanish() -> None:
    items = [Document("a", Position(document=0)), Skipped("why"), Document("", Position(document=2))]
    first, *others = encode([*items, Skipped("too")], TOKENIZER)
    assert isinstance(first, Piece) and first.ids.tolist() == [ord("a")] and first[1:] == (Position(), True, 0, None)
    assert others == [Skipped("why"), Skipped("too")]


@pytest.mark.parametrize("kind", ["concat", "truncate"])
@pytest.mark.parametrize("piece", [7, 1000])
def test_from_each_position_the_rest_is_made_again(monkeypatch: pytest.MonkeyPatch, kind: str, piece: int) -> None:
    """Lengths around the window's, so that windows end in, before and behind an EOS."""
    monkeypatch.setattr(pieces, "PIECE", piece)
    monkeypatch.setattr(pieces, "CHUNK", 3)
    rng = random.Random(piece)
    texts = ["x" * rng.choice([0, 1, 2, 3, 4, 5, 9, 23]) + " y" * rng.randrange(3) for _ in range(120)]
    source = [Document(text, Position(document=i)) for i, text in enumerate(texts)]

    def sequences(start: Position) -> list[Sequence]:
        packer = make_packer(kind, TOKENIZER, length=5, eos_first=start.eos_first)  # type: ignore[arg-type]
        rest = [document for document in source if document.position.place >= start.place]
        return list(chain.from_iterable(map(packer.add, encode(rest, TOKENIZER, starts={0: start}))))  # type: ignore

    whole = sequences(Position())
    ends = {(sequence.position.eos_first, sequence.position.used > 0) for sequence in whole}
    assert kind == "truncate" or ends == {(True, False), (False, True), (False, False)}
    for i, sequence in enumerate(whole):
        rest = sequences(sequence.position)
        assert [s.tokens.tolist() for s in rest] == [s.tokens.tolist() for s in whole[i + 1 :]]
        assert [s.position for s in rest] == [s.position for s in whole[i + 1 :]]
