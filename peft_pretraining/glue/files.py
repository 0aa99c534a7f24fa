"""Rows of local files: csv, tsv, json (an array, or {"data": [...]}) and jsonl (an object a line)."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_pretraining.errors import UserError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, by the ending of its name. Raises UserError if it cannot be read, or has none."""
    if path.suffix not in READERS:
        raise UserError(f"{path}: a file for --train_file or --validation_file must be {', '.join(READERS)}.")
    try:
        rows = READERS[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is no {path.suffix[1:]} file ({' '.join(str(error).split())}).") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has no rows of named columns: give it a first line with their names, or JSON objects.")
    return rows


def find_rows_file(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder, with one of the endings that read_rows knows."""
    return next((path for ending in READERS if (path := folder / f"{name}{ending}").is_file()), None)


def _read_table(path: Path, **dialect: Any) -> list[Row]:
    csv.field_size_limit(1 << 30)
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows: list[Row] = list(csv.DictReader(file, **dialect))
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has another number of columns than the first line")
    return rows


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return _parse_lines(text)
    found = whole.get("data", whole) if isinstance(whole, dict) else whole
    return found if isinstance(found, list) else [found]


def _parse_lines(text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from error
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": _read_table,
    ".tsv": lambda path: _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _read_json,
    ".jsonl": lambda path: _parse_lines(path.read_text(encoding="utf-8-sig")),
}
