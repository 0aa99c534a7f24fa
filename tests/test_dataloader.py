"""Batches: the token stream exactly, every document once, the same order whatever the batch size, clean ends."""

import multiprocessing
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from loguru import logger
from support.batches import TOKENIZER, ByteTokenizer, documents, local, rows, take
from support.runs import ROOT

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.data import loader as dataloader
from peft_pretraining.data import pieces, records
from peft_pretraining.data.hub import HubDocuments
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.sources import LocalDocuments
from peft_pretraining.data.validation import ValidationSet
from peft_pretraining.errors import UserError

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def texts_of_first_epochs(batches: Iterator[Batch], *, epochs: int, total: int) -> list[list[str]]:
    """The documents of each of the first epochs, from one-sequence batches of truncated documents."""
    found: list[list[str]] = [[] for _ in range(epochs)]
    for batch in take(batches, total):
        if batch.epoch < epochs:
            found[batch.epoch].append(TOKENIZER.decode(batch.input_ids[0].tolist()))
    return found


# Packing


def test_training_stream_is_carried_over_the_epoch(tmp_path: Path) -> None:
    """No tail is dropped: a reader's documents, two epochs of 7, come out as one unbroken stream."""
    source = local(tmp_path / "a.jsonl", documents(7))
    source.readers = 1
    batches = train_batches(source, TOKENIZER, batch_size=3, max_length=10, packing="concat")
    taken = take(batches, 6)
    expected = [
        token
        for epoch in range(3)
        for document in source.read(epoch=epoch)
        for token in (*document.text.encode(), TOKENIZER.eos_id)
    ]
    found = rows(taken)
    assert found[:, 0].flatten().tolist() == expected[:180]
    assert found[:, 1].flatten().tolist() == expected[1:181]
    # 98 tokens an epoch: a batch of 30 targets needs token 31, 61, 91, 121, ...
    assert [batch.epoch for batch in taken] == [0, 0, 0, 1, 1, 1]
    assert taken[0].input_ids.shape == (3, 10) and taken[0].targets.dtype == taken[0].input_ids.dtype == torch.int64


# Who reads what


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_two_ranks_read_each_document_once_per_epoch(tmp_path: Path, workers: int) -> None:
    source = local(tmp_path / "a.jsonl", documents(50))
    ranks = [
        texts_of_first_epochs(
            train_batches(
                source,
                TOKENIZER,
                batch_size=1,
                max_length=20,
                packing="truncate",
                rank=rank,
                world_size=2,
                workers=workers,
            ),
            epochs=2,
            total=100,
        )
        for rank in range(2)
    ]
    for first, second in zip(*ranks, strict=True):
        assert len(first) + len(second) == 50
        assert set(first) | set(second) == set(documents(50))
    assert ranks[0][0] != ranks[0][1]


@pytest.mark.parametrize("shards", [8, 6])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_hub_stream_is_not_split_twice(workers: int, shards: int) -> None:
    """`datasets` splits by DataLoader worker on its own: of a stream already split by reader, 7/8 was never read."""
    datasets = pytest.importorskip("datasets")

    def generate(shards: list[int]) -> Iterator[dict[str, str]]:
        for shard in shards:
            yield from ({"text": f"{shard} {i}"} for i in range(5))

    source = HubDocuments(split="train", seed=0)
    source._dataset = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(shards))})
    everything = Counter(f"{shard} {i}" for shard in range(shards) for i in range(5))
    options = {"batch_size": 1, "max_length": 20, "packing": "truncate", "world_size": 2, "workers": workers}
    ranks = [
        texts_of_first_epochs(train_batches(source, TOKENIZER, rank=rank, **options), epochs=2, total=160)
        for rank in range(2)
    ]
    for first, second in zip(*ranks, strict=True):
        assert Counter(first) + Counter(second) == everything


