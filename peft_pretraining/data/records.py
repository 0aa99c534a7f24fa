"""Text files, one record at a time: what a format is, where a document starts, what can be wrong with it.

A record is a document that has not been decoded. Reading a record is cheap and decoding it is not, so all readers of a
data-parallel run walk the same records, and each decodes only its own. A damaged file ends with a record that cannot be
decoded and says why.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from peft_pretraining.data.retry import retried
from peft_pretraining.errors import UserError

JSON_SUFFIXES = tuple(name + packed for name in (".json", ".jsonl", ".ndjson") for packed in ("", ".gz", ".zst"))
TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", *TEXT_SUFFIXES)
TEXT_FIELD = "text"  # where C4 and most other data sets keep it

RETRY_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds: a file server that hiccups is back by then


class Record(NamedTuple):
    """One undecoded document: a JSON line, a paragraph block of a text file, or a Parquet cell."""

    raw: Any  # bytes, or whatever a Parquet cell holds
    path: Path
    line: int  # 1-based; the first line of the document, or the row
    problem: str = ""  # what is wrong with it, if that is known before it is decoded
    text_field: str = TEXT_FIELD  # the field of a JSON object that holds the text; dots lead into nested objects

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
            text = _expect_text(self.raw, field=self.text_field, where=self.where)
        elif _ends(self.path, JSON_SUFFIXES):
            text = _json_text(_utf8(self, self.raw), field=self.text_field, where=self.where)
        else:
            text = _utf8(self, self.raw)
        return without_surrogates(text)

    def fields(self) -> dict[str, Any]:
        """The record as named fields: a JSON object, or a row of a table. Raises UserError with the file and line."""
        if self.problem:
            raise UserError(self.problem)
        if isinstance(self.raw, dict):
            return self.raw
        if not _ends(self.path, JSON_SUFFIXES):
            raise UserError(f"{self.path} is plain text, and has no fields. Give .jsonl, .json or .parquet files.")
        return _json_object(_utf8(self, self.raw), wanted="an object", where=self.where)


class _Damaged(Exception):
    """The file cannot be read beyond `after` lines or rows."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__(_first_line(error))
        self.after = after


def is_data(path: Path) -> bool:
    """Whether a file's name says that documents can be read from it."""
    return _ends(path, SUFFIXES)


