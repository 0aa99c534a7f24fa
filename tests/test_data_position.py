"""Resuming: the batches of an uninterrupted run to the last bit, or on another layout every document all the same."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import rows, take

from peft_pretraining.batch import Batch
from peft_pretraining.data import order as document_order
from peft_pretraining.data import pieces
from peft_pretraining.data import position as data_position
from peft_pretraining.data.hub import HubDocuments
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.order import Document, OrderedDocuments
from peft_pretraining.data.position import EarlierReaders, Position, Progress, owner, resume_progress
from peft_pretraining.data.sources import LocalDocuments
from peft_pretraining.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

COUNT = 90  # documents in all
SHARDS = 6


def text_of(i: int, *, long: bool) -> str:
    """Document i; its first character names it."""
    return chr(0x100 + i) + "ab " * (i * 7 % 23 if long else 0)


class Characters:
    """A token a character, so that the documents of a batch can be read off it."""

    name, vocab_size, eos_id, pad_id = "characters", 1000, 0, 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(map(ord, text)) for text in texts]


class MemoryShards(HubDocuments):
    """The hub's documents without the hub."""

    def __init__(self, shards: list[list[str]]) -> None:
        super().__init__(split="train", seed=0)
        self.shards = shards

    def parts(self, epoch: int) -> list[list[int]]:
        order = random.Random(epoch).sample(range(len(self.shards)), len(self.shards))
        return [[shard] for shard in order]

    def _shard(self, shard: int) -> Any:
        return iter(self.shards[shard])