@pytest.mark.parametrize("workers", [0, 2])
def test_order_of_sequences_does_not_depend_on_batch_size(tmp_path: Path, workers: int) -> None:
    source = local(tmp_path / "a.jsonl", documents(60))
    found = [
        rows(
            take(
                train_batches(
                    source, TOKENIZER, batch_size=batch_size, max_length=16, packing="concat", workers=workers
                ),
                96 // batch_size,
            )
        )
        for batch_size in (32, 8, 4, 32)
    ]
    assert found[0].shape == (96, 2, 16)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_global_generator_is_left_alone(tmp_path: Path) -> None:
    """DataLoader draws a seed from it, so the number of workers would change the model's first weights."""
    before = torch.get_rng_state()
    take(
        train_batches(local(tmp_path / "a.jsonl", ["abc"]), TOKENIZER, batch_size=1, max_length=4, packing="concat"), 1
    )
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("packing", ["concat", "truncate"])
def test_more_workers_than_documents(tmp_path: Path, packing: str) -> None:
    source = local(tmp_path / "a.jsonl", ["first", "other"])
    batches = train_batches(source, TOKENIZER, batch_size=4, max_length=6, packing=packing, workers=3)
    words = {TOKENIZER.decode(row.tolist()) for batch in take(batches, 5) for row in batch.input_ids}
    assert packing == "concat" or words == {"first", "other"}


# Errors and ends


@pytest.mark.parametrize("workers", [0, 2])
def test_user_errors_arrive_as_one_line(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = local(tmp_path / "a.jsonl", documents(40))
    (tmp_path / "a.jsonl").unlink()
    monkeypatch.setattr(records, "RETRY_WAITS", ())
    with pytest.raises(UserError) as caught:
        next(train_batches(source, TOKENIZER, batch_size=2, max_length=8, packing="concat", workers=workers))
    assert str(caught.value).startswith(f"cannot read {tmp_path / 'a.jsonl'}: No such file or directory.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", ["concat", "truncate"])
def test_bad_documents_are_left_out_and_reported_once_an_epoch(tmp_path: Path, workers: int, packing: str) -> None:
    path = tmp_path / "a.jsonl"
    source = local(path, documents(40))
    source.readers = 4
    lines = path.read_text().splitlines()
    bad = {4: "{broken", 20: "{}", 43: '{"text": 1}'}
    for number in sorted(bad):
        lines.insert(number - 1, bad[number])
    path.write_text("\n".join(lines))
    options = {"batch_size": 2, "max_length": 16, "packing": packing, "workers": workers}
    found = take(train_batches(source, TOKENIZER, **options), 60)
    reported = Counter(reason.split(": ")[0] for batch in found for reason in batch.skipped)
    assert set(reported) == {f"{path} line {number}" for number in bad}
    # 120 sequences of 16 and 14 tokens are three epochs, and a reader's last may lie beyond them.
    assert all(2 <= count <= 4 for count in reported.values())
    assert sorted({len(batch.input_ids) for batch in found}) == [2]


def test_nothing_but_bad_documents_is_handed_over_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 150)
    source = LocalDocuments([path], name="a", seed=0, shuffle=False)
    source.readers = 1
    options = {"batch_size": 1, "max_length": 8, "packing": "concat"}
    batches = take(train_batches(source, TOKENIZER, **options), 3)
    assert [len(batch.skipped) for batch in batches] == [64, 64, 64]
    assert all((batch.targets == IGNORED).all() for batch in batches)
    (rest,) = take(train_batches(source, TOKENIZER, **options, resume=batches[0].position.to_json()), 1)
    assert rest.skipped == batches[1].skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_dataset(tmp_path: Path, workers: int) -> None:
    source = local(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match="no document with text in .*a.jsonl. Is it empty?"):
        next(train_batches(source, TOKENIZER, batch_size=2, max_length=8, packing="concat", workers=workers))


def test_other_errors_arrive_too(tmp_path: Path) -> None:
    class Broken(ByteTokenizer):
        def encode(self, texts: list[str]) -> list[list[int]]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(train_batches(local(tmp_path / "a.jsonl", ["a"]), Broken(), batch_size=1, max_length=8, packing="concat"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 3])
def test_closing_ends_thread_and_workers(tmp_path: Path, workers: int, taken: int) -> None:
    others = set(multiprocessing.active_children())  # support.ranks'
    source = local(tmp_path / "a.jsonl", documents(50))
    batches = train_batches(source, TOKENIZER, batch_size=2, max_length=8, packing="concat", workers=workers)
    list(islice(batches, taken))
    assert len(set(multiprocessing.active_children()) - others) == workers
    start = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    del batches
    assert time.monotonic() - start < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(3)"])
