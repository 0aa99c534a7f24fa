"""Text files, one record at a time: what a format is, where a document starts, what can be wrong with it.

A record is a document that nobody has decoded yet. Reading a record is cheap and decoding it is not, so the readers of
a data-parallel run all walk the same records and each decodes only its own. What is wrong with a file beyond one record
becomes a record, too: the last one that a damaged file gives cannot be decoded and says so.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from peft_pretraining.data.retry import retried
from peft_pretraining.errors import UserError

JSON_SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
TEXT_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", *TEXT_SUFFIXES)

RETRY_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds: a file server that hiccups is back by then


class Record(NamedTuple):
    """One undecoded document: a JSON line, a paragraph block of a text file, or a Parquet cell.

    problem: what is wrong with it, where that is known before it is decoded.
    """

    raw: Any  # bytes, or whatever a Parquet cell holds
    path: Path
    line: int  # 1-based; the first line of the document, or the row
    problem: str = ""

    @property
    def where(self) -> str:
        return f"{self.path} {_unit(self.path)} {self.line}"

    @property
    def size(self) -> int:
        return len(self.raw) if isinstance(self.raw, bytes | str) else 0

    def text(self) -> str:
        """The document. Raises UserError with the file and the line where it is not UTF-8, not JSON or has no text."""
        if self.problem:
            raise UserError(self.problem)
        if not isinstance(self.raw, bytes):
            text = _expect_text(self.raw, where=self.where)
        elif self.path.name.endswith(JSON_SUFFIXES):
            text = _json_text(_utf8(self, self.raw), where=self.where)
        else:
            text = _utf8(self, self.raw)
        # JSON may hold a lone surrogate ("\ud800"), which no tokenizer takes: it becomes "?".
        return text.encode("utf-8", "replace").decode("utf-8")


class _Damaged(Exception):
    """The file cannot be read beyond `after` lines or rows."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__(_first_line(error))
        self.after = after


def read_records(path: Path, *, line: int = 1) -> Iterator[Record]:
    """The records of one file, in file order, from the one that begins at `line` on.

    A damaged file ends with a record whose text() raises. A file that cannot be opened or read is tried again after
    each of RETRY_WAITS, where it broke. Raises UserError after the last.
    """

    def open_after(given: int, last: Record | None) -> Iterator[Record]:
        return _records(path, line) if last is None else islice(_records(path, last.line), 1, None)

    try:
        yield from retried(open_after, wait_after=partial(_wait_for_file, path))
    except _Damaged as damage:
        problem = f"{path} is damaged after {_unit(path)} {damage.after} ({damage}): the rest of it is skipped"
        yield Record(b"", path, damage.after + 1, problem)


def _wait_for_file(path: Path, error: Exception, failures: int, given: int) -> float:
    """Seconds to wait after a failure of the machine; raises any other error, and UserError after the last wait."""
    if not isinstance(error, OSError):
        raise error
    if failures > len(RETRY_WAITS):
        raise UserError(
            f"cannot read {path}: {error.strerror or error}. Bring it back and resume, or take it out."
        ) from error
    wait = RETRY_WAITS[failures - 1]
    logger.warning(f"cannot read {path}: {error.strerror or error}. Trying again in {wait:g} s.")
    return wait


def _records(path: Path, start: int) -> Iterator[Record]:
    if path.name.endswith(".parquet"):
        return _parquet_records(path, start)
    if path.name.endswith(TEXT_SUFFIXES):
        return _paragraph_records(path, start)
    return (Record(line, path, number) for number, line in _lines(path, start) if not line.isspace())


def _unit(path: Path) -> str:
    return "row" if path.name.endswith(".parquet") else "line"


def _open(path: Path) -> io.BufferedReader:
    if path.suffix != ".gz":
        return path.open("rb")
    if path.stat().st_size == 0:
        raise EOFError("the file is empty")  # gzip takes it for no data, and a lost shard would go unnoticed
    return io.BufferedReader(gzip.GzipFile(path))  # a buffer of C code: lines come 1.5 times as fast


def _lines(path: Path, start: int) -> Iterator[tuple[int, bytes]]:
    number = start - 1
    try:
        with _open(path) as file:
            for number, line in islice(enumerate(file, start=1), start - 1, None):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Damaged(number, error) from error


def _paragraph_records(path: Path, start: int) -> Iterator[Record]:
    """Documents separated by blank lines."""
    block: list[bytes] = []
    for number, line in _lines(path, start):
        if not line.isspace():
            block.append(line)
        elif block:
            yield Record(b"".join(block).rstrip(), path, number - len(block))
            block = []
    if block:
        yield Record(b"".join(block).rstrip(), path, number - len(block) + 1)


def _parquet_records(path: Path, start: int) -> Iterator[Record]:
    """Row groups before `start` are not read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow).") from error
    row = 0
    try:
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            if "text" not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                yield Record(b"", path, 1, f'{path} has no "text" column (columns: {columns}).')
                return
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows < start:
                    row += rows
                    continue
                for batch in file.iter_batches(columns=["text"], batch_size=1024, row_groups=[group]):
                    for cell in _cells(batch.column(0)):
                        row += 1
                        if row >= start:
                            yield Record(cell, path, row)
    except pyarrow.ArrowException as error:
        raise _Damaged(max(row, start - 1), error) from error
    except OSError as error:
        if error.errno is not None:
            raise  # the machine's fault, not the file's
        raise _Damaged(max(row, start - 1), error) from error


def _cells(column: Any) -> list[Any]:
    """Text as bytes, so that one cell of bad UTF-8 spoils only itself; other kinds as they are."""
    import pyarrow

    try:
        return column.cast(pyarrow.large_binary()).to_pylist()
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid):
        return column.to_pylist()


def _utf8(record: Record, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")  # -sig: editors on Windows open a file with a byte-order mark
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = record.line + before.count(b"\n"), error.start - before.rfind(b"\n")
        byte = f"byte 0x{raw[error.start]:02x} at column {column}"
        raise UserError(
            f"{record.path} {_unit(record.path)} {line}: not valid UTF-8 ({byte}). "
            "Convert the file to UTF-8 or remove the line."
        ) from error


def _json_text(line: str, *, where: str) -> str:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}). Fix or remove the line."
        ) from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise UserError(f"{where}: JSON nested too deeply or numbers too long. Fix or remove the line.") from error
    if not isinstance(document, dict):
        raise UserError(f'{where}: not an object with a "text" field. Write one {{"text": ...}} a line.')
    if "text" not in document:
        fields = ", ".join(document)[:100].encode("unicode_escape").decode() or "none"
        raise UserError(f'{where}: no "text" field (fields: {fields}). Rename the field that holds the text.')
    return _expect_text(document["text"], where=where)


def _expect_text(value: Any, *, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f'{where}: "text" is not a string but {json.dumps(value, default=str)[:40]}. Fix or remove it.')
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
