"""Writing token shards: the files of a data set, tokenized side by side by processes.

Shards gather in a hidden folder, .NAME.incomplete, which gets its name when all of them are there. Each finished shard
is noted in the hidden folder's index, so a run that was killed goes on with the rest. A shard depends on its file of
text and on the tokenizer alone, so the result is the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from loguru import logger
from tqdm import tqdm

from peft_pretraining.data.folders import Split
from peft_pretraining.data.order import Document, OrderedDocuments, Skipped
from peft_pretraining.data.pieces import encode
from peft_pretraining.data.position import Position
from peft_pretraining.data.sources import open_documents
from peft_pretraining.data.token_shards import (
    INDEX,
    ROW,
    SPLITS,
    Shard,
    TokenIndex,
    holds_tokens,
    read_index,
    sha256_of,
)
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError

PARTIAL = "partial.json"  # the index of a folder that is not complete
MAX_SIZE = 2**32 - 1  # of a record, in an .idx file


class _Job(NamedTuple):
    """One file of a split, to become a shard."""

    split: Split
    name: str
    source: OrderedDocuments[Any]
    file: Any


def tokenize(
    dataset: str,
    tokenizer: Tokenizer,
    output: Path,
    *,
    validation: str | None,
    text_field: str,
    processes: int,
    max_bad_documents: int,
) -> TokenIndex:
    """Writes the folder `output` of token shards of both splits. Returns their index.

    dataset, validation, text_field: see open_documents.
    output: the folder, which must not exist yet.
    processes: how many files are tokenized at a time.
    max_bad_documents: documents that may be unreadable; each is skipped and named in a warning.
    Raises UserError if there is nothing to read, more documents are bad, or files cannot be written.
    """
    if holds_tokens(dataset):
        raise UserError(f"{dataset} is tokenized already.")
    options = dict(seed=0, validation=validation, text_field=text_field)
    sources = {split: open_documents(dataset, split=split, **options) for split in SPLITS}  # type: ignore[arg-type]
    for source in sources.values():
        source.check()
    read = json.dumps([sources[split].fingerprint() for split in SPLITS], sort_keys=True)
    made_from = {"dataset": dataset, "validation": validation, "text_field": text_field}
    made_from["files"] = hashlib.sha256(read.encode()).hexdigest()
    hidden = output.parent / f".{output.name}.incomplete"
    index = TokenIndex(hidden, tokenizer.vocab_size, tokenizer.name, tokenizer.digest(), made_from)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = output.parent / f".{output.name}.lock"
        with FileLock(lock, timeout=0):
            check_output(output)
            _begin(index)
            _write_shards(index, _jobs(sources), tokenizer, processes=processes, most=max_bad_documents)
            os.replace(hidden / PARTIAL, hidden / INDEX)
            os.replace(hidden, output)
            lock.unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process is writing {output}. Wait for it, or give another --output.") from None
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}. What is done is kept: run it again."
        ) from error
    return read_index(output)


def check_output(output: Path) -> None:
    """Raises UserError if the folder exists."""
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists, and is not overwritten. Give another --output, or remove it.")


def _begin(index: TokenIndex) -> None:
    """Makes the hidden folder. Shards of a run that was killed are kept if they would become the same."""
    try:
        before = read_index(index.folder, name=PARTIAL)
        for split in SPLITS:
            before.check_sizes(split)
    except UserError:
        before = None
    same = before and (before.digest, before.made_from) == (index.digest, index.made_from)
    if before and same:
        index.shards = before.shards
        logger.info(f"going on with {sum(map(len, before.shards.values()))} finished files in {index.folder}")
    else:
        shutil.rmtree(index.folder, ignore_errors=True)
        index.folder.mkdir()


def _jobs(sources: dict[Split, Any]) -> list[_Job]:
    jobs = []
    for split, source in sources.items():
        source.shuffle = False
        files = [file for part in source.parts(0) for file in part]
        jobs += [_Job(split, f"{split}-{number:05}", source, file) for number, file in enumerate(files)]
    return jobs


def _write_shards(index: TokenIndex, jobs: list[_Job], tokenizer: Tokenizer, *, processes: int, most: int) -> None:
    """Tokenizes what is not in the index yet. Raises UserError if more than `most` documents are bad."""
    done = {shard.name for shards in index.shards.values() for shard in shards}
    left = [job for job in jobs if job.name not in done]
    write = partial(write_shard, tokenizer=tokenizer, folder=index.folder, dtype=index.dtype, most=most)
    pool = ProcessPoolExecutor(min(processes, len(left)) or 1, initializer=_start, initargs=(write, left))
    bar = tqdm(total=len(jobs), initial=len(done), unit="file", dynamic_ncols=True, disable=None)
    try:
        futures: dict[Future, _Job] = {pool.submit(_write, number): job for number, job in enumerate(left)}
        for future in as_completed(futures):
            shard, skipped = future.result()
            for reason in skipped:
                logger.warning(f"skipped: {reason}")
            bad = shard.bad_documents + sum(index.count(split)["bad_documents"] for split in SPLITS)
            if bad > most:
                advice = "Repair the data, or raise --max_bad_documents."
                raise UserError(f"{bad} documents could not be read (see above). {advice}")
            _note(index, futures[future].split, shard)
            tokens = sum(index.count(split)["tokens"] for split in SPLITS)
            bar.set_postfix_str(f"{tokens / 1e6:,.1f}M tokens")
            bar.update()
            if bar.disable:  # no terminal
                logger.info(f"{sum(map(len, index.shards.values()))} of {len(jobs)} files, {tokens / 1e6:,.1f}M tokens")
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, perhaps for want of memory. Run it again with fewer --processes."
        ) from None
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


_work: list[Any] = []  # of this process: how a file is tokenized, and the jobs


def _start(write: Callable[[_Job], tuple[Shard, list[str]]], jobs: list[_Job]) -> None:
    """Begins a process, which ends when the one that started it is gone, even if that was killed.

    It is told here what it needs, so that later only numbers travel: the pool of Python 3.10 can wait for ever where a
    process dies while something large is on its way to it.
    """
    _work[:] = write, jobs

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write(number: int) -> tuple[Shard, list[str]]:
    write, jobs = _work
    return write(jobs[number])


def _note(index: TokenIndex, split: Split, shard: Shard) -> None:
    """Adds a finished shard to the index in the hidden folder."""
    index.shards[split] = sorted([*index.shards[split], shard], key=lambda each: (len(each.name), each.name))
    new = index.folder / f"{PARTIAL}.new"
    with new.open("w") as file:
        file.write(json.dumps(index.to_json(), indent=1))
        _to_disk(file)
    os.replace(new, index.folder / PARTIAL)


def write_shard(
    job: _Job, *, tokenizer: Tokenizer, folder: Path, dtype: np.dtype, most: int
) -> tuple[Shard, list[str]]:
    """Tokenizes one file. Returns its shard and why documents were skipped; stops when these are more than `most`."""
    path, skipped = folder / job.name, list[str]()
    pending: deque[tuple[int, int]] = deque()  # line and size of records that have no row yet
    rows = array("I")  # of the .idx file
    documents = tokens = 0

    def read() -> Iterator[Document | Skipped]:
        for number, record in enumerate(job.source.records(job.file, line=1)):
            pending.append((record.line, min(record.size, MAX_SIZE)))
            yield from job.source.decode(record, Position(document=number))

    done = 0  # records that have a row
    with path.with_suffix(".bin").open("wb") as file:
        for piece in encode(read(), tokenizer):
            if isinstance(piece, Skipped):
                skipped.append(piece.reason)
                if len(skipped) > most:
                    break
                continue
            while done < piece.position.document:  # nothing came of these
                rows.extend((0, *pending.popleft()))
                done += 1
            file.write(np.asarray(piece.ids, dtype).tobytes())
            rows.extend((len(piece.ids), *pending[0]))
            tokens += len(piece.ids)
            if piece.last:
                pending.popleft()
                done, documents = done + 1, documents + 1
        _to_disk(file)
    for place in pending:
        rows.extend((0, *place))
    with path.with_suffix(".idx").open("wb") as file:
        file.write(np.array(rows, ROW).tobytes())
        _to_disk(file)
    hashes = [sha256_of(path.with_suffix(suffix)) for suffix in (".bin", ".idx")]
    return Shard(job.name, len(rows) // 3, documents, tokens, len(skipped), *hashes), skipped


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
