"""Virtual readers: token for token the same global batches on any number of ranks and workers, whatever changes."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import TOKENIZER, rows, take
from support.documents import write_jsonl

from peft_pretraining.data import order, pieces, readers
from peft_pretraining.data.hub import HubDocuments
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.order import READERS, Document, Skipped
from peft_pretraining.data.position import Position, Progress
from peft_pretraining.data.readers import BACKLOG, Readers, useful_workers
from peft_pretraining.data.sources import DocumentSource, open_documents
from peft_pretraining.data.token_writer import tokenize

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*use of fork")

COUNT = 250  # documents
TOTAL = 48  # sequences of an update, over all ranks
LAYOUTS = [(1, 0), (1, 4), (2, 0), (2, 1), (2, 4), (4, 0), (4, 1), (4, 4), (8, 0), (3, 1), (12, 0), (16, 0)]


class Bytes(type(TOKENIZER)):  # type: ignore[misc]
    def digest(self) -> str:
        return "bytes"


class Shards(HubDocuments):
    """The hub's documents without the hub."""

    def __init__(self, shards: list[list[str]]) -> None:
        super().__init__(split="train", seed=0)
        self.shards = shards

    def parts(self, epoch: int) -> list[list[int]]:
        return [[shard] for shard in random.Random(epoch).sample(range(len(self.shards)), len(self.shards))]

    def _shard(self, shard: int) -> Iterator[str]:
        return iter(self.shards[shard])


def make_source(kind: str, folder: Path) -> DocumentSource:
    """Texts of 5 to 150 bytes, in two files with a bad document; their tokens; in 20 shards, or in too few."""
    rng = random.Random(0)
    texts = [f"{number:03} " + "x" * rng.randrange(rng.choice((5, 150))) for number in range(COUNT)]
    if kind in ("many shards", "few shards"):
        count = 20 if kind == "many shards" else 3
        return Shards([texts[shard::count] for shard in range(count)])
    text = folder / "text"
    write_jsonl(text / "train-0.jsonl", texts[:100])
    write_jsonl(text / "train-1.jsonl", texts[100:])
    with (text / "train-1.jsonl").open("a") as file:
        file.write("broken\n")
    write_jsonl(text / "valid.jsonl", ["held out"])
    if kind == "tokens":
        tokenize(
            str(text), Bytes(), folder / "tokens", validation=None, text_field="text", processes=1, max_bad_documents=5
        )
        text = folder / "tokens"
    return open_documents(str(text), split="train", seed=0)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, chunks and pieces in little text."""
    monkeypatch.setattr(order, "BUFFER_RECORDS", 40)
    monkeypatch.setattr(pieces, "PIECE", 60)
    monkeypatch.setattr(pieces, "CHUNK", 5)


def run(
    source: DocumentSource,
    updates: int,
    *,
    world_size: int,
    workers: int,
    accumulation: int = 1,
    resume: Any = None,
    packing: Any = "concat",
) -> tuple[torch.Tensor, list[str], Progress, int]:
    """All ranks, one after the other: global sequences in their order, what was skipped, the position, the epoch."""
    size = TOTAL // world_size // accumulation
    how: dict[str, Any] = dict(batch_size=size, max_length=31, packing=packing, world_size=world_size, workers=workers)
    ranks = [
        take(train_batches(source, Bytes(), rank=rank, resume=resume, **how), updates * accumulation)
        for rank in range(world_size)
    ]
    progress = Progress.merged([ranked[-1].position for ranked in ranks])
    skipped = [line for ranked in ranks for batch in ranked for line in batch.skipped]
    sequences = torch.stack([rows(ranked) for ranked in ranks], dim=1).flatten(0, 1)
    return sequences, sorted(skipped), progress, max(batch.epoch for ranked in ranks for batch in ranked)


@pytest.mark.parametrize("kind", ["text", "tokens", "many shards", "few shards"])
@pytest.mark.parametrize("packing", ["concat", "truncate"])
def test_an_update_has_the_same_sequences_on_any_ranks_and_workers(tmp_path: Path, kind: str, packing: str) -> None:
    """Over the end of an epoch: the order of the sequences, the position after them, and the bad documents."""
    source = make_source(kind, tmp_path)
    wanted, skipped, progress, epoch = run(source, 11, world_size=1, workers=0, packing=packing)
    assert epoch >= 1 and len(wanted) == 11 * TOTAL and (len(skipped) > 0) == (kind == "text")
    assert len({tuple(row.flatten().tolist()) for row in wanted}) > 0.4 * len(wanted), "not twice the same"
    layouts = LAYOUTS if (kind, packing) in (("text", "concat"), ("many shards", "concat")) else LAYOUTS[1:8:3]
    for world_size, workers in layouts:
        found = run(source, 11, world_size=world_size, workers=workers, packing=packing)
        assert torch.equal(found[0], wanted), (world_size, workers)
        assert found[1:] == (skipped, progress, epoch), (world_size, workers)
    accumulated = run(source, 11, world_size=2, workers=0, accumulation=3, packing=packing)
    assert torch.equal(accumulated[0], wanted) and accumulated[2] == progress


@pytest.mark.parametrize("kind", ["text", "tokens", "many shards", "few shards"])
def test_a_run_goes_on_exactly_on_other_ranks_and_workers(tmp_path: Path, kind: str) -> None:
    """Stopped every few updates, in the first epoch and later ones, and put on other ranks and workers each time."""
    source = make_source(kind, tmp_path)
    wanted, skipped, progress, epoch = run(source, 16, world_size=1, workers=0)
    assert epoch >= 1
    for seed in range(3 if kind == "text" else 1):
        rng = random.Random(seed)
        saved, found, bad, done = None, [], [], 0
        while done < 16:
            updates, (world_size, workers) = min(rng.randrange(1, 5), 16 - done), rng.choice(LAYOUTS)
            rows_of, lines, last, _ = run(source, updates, world_size=world_size, workers=workers, resume=saved)
            saved = json.loads(json.dumps(last.to_json()))
            found.append(rows_of)
            bad += lines
            done += updates
        assert torch.equal(torch.cat(found), wanted)
        assert last == progress and sorted(bad) == skipped


@pytest.mark.parametrize("kind", ["text", "few shards"])
def test_no_document_is_read_twice_or_lost(tmp_path: Path, kind: str) -> None:
    """Each document once an epoch, over readers; and no worker tokenizes what is another one's."""
    source = make_source(kind, tmp_path)
    items = list(source.read(epoch=3, readers=READERS))
    places = Counter(item.position.place for item in items if isinstance(item, Document))
    assert len(places) == COUNT and set(places.values()) == {1}
    shares = [list(source.read(epoch=3, readers=READERS, starts={reader: Position()})) for reader in range(READERS)]
    assert sorted(map(str, sum(shares, []))) == sorted(map(str, items))
    assert [len({item.reader for item in share} - {reader}) for reader, share in enumerate(shares)] == [0] * READERS


