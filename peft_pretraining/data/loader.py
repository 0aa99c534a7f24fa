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
from collections import abc
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from peft_pretraining.batch import Batch
from peft_pretraining.data.order import Skipped
from peft_pretraining.data.packing import Packing, Piece, Sequence, encode, make_packer, to_sequence
from peft_pretraining.data.position import Progress, resume_progress
from peft_pretraining.data.sources import DocumentSource
from peft_pretraining.distributed import STOP_SIGNALS
from peft_pretraining.errors import UserError

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

T = TypeVar("T")

PREFETCHED = 2  # batches ready before they are asked for
EMPTY_EPOCHS = 20  # times the number of readers: epochs in a row without a document, after which there is none
MAX_SKIPPED = 64  # bad documents that a reader keeps to itself while it looks for a good one


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
    resume: abc.Sequence[dict[str, Any]] | None = None,
) -> Generator[Batch, None, None]:
    """Endless batches of this rank, epoch after reshuffled epoch; the same ones for the same arguments.

    batch_size: sequences in a batch, B.
    max_length: tokens of a sequence, L.
    workers: processes that read and tokenize; 0 for a thread of this one.
    resume: `Batch.position` of the last batch of each rank. With the same number of ranks and workers (0 counts as 1),
        the batches go on exactly. Otherwise no document is lost, and only those cut in the middle are read twice.
    Batches arrive on `device`, the next ones made in the background. Closing the iterator ends thread and workers.

    A document that cannot be read is left out and named in `Batch.skipped`.
    Raises UserError, also from inside a worker, where a file is gone or there is no document at all.
    """
    assert batch_size >= 1 and max_length >= 2 and 0 <= rank < world_size
    if resume is None:
        progress = Progress.at_start(world_size=world_size, workers=max(1, workers))
    else:
        progress = resume_progress(resume, rank=rank, world_size=world_size, workers=max(1, workers))
    dataset = _Sequences(source, tokenizer, max_length=max_length, packing=packing, rank=rank, progress=progress)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        prefetch_factor=max(2, 2 * batch_size // workers) if workers else None,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else it takes a number from the global generator, and the model's weights change
    )
    # iter() starts the workers: here, because a process should not be forked from the prefetching thread.
    return _deliver(iter(loader), batch_size=batch_size, progress=progress, device=torch.device(device))


class _Sequences(IterableDataset):
    """The endless sequences of one reader, whose number depends on the worker that it runs in."""

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        packing: Packing,
        rank: int,
        progress: Progress,
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.max_length, self.packing = max_length, packing
        self.rank, self.progress = rank, progress

    def __iter__(self) -> Iterator[Sequence | UserError]:
        """Yields a UserError instead of raising it, because DataLoader would wrap it into a page of traceback."""
        info = get_worker_info()
        # DataLoader asks worker 0 first, so the new worker 0 goes on where it is whose turn it was.
        worker = ((info.id if info is not None else 0) + self.progress.turn) % len(self.progress.positions)
        try:
            yield from self._sequences(worker)
        except UserError as error:
            yield error

    def _sequences(self, worker: int) -> Iterator[Sequence]:
        position = self.progress.positions[worker]
        length = self.max_length
        packer = make_packer(self.packing, self.tokenizer, length=length, eos_first=position.eos_first)
        skipped: list[str] = []
        for item in self._pieces(worker):
            if isinstance(item, Piece):
                for sequence in packer.add(item):
                    position = sequence.position
                    yield sequence._replace(skipped=tuple(skipped))
                    skipped.clear()
                continue
            skipped.append(item.reason)
            if len(skipped) == MAX_SKIPPED:  # report them now, with a sequence that has no targets
                position = position._replace(reported=position.reported + MAX_SKIPPED)
                nothing = to_sequence([], length=length, pad_id=self.tokenizer.pad_id)
                yield Sequence(nothing, position, tuple(skipped))
                skipped.clear()

    def _pieces(self, worker: int) -> Iterator[Piece | Skipped]:
        """The reader's tokenized documents from its position on, epoch after epoch."""
        world_size, start = self.progress.world_size, self.progress.positions[worker]
        share = {"reader": worker * world_size + self.rank, "readers": len(self.progress.positions) * world_size}
        reported = start.reported
        last = start.epoch  # in which there was a document
        for epoch in count(start.epoch):
            documents = self.source.read(epoch=epoch, **share, start=start, earlier=self.progress.earlier)
            for item in encode(documents, self.tokenizer, start=start):
                if isinstance(item, Piece):
                    last = epoch
                elif reported:
                    reported -= 1
                    continue
                yield item
            # Shares move on with the epoch, so even where readers outnumber documents each has one soon.
            if epoch - last >= EMPTY_EPOCHS * share["readers"]:
                raise UserError(f"no document with text in {self.source.name}. Is it empty?")


def _deliver(
    sequences: Iterator[Sequence | UserError], *, batch_size: int, progress: Progress, device: torch.device
) -> Generator[Batch, None, None]:
    # DataLoader has no public way to end its workers. Left to the garbage collector, as after an error that keeps its
    # frames alive, they take 5 seconds each.
    end_workers = getattr(sequences, "_shutdown_workers", lambda: None)
    prefetcher = _Prefetcher(_collate(sequences, batch_size=batch_size, progress=progress), finish=end_workers)
    del sequences  # now they end with the thread, not with the interpreter
    with closing(prefetcher) as batches:
        for batch in batches:
            yield batch.to(device)


def _collate(sequences: Iterator[Sequence | UserError], *, batch_size: int, progress: Progress) -> Iterator[Batch]:
    while True:
        chosen: list[Sequence] = []
        for item in islice(sequences, batch_size):
            if isinstance(item, UserError):
                raise item
            chosen.append(item)
            progress = progress.advance(item.position)
        assert chosen, "the sequences never end"
        tokens = torch.from_numpy(np.stack([sequence.tokens for sequence in chosen]))  # (B, 2, L) int32
        yield replace(
            Batch.of(tokens, epoch=max(sequence.position.epoch for sequence in chosen)),
            position=progress.to_json(),
            skipped=tuple(reason for sequence in chosen for reason in sequence.skipped),
        )


class _Prefetcher(Iterator[T]):
    """`items`, made ahead of time by a thread. `close()` ends the thread, then calls `finish`.

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


def _identity(item: T) -> T:
    return item


def _leave_signals_to_the_main_process(worker_id: int) -> None:
    """Lets a worker ignore signals to the whole process group: the main process needs it until the update is done.

    A second SIGTERM counts: it is how a worker that does not end by itself is ended.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
