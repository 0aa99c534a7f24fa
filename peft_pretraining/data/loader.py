"""Documents to batches: tokenize, pack into sequences, share out over ranks and workers, collate, prefetch.

    source --worker 0--> tokens --> sequences --\\
    source --worker 1--> tokens --> sequences ---> round robin --> batches --(thread)--> the training loop

Workers hand over sequences, not batches, so the order of the sequences does not depend on the batch size: 1 x 32, 4 x 8
and 8 x 4 train on the same ones in the same order. It does not depend on the number of ranks and workers either:
readers.py says how.
"""

from __future__ import annotations

import queue
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial, reduce
from itertools import count, islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from loguru import logger
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from peft_pretraining.batch import Batch
from peft_pretraining.data.packing import Packing, Sequence, TooLong
from peft_pretraining.data.position import Position, Progress, resume_progress
from peft_pretraining.data.readers import Readers, useful_workers
from peft_pretraining.data.sources import DocumentSource
from peft_pretraining.distributed import STOP_SIGNALS
from peft_pretraining.errors import UserError

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

T = TypeVar("T")

PREFETCHED = 2  # batches ready before they are asked for


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
    resume: Any = None,
) -> Generator[Batch, None, None]:
    """Endless batches of this rank, epoch after reshuffled epoch; the same ones for the same arguments.

    The k-th batches of all ranks together have the sequences that one rank with the batch size of all would have.

    batch_size: sequences in a batch, B.
    max_length: tokens of a sequence, L.
    workers: processes that read and tokenize; 0 for a thread of this one. More than have documents of their own are not
        started.
    resume: JSON of the progress of a run, which goes on exactly, with any number of ranks and workers: that of a
        `Batch.position`, merged over the ranks. For what older checkpoints have, see resume_progress.
    Batches arrive on `device`, the next ones made in the background. Closing the iterator ends thread and workers.

    A document that cannot be read is left out and named in `Batch.skipped`.
    Raises UserError, also from inside a worker, where a file is gone or there is no document at all.
    """
    assert batch_size >= 1 and max_length >= 2 and 0 <= rank < world_size
    if resume is None:
        progress = Progress((Position(),) * source.readers)
    else:
        progress = resume_progress(resume, shares=world_size * max(1, workers), readers=source.readers, rank=rank)
    workers = _started(workers, world_size=world_size, readers=len(progress.readers))
    first = progress.sequences + rank
    readers = partial(Readers, source, tokenizer, max_length=max_length, packing=packing, progress=progress)
    loader = DataLoader(
        _Sequences(readers, first=first, step=world_size),
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        prefetch_factor=max(2, 2 * batch_size // workers) if workers else None,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else it takes a number from the global generator, and the model's weights change
    )
    # iter() starts the workers: here, because a process should not be forked from the prefetching thread.
    collate = partial(_collate, batch_size=batch_size, progress=progress, first=first, step=world_size)
    return _deliver(iter(loader), collate=collate, device=torch.device(device))


def _started(workers: int, *, world_size: int, readers: int) -> int:
    """How many of the workers are started: those that have documents of their own."""
    useful = useful_workers(workers, world_size=world_size, readers=readers)
    if useful >= workers:
        return workers
    logger.info(f"--workers {workers}: started {useful}, because more would read the same documents")
    return useful


class _Sequences(IterableDataset):
    """The endless sequences of one worker: its share of `first`, `first + step`, ..., which are the rank's."""

    def __init__(self, readers: Callable[..., Readers], *, first: int, step: int) -> None:
        """readers: makes the readers of a worker from its own `first` and `step`."""
        self.readers, self.first, self.step = readers, first, step

    def __iter__(self) -> Iterator[Sequence | UserError]:
        """Yields a UserError instead of raising it, because DataLoader would wrap it into a page of traceback."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)  # DataLoader asks them in turn
        try:
            yield from self.readers(first=self.first + worker * self.step, step=workers * self.step).sequences()
        except UserError as error:
            yield error


def _deliver(
    sequences: Iterator[Sequence | UserError],
    *,
    collate: Callable[[Iterator[Sequence | UserError]], Iterator[Batch]],
    device: torch.device,
) -> Generator[Batch, None, None]:
    # DataLoader has no public way to end its workers. Left to the garbage collector, as after an error that keeps its
    # frames alive, they take 5 seconds each.
    end_workers = getattr(sequences, "_shutdown_workers", lambda: None)
    prefetcher = _Prefetcher(collate(sequences), finish=end_workers)
    del sequences  # now they end with the thread, not with the interpreter
    with closing(prefetcher) as batches:
        for batch in batches:
            yield batch.to(device)


def _collate(
    sequences: Iterator[Sequence | UserError], *, batch_size: int, progress: Progress, first: int, step: int
) -> Iterator[Batch]:
    positions, had = list(progress.readers), progress.sequences
    numbers = count(first, step)
    while True:
        chosen: list[Sequence] = []
        for item, number in zip(islice(sequences, batch_size), numbers, strict=False):
            if isinstance(item, UserError):
                raise item
            chosen.append(item)
            positions[number % len(positions)] = item.position
        assert chosen, "the sequences never end"
        had += batch_size * step
        tokens = torch.from_numpy(np.stack([sequence.tokens for sequence in chosen]))  # (B, 2, L) int32
        yield replace(
            Batch.of(tokens, epoch=max(one.position.epoch if one.epoch is None else one.epoch for one in chosen)),
            position=replace(progress, readers=tuple(positions), sequences=had),
            too_long=reduce(TooLong.plus, (one.too_long for one in chosen if any(one.too_long)), TooLong()),
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