def make_source(kind: str, folder: Path, *, long: bool = True, bad: bool = True) -> OrderedDocuments:
    """Local files of unequal size, one of them damaged by bad lines; or shards."""
    texts = [text_of(i, long=long) for i in range(COUNT)]
    if kind == "hub":
        return MemoryShards([texts[shard::SHARDS] for shard in range(SHARDS)])
    files = []
    for number, (start, end) in enumerate(((0, 50), (50, 53), (53, COUNT))):
        lines = [json.dumps({"text": text}) for text in texts[start:end]]
        if bad:
            lines[2:2] = ["{}", "broken"]
        files.append(folder / f"{number}.jsonl")
        files[-1].write_text("\n".join(lines) + "\n")
    return LocalDocuments(files, name="", seed=0, shuffle=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, chunks and pieces in little text."""
    monkeypatch.setattr(document_order, "BUFFER_RECORDS", 11)
    monkeypatch.setattr(pieces, "PIECE", 25)
    monkeypatch.setattr(pieces, "CHUNK", 5)


def through_json(progress: Progress) -> dict[str, Any]:
    copy = json.loads(json.dumps(progress.to_json()))
    assert Progress.from_json(copy) == progress
    return copy


def merged(ranks: list[list[Batch]], number: int) -> Progress:
    return Progress.merged([ranked[number].position for ranked in ranks])


@pytest.mark.parametrize("kind", ["local", "hub"])
@pytest.mark.parametrize("packing_kind", ["concat", "truncate"])
@pytest.mark.parametrize("workers, world_size", [(0, 1), (0, 3), (2, 1), (2, 2)])
def test_batches_after_a_resume_are_those_of_the_uninterrupted_run(
    tmp_path: Path, kind: str, packing_kind: Any, workers: int, world_size: int
) -> None:
    """Stopped anywhere: in the first epoch and in later ones, in a block, in a document, in a piece."""
    source = make_source(kind, tmp_path)
    options: dict[str, Any] = dict(batch_size=3, max_length=17, packing=packing_kind, workers=workers)
    options["world_size"] = world_size
    rng = random.Random(f"{kind} {packing_kind} {workers} {world_size}")
    total = 15 if workers or world_size > 1 else 80

    def start(rank: int, resume: Any = None) -> Any:
        return train_batches(source, Characters(), rank=rank, resume=resume, **options)  # type: ignore[arg-type]

    whole = [take(start(rank), total) for rank in range(world_size)]
    assert workers or world_size > 1 or whole[0][-1].epoch >= 1
    for stop in rng.sample(range(1, total - 3), 2 if workers else 6):
        saved = through_json(merged(whole, stop - 1))
        again = [
            take(start(rank, saved), min(3, total - stop) if workers else total - stop) for rank in range(world_size)
        ]
        for after in range(len(again[0])):
            assert merged(again, after) == merged(whole, stop + after)
            for ours, theirs in zip(again, whole, strict=True):
                found, wanted = ours[after], theirs[stop + after]
                assert torch.equal(found.input_ids, wanted.input_ids) and torch.equal(found.targets, wanted.targets)
                assert (found.epoch, found.skipped) == (wanted.epoch, wanted.skipped)


def test_no_more_than_the_block_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source("local", tmp_path, bad=False)
    source.readers = 1
    taken = take(train_batches(source, Characters(), batch_size=1, max_length=8, packing="truncate"), 70)  # type: ignore
    read: list[int] = []
    real = source.records

    def recording(file: Path, *, line: int) -> Any:
        for record in real(file, line=line):
            read.append(record.line)
            yield record

    monkeypatch.setattr(source, "records", recording)
    batches = source.read(epoch=0, starts={0: taken[-1].position.readers[0]})
    assert len(list(batches)) == COUNT - 70
    assert len(read) <= COUNT - 70 + document_order.BUFFER_RECORDS


def run_readers(
    source: OrderedDocuments, progress: Progress, *, rng: random.Random, most: int
) -> tuple[Progress, Counter[tuple[int, ...]]]:
    """Readers that each read up to so many documents, each at its own pace; the places of these documents."""
    places: Counter[tuple[int, ...]] = Counter()
    positions = []
    share: dict[str, Any] = dict(readers=len(progress.readers), earlier=progress.earlier)
    for reader, position in enumerate(progress.readers):
        read = (
            source.read(epoch=epoch, starts={reader: position}, **share)
            for epoch in range(position.epoch, position.epoch + 30)
        )
        for item in islice(chain.from_iterable(read), rng.randrange(most)):
            assert isinstance(item, Document) and item.reader == reader
            places[item.position.place] += 1
            position = item.position.after()
        positions.append(position)
    return replace(progress, readers=tuple(positions)), places


@pytest.mark.parametrize("kind", ["local", "hub"])
def test_other_readers_read_each_document_once_an_epoch(tmp_path: Path, kind: str) -> None:
    """However often their number changes and however far they have parted, over epochs even."""
    source = make_source(kind, tmp_path, bad=False)
    for seed in range(10):
        rng = random.Random(seed)
        saved: Any = None
        seen: Counter[tuple[int, ...]] = Counter()
        for readers in [*rng.choices([1, 2, 3, 4, 8, 10], k=4), 1]:
            progress = (
                resume_progress(saved, shares=7 * 11, readers=readers) if saved else Progress((Position(),) * readers)
            )
            last_epoch = max(progress.earlier[-1].positions).epoch if progress.earlier else 0
            progress, places = run_readers(source, progress, rng=rng, most=80)
            seen += places
            saved = through_json(progress)
        while progress.readers[0].epoch <= last_epoch + 3:
            progress, places = run_readers(source, progress, rng=rng, most=300)
            seen += places
        per_epoch = Counter(epoch for epoch, _, _ in seen)
        assert set(seen.values()) == {1}
        assert all(per_epoch[epoch] == COUNT for epoch in range(last_epoch + 3))


# Checkpoints from before virtual readers


def as_it_was(progress: Progress, *, world_size: int) -> list[dict[str, Any]]:
    """What old checkpoints have, of so many ranks."""
    earlier = [layout.to_json() for layout in progress.earlier]
    positions = [position.to_json() for position in progress.readers]
    turn = progress.sequences // world_size % (len(positions) // world_size)
    shared = {"world_size": world_size, "turn": turn, "earlier": earlier}
    return json.loads(json.dumps([shared | {"readers": positions[rank::world_size]} for rank in range(world_size)]))


@pytest.mark.parametrize("kind", ["local", "hub"])
@pytest.mark.parametrize("batches", [1, 4, 9])
def test_what_was_cut_is_read_again_and_nothing_else(tmp_path: Path, kind: str, batches: int) -> None:
    """Two ranks become three: the first tokens of documents, which name them, come once an epoch as an input."""
    source = make_source(kind, tmp_path)
    options: dict[str, Any] = dict(max_length=17, packing="concat")

    def names(taken: list[Batch]) -> list[int]:
        inputs = rows(taken)[:, 0].flatten().tolist()
        return [token for token in inputs if token >= 0x100]

    source.readers = 2
    before = take(train_batches(source, Characters(), batch_size=4, **options), batches)  # type: ignore[arg-type]
    saved = as_it_was(before[-1].position, world_size=2)
    begun = names(before)
    cut = sum(position.used > 0 or position.piece > 0 for position in before[-1].position.readers)
    assert len(set(begun)) == len(begun) < COUNT

    source.readers = 3
    warnings: list[str] = []
    handler = data_position.logger.add(warnings.append, format="{message}")
    shares = [
        take(train_batches(source, Characters(), batch_size=1, rank=rank, world_size=3, resume=saved, **options), 250)  # type: ignore[arg-type]
        for rank in range(3)
    ]
    data_position.logger.remove(handler)
    rest = []
    for reader, found in enumerate(map(names, shares)):
        following = source.read(epoch=1, readers=3, starts={reader: Position()})
        expected = [ord(item.text[0]) for item in following if isinstance(item, Document)]  # type: ignore[arg-type]
        (end,) = (i for i in range(len(found)) if found[i : i + len(expected)] == expected)
        rest += found[:end]
    assert set(begun) | set(rest) == {0x100 + i for i in range(COUNT)}
    assert len(set(rest)) == len(rest) and len(set(begun) & set(rest)) == cut
    assert len(warnings) == 1
    assert str(warnings[0]).startswith(
        "the data was read by 2 readers, which 3 processes cannot share: the order goes on"
    )


@pytest.mark.parametrize("world_size, workers", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_old_positions_go_on_exactly_where_their_readers_can_be_shared(
    tmp_path: Path, world_size: int, workers: int
) -> None:
    """Four readers, on two ranks with two workers, stopped when it was the second worker's turn."""
    source = make_source("local", tmp_path)
    options: dict[str, Any] = dict(max_length=17, packing="concat")
    source.readers = 4
    whole = take(train_batches(source, Characters(), batch_size=2, **options), 40)  # type: ignore[arg-type]
    saved = as_it_was(whole[22].position, world_size=2)
    assert saved[0]["turn"] == 1
    source.readers = 96
    batches = [
        take(
            train_batches(  # type: ignore[arg-type]
                source, Characters(), batch_size=1, rank=rank, world_size=world_size, workers=workers, resume=saved,
                **options,
            ),
            32 // world_size,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    found = torch.stack([rows(ranked) for ranked in batches], dim=1).flatten(0, 1)
    assert torch.equal(found, rows(whole[23:])[: len(found)])


def test_layouts_that_no_longer_matter_are_dropped() -> None:
    old = EarlierReaders((Position(epoch=1), Position(epoch=2)))
    kept = EarlierReaders((Position(epoch=2), Position(epoch=3)))
    progress = Progress((Position(epoch=3),), earlier=(old, kept))
    for shares, readers in ((1, 96), (2, 96)):
        earlier = resume_progress(progress.to_json(), shares=shares, readers=readers).earlier
        assert earlier[0] == kept and len(earlier) == shares


def test_whole_parts_go_round_else_documents_do() -> None:
    shares = [[owner(0, part, 0, parts=6, readers=4) for part in range(6)]]
    shares.append([owner(0, 5, number, parts=6, readers=4) for number in range(6)])
    shares.append([owner(1, 0, number, parts=1, readers=4) for number in range(6)])
    assert shares == [[0, 1, 2, 3, 0, 1], [1] * 6, [3, 0, 1, 2, 3, 0]]


@pytest.mark.parametrize("saved", [[], {}, [{}], [{"readers": 3}], {"readers": [], "sequences": 0}, "two of three"])
def test_a_position_that_is_none_is_one_line(saved: Any) -> None:
    if saved == "two of three":
        saved = as_it_was(Progress((Position(),) * 3), world_size=3)[:2]
    with pytest.raises(UserError, match="the saved data position cannot be used .*Resume from another checkpoint"):
        resume_progress(saved, shares=1, readers=1)
