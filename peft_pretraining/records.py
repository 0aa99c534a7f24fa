"""Text files, one record at a time: what a format is, where a document starts, what can be wrong with it.

A record is a document that nobody has decoded yet. Reading a record is cheap and decoding it is not, so the readers of
a data-parallel run all walk the same records and each decodes only its own.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from peft_pretraining.errors import UserError

T = TypeVar("T")

JSON_SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
TEXT_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", *TEXT_SUFFIXES)

# The shuffle buffer of one reader. 10,000 lines of C4 are 22 MB.
BUFFER_RECORDS = 10_000
BUFFER_BYTES = 64 * 2**20


class Record(NamedTuple):
    """One undecoded document: a JSON line, a paragraph block of a text file, or a Parquet cell."""

    raw: bytes | str  # str only from Parquet, which decodes anyway
    path: Path
    line: int  # 1-based; the first line of the document, or the row

    @property
    def where(self) -> str:
        return f"{self.path} {'row' if self.path.name.endswith('.parquet') else 'line'} {self.line}"

    def text(self) -> str:
        """The document. Raises UserError with the file and the line where it is not UTF-8, not JSON or has no text."""
        if isinstance(self.raw, str):
            text = self.raw
        elif self.path.name.endswith(JSON_SUFFIXES):
            text = _json_text(_utf8(self, self.raw), where=self.where)
        else:
            text = _utf8(self, self.raw)
        # JSON may hold a lone surrogate ("\ud800"), which no tokenizer takes: it becomes "?".
        return text.encode("utf-8", "replace").decode("utf-8")


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file, in file order. Raises UserError where the file is damaged or cannot be read."""
    if path.name.endswith(".parquet"):
        yield from _parquet_records(path)
    elif path.name.endswith(TEXT_SUFFIXES):
        yield from _paragraph_records(path)
    else:
        yield from (Record(line, path, number) for number, line in _lines(path) if not line.isspace())


def shuffled(items: Iterable[T], *, rng: random.Random, size: Callable[[T], int]) -> Iterator[T]:
    """``items`` in an order drawn from ``rng``, through a buffer of BUFFER_RECORDS items and BUFFER_BYTES at most.

    ``size`` counts the bytes of an item.
    """
    buffer: list[T] = []
    held = 0
    for item in items:
        buffer.append(item)
        held += size(item)
        while len(buffer) > BUFFER_RECORDS or held > BUFFER_BYTES:
            i = int(rng.random() * len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            chosen = buffer.pop()
            held -= size(chosen)
            yield chosen
    rng.shuffle(buffer)
    yield from buffer


def _open(path: Path) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(path))  # a buffer of C code: lines come 1.5 times as fast
    return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged after line {number} ({error}). Download or compress it again.") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error


def _paragraph_records(path: Path) -> Iterator[Record]:
    """Documents separated by blank lines."""
    block: list[bytes] = []
    for number, line in _lines(path):
        if not line.isspace():
            block.append(line)
        elif block:
            yield Record(b"".join(block).rstrip(), path, number - len(block))
            block = []
    if block:
        yield Record(b"".join(block).rstrip(), path, number - len(block) + 1)


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow).") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f'{path} has no "text" column (columns: {", ".join(file.schema_arrow.names)}).')
            for batch in file.iter_batches(columns=["text"], batch_size=1024):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield Record(_expect_text(text, where=f"{path} row {row}"), path, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged after row {row} ({_first_line(error)}). Download it again.") from error


def _utf8(record: Record, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")  # -sig: editors on Windows open a file with a byte-order mark
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = record.line + before.count(b"\n"), error.start - before.rfind(b"\n")
        raise UserError(
            f"{record.path} line {line}: not valid UTF-8 (byte 0x{raw[error.start]:02x} at column {column}). "
            "Convert the file to UTF-8 or remove the line."
        ) from error


def _json_text(line: str, *, where: str) -> str:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}). Fix or remove the line."
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply. Fix or remove the line.") from error
    if not isinstance(document, dict):
        raise UserError(f'{where}: not an object with a "text" field. Write one {{"text": ...}} a line.')
    if "text" not in document:
        fields = ", ".join(document) or "none"
        raise UserError(f'{where}: no "text" field (fields: {fields[:100]}). Rename the field that holds the text.')
    return _expect_text(document["text"], where=where)


def _expect_text(value: Any, *, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f'{where}: "text" is not a string but {json.dumps(value, default=str)[:40]}. Fix or remove it.')
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
