"""Documents to batches: tokenize, pack into sequences, share out over ranks and workers, collate, prefetch.

    source --worker 0--> tokens --> sequences --\\
    source --worker 1--> tokens --> sequences ---> round robin --> batches --(thread)--> the training loop

Workers hand over sequences, not batches, so the order of the sequences does not depend on the batch size: 1 x 32, 4 x 8
and 8 x 4 train on the same ones in the same order. Each worker packs its own documents, epoch after epoch without end;
workers need not finish an epoch together.
"""

from __future__ import annotations

import queue
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from peft_pretraining.documents import DocumentSource
from peft_pretraining.errors import UserError

if TYPE_CHECKING:
    from peft_pretraining.tokenizer import Tokenizer

T = TypeVar("T")
Packing = Literal["concat", "truncate"]

IGNORED = -100  # the target where nothing is to be predicted: what cross_entropy ignores
CHUNK = 64  # documents given to the tokenizer at a time
PREFETCHED = 2  # batches ready before they are asked for
EMPTY_EPOCHS = 20  # times the number of readers: so many in a row without a document, and there is none


@dataclass(frozen=True)
class Batch:
    """input_ids, targets: (B, L) int64; ``targets[b, t]`` is what follows ``input_ids[b, t]``, or IGNORED.

    epoch: 0-based, the latest that a document of this batch came from.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    epoch: int


class Sequence(NamedTuple):
    """What a worker hands over. tokens: (2, L) int32, input ids above targets."""

    tokens: np.ndarray
    epoch: int


def pack_concat(token_lists: Iterable[list[int]], *, length: int, eos_id: int) -> Iterator[np.ndarray]:
    """Documents, each followed by EOS, as one stream cut into windows that share just their boundary token.

    Yields (2, length) int32: ``stream[k*L : (k+1)*L]`` above ``stream[k*L+1 : (k+1)*L+1]``, so every transition of the
    stream is a target exactly once. Only where the documents end is a window padded (EOS above IGNORED).
    """
    stream: list[int] = []
    for ids in token_lists:
        stream += ids
        stream.append(eos_id)
        start = 0
        while start + length < len(stream):
            yield _sequence(stream[start : start + length + 1], length=length, pad_id=eos_id)
            start += length
        del stream[:start]
    if len(stream) > 1:
        yield _sequence(stream, length=length, pad_id=eos_id)


def pack_truncate(token_lists: Iterable[list[int]], *, length: int, eos_id: int, pad_id: int) -> Iterator[np.ndarray]:
    """One document a sequence, as the published baselines do: cut at ``length`` tokens, EOS where it fits, padding.

    Yields (2, length) int32. Nothing is predicted at the last position and on padding, and tails are never seen.
    """
    for ids in token_lists:
        yield _sequence([*ids[:length], eos_id][:length], length=length, pad_id=pad_id)


def _sequence(tokens: list[int], *, length: int, pad_id: int) -> np.ndarray:
    """(2, length) int32 from at most length + 1 tokens: inputs above targets, padded with pad_id above IGNORED."""
    sequence = np.empty((2, length), dtype=np.int32)
    inputs, targets = tokens[:length], tokens[1:]
    sequence[0, : len(inputs)], sequence[0, len(inputs) :] = inputs, pad_id
    sequence[1, : len(targets)], sequence[1, len(targets) :] = targets, IGNORED
    return sequence


def _pack(
    token_lists: Iterable[list[int]], tokenizer: Tokenizer, *, packing: Packing, length: int
) -> Iterator[np.ndarray]:
    if packing == "concat":
        return pack_concat(token_lists, length=length, eos_id=tokenizer.eos_id)
    assert packing == "truncate", packing
    return pack_truncate(token_lists, length=length, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def _encode(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each document that has any, tokenized by the chunk."""
    while chunk := list(islice(texts, CHUNK)):
        yield from filter(None, tokenizer.encode(chunk))