def test_process_ends_while_batches_are_open(tmp_path: Path, workers: int, ending: str) -> None:
    local(tmp_path / "a.jsonl", documents(50))
    script = f"""
import sys
sys.path.insert(0, "tests")
import multiprocessing
from pathlib import Path
from support.batches import TOKENIZER
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.sources import LocalDocuments
source = LocalDocuments([Path({str(tmp_path / "a.jsonl")!r})], name="", seed=0, shuffle=True)
batches = train_batches(source, TOKENIZER, batch_size=2, max_length=8, packing="concat", workers={workers})
for _ in range(3):
    next(batches)
print(len(multiprocessing.active_children()), flush=True)
{ending}
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.stdout == f"{workers}\n"
    assert run.stderr == ""
    assert run.returncode == (0 if ending == "pass" else 3)


def test_next_batch_is_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    stream = dataloader._Prefetcher(items())
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(made) < dataloader.PREFETCHED + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == dataloader.PREFETCHED + 2  # one given, two waiting, one in hand
    stream.close()


# Validation


def targets_of(sets: list[ValidationSet]) -> Counter[tuple[int, ...]]:
    """Every row that has a target, over all ranks."""
    found = rows([batch for one in sets for batch in one])[:, 1]
    return Counter(tuple(row.tolist()) for row in found if (row != IGNORED).any())


@pytest.mark.parametrize("packing", ["concat", "truncate"])
def test_validation_is_the_same_for_any_world_and_batch_size(tmp_path: Path, packing: str) -> None:
    source = local(tmp_path / "a.jsonl", documents(40), shuffle=False)
    reference = None
    for world_size, batch_size in ((1, 4), (1, 7), (2, 4), (3, 2), (8, 1)):
        sets = [
            ValidationSet(
                source,
                TOKENIZER,
                tokens=301,
                batch_size=batch_size,
                max_length=12,
                packing=packing,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        assert {one.tokens for one in sets} == {301}
        assert sum(int((batch.targets != IGNORED).sum()) for one in sets for batch in one) == 301
        assert len({len(one) for one in sets}) == 1 and len(sets[0]) == len(list(sets[0]))
        assert all(len(batch.input_ids) <= batch_size for one in sets for batch in one)
        reference = reference or targets_of(sets)
        assert targets_of(sets) == reference


def test_validation_follows_the_stream_and_reads_no_further(tmp_path: Path) -> None:
    source = local(tmp_path / "a.jsonl", documents(1000), shuffle=False)
    reading = iter(source.read(epoch=0))
    source.read = lambda **_: reading  # type: ignore[method-assign]
    validation = ValidationSet(source, TOKENIZER, tokens=100, batch_size=64, max_length=8, packing="concat")
    stream = [token for text in documents(20) for token in (*text.encode(), TOKENIZER.eos_id)]
    targets = rows(list(validation))[:, 1].flatten()
    assert targets[targets != IGNORED].tolist() == stream[1:101]
    assert len(list(reading)) >= 1000 - 2 * pieces.CHUNK


def test_bad_validation_documents_are_skipped_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n' + "{}\n" * 7 + '{"text": "def"}\n')
    source = LocalDocuments([path], name="a", seed=0, shuffle=False)
    warnings: list[str] = []
    handler = logger.add(lambda line: warnings.append(str(line).strip()), format="{message}")
    validation = ValidationSet(source, TOKENIZER, tokens=100, batch_size=4, max_length=64, packing="concat")
    logger.remove(handler)
    assert validation.tokens == 7
    assert warnings[0].startswith(f'skipped a validation document: {path} line 2: no "text" field')
    assert len(warnings) == 6 and warnings[5] == "skipped 2 more validation documents"


def test_tiny_and_empty_validation(tmp_path: Path) -> None:
    options = {"tokens": 1000, "batch_size": 4, "max_length": 64, "packing": "concat"}
    tiny = ValidationSet(local(tmp_path / "a.jsonl", ["abc"]), TOKENIZER, **options)
    assert tiny.tokens == 3 and len(tiny) == 1
    (batch,) = tiny
    assert batch.targets[0, :4].tolist() == [ord("b"), ord("c"), TOKENIZER.eos_id, IGNORED]
    with pytest.raises(UserError, match="no validation document in .*. Give some with --validation PATH."):
        ValidationSet(local(tmp_path / "b.jsonl", []), TOKENIZER, **options)
