"""Block shuffle: each record once, mixed within its block, no more than a block in memory, begun again at any block."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from peft_pretraining.data import order as document_order
from peft_pretraining.data.order import Document, OrderedDocuments

SIZES = (30, 3, 0, 120, 1, 46)  # records of each file


class Numbered(NamedTuple):
    line: int
    file: int
    size: int

    def text(self) -> str:
        return f"{self.file} {self.line}"


class Files(OrderedDocuments[int]):
    """One part of files that hold numbered records; counts those that are out of its hands."""

    def __init__(self, *, size: int = 1, shuffle: bool = True, seed: int = 0) -> None:
        super().__init__(seed=seed, shuffle=shuffle)
        self.size = size
        self.taken = 0

    def parts(self, epoch: int) -> list[list[int]]:
        return [list(range(len(SIZES)))]

    def records(self, file: int, *, line: int) -> Iterator[Numbered]:
        for number in range(line, SIZES[file] + 1):
            self.taken += 1
            yield Numbered(number, file, self.size)


EVERYTHING = [f"{file} {line + 1}" for file, count in enumerate(SIZES) for line in range(count)]


def read(source: Files, epoch: int = 0) -> list[Document]:
    return list(source.read(epoch=epoch))  # type: ignore[arg-type]


@pytest.mark.parametrize("size, room", [(1, 50), (4, 25), (1000, 1)])
def test_a_block_is_bounded_and_loses_nothing(monkeypatch: pytest.MonkeyPatch, size: int, room: int) -> None:
    """By records, by bytes, and by the one record that is larger than a block."""
    monkeypatch.setattr(document_order, "BUFFER_RECORDS", 50)
    monkeypatch.setattr(document_order, "BUFFER_BYTES", 100)
    source = Files(size=size)
    found = []
    for document in source.read(epoch=0):
        found.append(document.text)  # type: ignore[union-attr]
        assert source.taken - len(found) <= room
    assert sorted(found) == sorted(EVERYTHING)
    assert (found != EVERYTHING) == (room > 1)
    for begin in range(0, len(EVERYTHING), room):  # blocks span small files and mix only what is theirs
        assert sorted(found[begin : begin + room]) == sorted(EVERYTHING[begin : begin + room])


def test_blocks_are_permuted_anew_for_each_epoch_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_order, "BUFFER_RECORDS", 50)
    orders = [[d.text for d in read(Files(seed=seed), epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    assert all(sum(map(str.__eq__, orders[0], other)) < 20 for other in orders[1:3])  # of 200, one a block by chance


def test_in_file_order_nothing_is_read_ahead() -> None:
    source = Files(shuffle=False)
    assert [document.text for document in read(source)] == EVERYTHING
    source.taken = 0
    next(source.read(epoch=0))
    assert source.taken <= 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_reading_begins_at_any_position(monkeypatch: pytest.MonkeyPatch, shuffle: bool) -> None:
    monkeypatch.setattr(document_order, "BUFFER_RECORDS", 17)
    source = Files(shuffle=shuffle)
    whole = read(source)
    for i, document in enumerate(whole):
        source.taken = 0
        rest = list(source.read(epoch=0, starts={0: document.position.after()}))
        assert rest == whole[i + 1 :]
        assert source.taken <= len(rest) + 17