def _ends(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def read_records(path: Path, *, line: int = 1, text_field: str | None = TEXT_FIELD) -> Iterator[Record]:
    """The records of one file, in file order, from the one that begins at `line` on.

    text_field: the field that holds the text; None for records of several fields, see Record.fields. A file of JSON may
        then be one array, whose items count as lines.

    A damaged file ends with a record whose text() raises. A file that cannot be opened or read is tried again after
    each of RETRY_WAITS, where it broke. Raises UserError after the last.
    """

    def open_after(given: int, last: Record | None) -> Iterator[Record]:
        if last is None:
            return _records(path, line, text_field)
        return islice(_records(path, last.line, text_field), 1, None)

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


def _records(path: Path, start: int, text_field: str | None) -> Iterator[Record]:
    if text_field is None and _ends(path, JSON_SUFFIXES) and _is_array(path):
        return _array_records(path, start)
    if _ends(path, (".parquet",)):
        return _parquet_records(path, start, text_field)
    if _ends(path, TEXT_SUFFIXES):
        return _paragraph_records(path, start)
    return (
        Record(line, path, number, text_field=text_field or TEXT_FIELD)
        for number, line in _lines(path, start)
        if not line.isspace()
    )


def _unit(path: Path) -> str:
    return "row" if _ends(path, (".parquet",)) else "line"


def _open(path: Path) -> io.BufferedReader:
    packed = path.suffix.lower()
    if packed not in (".gz", ".zst"):
        return path.open("rb")
    if path.stat().st_size == 0:
        raise EOFError("the file is empty")  # it would pass for no data, and a lost shard would go unnoticed
    if packed == ".gz":
        return io.BufferedReader(gzip.GzipFile(path))  # a buffer of C code: lines come 1.5 times as fast
    return io.BufferedReader(_pyarrow(path).CompressedInputStream(path.open("rb"), "zstd"))


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading it needs pyarrow (pip install pyarrow).") from error
    return pyarrow


def _lines(path: Path, start: int) -> Iterator[tuple[int, bytes]]:
    number = start - 1
    try:
        with _open(path) as file:
            for number, line in islice(enumerate(file, start=1), start - 1, None):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Damaged(number, error) from error
    except OSError as error:
        if error.errno is not None:
            raise  # the machine's fault, not the file's
        raise _Damaged(number, error) from error  # pyarrow's word for damaged zstd data


def _is_array(path: Path) -> bool:
    """Whether a file of JSON begins with a `[`: it is one array, not one object a line."""
    first = next((line for _, line in _lines(path, 1) if not line.isspace()), b"")
    return first.lstrip(b"\xef\xbb\xbf \t").startswith(b"[")


def _array_records(path: Path, start: int) -> Iterator[Record]:
    """The items of a JSON array, which is read at once."""
    whole = b"".join(line for _, line in _lines(path, 1))
    try:
        items = json.loads(whole)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        yield Record(b"", path, start, f"{path}: not a valid JSON array ({_first_line(error)}). Fix the file.")
        return
    for number, item in enumerate(items[start - 1 :], start=start):
        problem = "" if isinstance(item, dict) else f"{path} item {number}: not an object."
        yield Record(item, path, number, problem)


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


def _parquet_records(path: Path, start: int, text_field: str | None) -> Iterator[Record]:
    """Row groups before `start` are not read."""
    pyarrow = _pyarrow(path)
    row = 0
    try:
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            column, *inner = _column(text_field, names)
            if column is not None and column not in names:
                yield Record(b"", path, 1, f'{path} has no "{text_field}" column (columns: {", ".join(names)}).')
                return
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows < start:
                    row += rows
                    continue
                columns = None if column is None else [column]
                for batch in file.iter_batches(columns=columns, batch_size=1024, row_groups=[group]):
                    for cell in batch.to_pylist() if column is None else _cells(batch.column(0), inner):
                        row += 1
                        if row >= start:
                            yield Record(cell, path, row, text_field=text_field or TEXT_FIELD)
    except pyarrow.ArrowException as error:
        raise _Damaged(max(row, start - 1), error) from error
    except OSError as error:
        if error.errno is not None:
            raise  # the machine's fault, not the file's
        raise _Damaged(max(row, start - 1), error) from error


def _column(text_field: str | None, names: list[str]) -> tuple[Any, ...]:
    """The column that holds a field, and the names that lead to it from there; None for all columns."""
    return (text_field,) if text_field is None or text_field in names else tuple(text_field.split("."))


def _cells(column: Any, inner: Sequence[str]) -> list[Any]:
    """Text as bytes, so that one cell of bad UTF-8 spoils only itself; other kinds as they are. Null is no text."""
    import pyarrow
    import pyarrow.compute

    for name in inner:
        column = pyarrow.compute.struct_field(column, name)
    try:
        cells = column.cast(pyarrow.large_binary()).to_pylist()
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid):
        cells = column.to_pylist()
    return [b"" if cell is None else cell for cell in cells]


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


def without_surrogates(text: str) -> str:
    """JSON may hold a lone surrogate ("\ud800"), which no tokenizer takes: it becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _json_text(line: str, *, field: str, where: str) -> str:
    wanted = f'an object with a "{field}" field. Write one {{"{field}": ...}} a line'
    document = _json_object(line, wanted=wanted, where=where)
    return _expect_text(_look_up(document, field, where=where), field=field, where=where)


def _json_object(line: str, *, wanted: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        if line.strip() in ("[", "{", "[{"):
            raise UserError(f"{where}: JSON that spans several lines. {_ONE_A_LINE}") from error
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}). Fix or remove the line."
        ) from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise UserError(f"{where}: JSON nested too deeply or numbers too long. Fix or remove the line.") from error
    if isinstance(document, list):
        raise UserError(f"{where}: a JSON array. {_ONE_A_LINE}")
    if not isinstance(document, dict):
        raise UserError(f"{where}: not {wanted}.")
    return document


_ONE_A_LINE = "Write one object a line: jq -c '.[]' FILE > FILE.jsonl"


def _look_up(document: dict[str, Any], field: str, *, where: str) -> Any:
    """The value of a field, whose name may have dots, or that dots lead to."""
    if field in document:
        return document[field]
    value: Any = document
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            fields = ", ".join(document)[:100].encode("unicode_escape").decode() or "none"
            raise UserError(
                f'{where}: no "{field}" field (fields: {fields}). Name the one that holds text: --text_field'
            )
        value = value[name]
    return value


def _expect_text(value: Any, *, field: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        shown = json.dumps(value, default=str)[:40]
        raise UserError(f'{where}: "{field}" is not a string but {shown}. Fix or remove it.')
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