def train_batches(
    source: DocumentSource,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    max_length: int,
    packing: Packing,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Endless batches of this rank, epoch after reshuffled epoch; the same ones for the same arguments.

    batch_size: sequences, B. max_length: tokens of a sequence, L. workers: processes that read and tokenize, or 0.
    Batches arrive on ``device``, the next ones made in the background. Closing the iterator ends thread and workers.

    Raises UserError, also from inside a worker, where a document cannot be read or there is none.
    """
    assert batch_size >= 1 and max_length >= 2 and 0 <= rank < world_size
    dataset = _Sequences(source, tokenizer, max_length=max_length, packing=packing, rank=rank, world_size=world_size)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        prefetch_factor=max(2, 2 * batch_size // workers) if workers else None,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        generator=torch.Generator(),  # else it takes a number from the global generator, and the model's weights change
    )
    # iter() starts the workers: here, because a process should not be forked from the prefetching thread.
    return _deliver(iter(loader), batch_size=batch_size, device=torch.device(device))


class _Sequences(IterableDataset):
    """The endless sequences of one reader; which reader it is depends on the worker it finds itself in."""

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        packing: Packing,
        rank: int,
        world_size: int,
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.max_length, self.packing = max_length, packing
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Sequence | UserError]:
        """A UserError comes as a value, because DataLoader would wrap a raised one into a page of traceback."""
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        documents = _EndlessDocuments(
            self.source,
            self.tokenizer,
            reader=worker_id * self.world_size + self.rank,
            readers=workers * self.world_size,
        )
        try:
            for tokens in _pack(documents, self.tokenizer, packing=self.packing, length=self.max_length):
                yield Sequence(tokens, documents.epoch)
        except UserError as error:
            yield error


class _EndlessDocuments:
    """A reader's tokenized documents, epoch after epoch; ``epoch`` is that of the last one handed out."""

    def __init__(self, source: DocumentSource, tokenizer: Tokenizer, *, reader: int, readers: int) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.reader, self.readers = reader, readers
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        last = 0  # epoch in which there was a document
        for epoch in count():
            for ids in _encode(self.source.read(epoch=epoch, reader=self.reader, readers=self.readers), self.tokenizer):
                self.epoch = last = epoch
                yield ids
            # Shares move on with the epoch, so even where readers outnumber documents each has one soon.
            if epoch - last >= EMPTY_EPOCHS * self.readers:
                raise UserError(f"no document with text in {self.source.name}. Is it empty?")


def _deliver(
    sequences: Iterator[Sequence | UserError], *, batch_size: int, device: torch.device
) -> Generator[Batch, None, None]:
    # DataLoader has no public way to end its workers. Left to the garbage collector, as after an error that keeps its
    # frames alive, they take 5 seconds each.
    end_workers = getattr(sequences, "_shutdown_workers", lambda: None)
    prefetcher = _Prefetcher(_collate(sequences, batch_size=batch_size), finish=end_workers)
    del sequences  # now they end with the thread, not with the interpreter
    with closing(prefetcher) as batches:
        for batch in batches:
            yield _to_device(batch, device)


def _collate(sequences: Iterator[Sequence | UserError], *, batch_size: int) -> Iterator[Batch]:
    while True:
        chosen: list[Sequence] = []
        for item in islice(sequences, batch_size):
            if isinstance(item, UserError):
                raise item
            chosen.append(item)
        assert chosen, "the sequences never end"
        tokens = torch.from_numpy(np.stack([sequence.tokens for sequence in chosen]))  # (B, 2, L) int32
        yield _batch(tokens, epoch=max(sequence.epoch for sequence in chosen))


class _Prefetcher(Iterator[T]):
    """``items``, made ahead of time by a thread. ``close()`` ends the thread, then calls ``finish``.

    A process that exits with the thread running closes it too: frozen in the midst of a tensor, it would abort instead.
    """

    def __init__(self, items: Iterator[T], *, finish: Callable[[], object] = lambda: None) -> None:
        self._ready: queue.Queue[T | BaseException] = queue.Queue(PREFETCHED)
        stopped = threading.Event()
        thread = threading.Thread(target=_fill, args=(items, self._ready, stopped), name="prefetch", daemon=True)
        self.close = weakref.finalize(self, _stop, thread, self._ready, stopped, finish)
        thread.start()

    def __next__(self) -> T:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item


def _fill(items: Iterator[T], ready: queue.Queue[T | BaseException], stopped: threading.Event) -> None:
    try:
        for item in items:
            ready.put(item)
            if stopped.is_set():
                return
    except BaseException as error:
        ready.put(error)


def _stop(thread: threading.Thread, ready: queue.Queue, stopped: threading.Event, finish: Callable[[], object]) -> None:
    stopped.set()
    while not ready.empty():  # makes room for the one item that the thread may be waiting to put
        ready.get_nowait()
    thread.join(timeout=5)  # it may be waiting for the hub to come back
    finish()


def _batch(tokens: torch.Tensor, *, epoch: int) -> Batch:
    """tokens: (B, 2, L) int32."""
    input_ids, targets = tokens.long().unbind(1)
    return Batch(input_ids.contiguous(), targets.contiguous(), epoch)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type != "cuda":
        return Batch(batch.input_ids.to(device), batch.targets.to(device), batch.epoch)
    # In the caller's thread, because the current GPU is a property of the thread. Pinned, so that nobody waits for it.
    input_ids, targets = (
        tensor.pin_memory().to(device, non_blocking=True) for tensor in (batch.input_ids, batch.targets)
    )
    return Batch(input_ids, targets, batch.epoch)


def _identity(item: T) -> T:
    return item


def _leave_interrupts_to_the_main_process(worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # else ctrl-C prints one traceback per worker


class ValidationSet:
    """The first ``tokens`` target tokens of the validation stream, read once; iterates over this rank's batches.

    The same targets for any world size and batch size: sequence i belongs to rank i % world_size. All ranks have as
    many batches, because they compute a sharded model together: where sequences run out, a row has no target at all.

    Raises UserError where there is no validation document.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        tokens: int,
        batch_size: int,
        max_length: int,
        packing: Packing,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        assert tokens >= 1 and batch_size >= 1 and max_length >= 2 and 0 <= rank < world_size
        self.batch_size = batch_size
        self.device = torch.device(device)
        documents = _encode(source.read(epoch=0, reader=0, readers=1), tokenizer)
        sequences, self.tokens = _take_targets(
            _pack(documents, tokenizer, packing=packing, length=max_length), tokens=tokens
        )
        if not sequences:
            raise UserError(f"no validation document in {source.name}. Give some with --validation PATH.")
        nothing = _sequence([], length=max_length, pad_id=tokenizer.pad_id)
        sequences += [nothing] * (-len(sequences) % world_size)
        self.sequences = torch.from_numpy(np.stack(sequences[rank::world_size]))  # (N, 2, L) int32

    def __len__(self) -> int:
        """Batches of this rank; the same for all ranks."""
        return -(-len(self.sequences) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for tokens in self.sequences.split(self.batch_size):
            yield _to_device(_batch(tokens, epoch=0), self.device)


def _take_targets(sequences: Iterator[np.ndarray], *, tokens: int) -> tuple[list[np.ndarray], int]:
    """The first sequences that hold ``tokens`` targets, and how many they hold; what is beyond becomes IGNORED."""
    taken: list[np.ndarray] = []
    missing = tokens
    for sequence in sequences:
        taken.append(sequence)
        places = np.flatnonzero(sequence[1] != IGNORED)
        sequence[1, places[missing:]] = IGNORED
        missing -= min(missing, len(places))
        if missing == 0:
            break
    return taken, tokens - missing