def test_workers_tokenize_only_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)  # a text is one document's then
    source = make_source("text", tmp_path)
    seen: list[set[str]] = []

    class Recorder(Bytes):
        def encode(self, texts: list[str]) -> list[list[int]]:
            seen[-1].update(texts)
            return super().encode(texts)

    progress = Progress((Position(),) * READERS)
    for first in range(4):
        seen.append(set())
        ours = Readers(source, Recorder(), max_length=31, packing="truncate", progress=progress, first=first, step=4)
        assert [next(stream).position.epoch for stream in [ours.sequences()] for _ in range(20)] == [0] * 20
    assert all(one.isdisjoint(other) for one in seen for other in seen if one is not other)


# How far readers part


@pytest.mark.parametrize("kind", ["text", "few shards"])
@pytest.mark.parametrize("room", [0, 1500, 6000])
def test_what_waits_is_bounded_and_the_order_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, room: int
) -> None:
    """Where too much waits for readers behind, they walk on their own."""
    source = make_source(kind, tmp_path)
    wanted, skipped, *_ = run(source, 16, world_size=1, workers=0)
    most, walks = 0, set()
    part_ways = Readers._part_ways

    def watched(self: Readers) -> None:
        nonlocal most
        part_ways(self)
        most = max(most, self._backlog)
        walks.add(len({id(walk) for walk in self._walks.values()}))
        held = sum(readers._size(item) for items in self._waiting.values() for item in items)
        assert held == self._backlog

    monkeypatch.setattr(Readers, "_part_ways", watched)
    monkeypatch.setattr(readers, "BACKLOG", room)
    found, bad, *_ = run(source, 16, world_size=1, workers=0)
    assert torch.equal(found, wanted) and bad == skipped
    assert max(walks) > 2 and most <= room + 4 * 60, "at most the item that came last is too much"


def test_tokens_of_shards_take_no_memory_while_they_wait(tmp_path: Path) -> None:
    items = [
        list(pieces.encode(make_source(kind, tmp_path / kind).read(epoch=0), Bytes())) for kind in ("text", "tokens")
    ]
    sizes = [sum(map(readers._size, one)) for one in items]
    tokens = sum(len(item.ids) for item in items[0] if not isinstance(item, Skipped))
    assert sizes == [4 * tokens, 0] and BACKLOG >= 2**20


# Workers


@pytest.mark.parametrize(
    "workers, world_size, expected",
    [(0, 1, 1), (1, 1, 1), (4, 1, 4), (4, 4, 4), (4, 8, 2), (5, 1, 4), (9, 1, 8), (4, 16, 1), (4, 3, 4), (2, 32, 1)],
)
def test_no_worker_is_started_that_would_read_what_others_read(workers: int, world_size: int, expected: int) -> None:
    assert useful_workers(workers, world_size=world_size, readers=16) == expected
    assert useful_workers(workers, world_size=world_size, readers=1) == 1
