"""Local documents: written, read by one reader, refused."""

import gzip
import json
from pathlib import Path

from peft_pretraining.data.order import Document, Skipped
from peft_pretraining.data.position import Position
from peft_pretraining.data.sources import DocumentSource, open_documents
from support.command_line import message_of


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """A file with a text a line, compressed if its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def texts(prefix: str, count: int) -> list[str]:
    """Texts that say which they are."""
    return [f"{prefix} document {i}" for i in range(count)]


def read(source: DocumentSource, epoch: int = 0, reader: int = 0, readers: int = 1) -> list[str]:
    """The texts of one reader\'s share of an epoch, in its order."""
    items = source.read(epoch=epoch, readers=readers, starts={reader: Position()})
    return [item.text for item in items if isinstance(item, Document)]


def skipped(source: DocumentSource) -> list[str]:
    """Why documents of the first epoch were left out."""
    return [item.reason for item in source.read(epoch=0) if isinstance(item, Skipped)]


def error_of(dataset: Path | str, **options: str) -> str:
    """The one line with which a data set is refused."""
    return message_of(lambda: open_documents(str(dataset), **{"split": "train", "seed": 0} | options).check())
