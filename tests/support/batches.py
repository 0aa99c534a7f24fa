"""Documents of bytes, and batches of them to be looked at."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from peft_pretraining.batch import Batch
from peft_pretraining.data.sources import LocalDocuments


class ByteTokenizer:
    """A token a byte."""

    name = "bytes"
    vocab_size = 258
    eos_id = 256
    pad_id = 257

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode()


TOKENIZER = ByteTokenizer()


def local(path: Path, texts: list[str], *, shuffle: bool = True) -> LocalDocuments:
    """A source of one JSONL file, which it writes."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return LocalDocuments([path], name=str(path), seed=0, shuffle=shuffle)


def documents(count: int) -> list[str]:
    """Texts of 13 bytes, each another."""
    return [f"document {i:04}" for i in range(count)]


def rows(batches: list[Batch]) -> torch.Tensor:
    """Inputs and targets as one tensor (sequences, 2, L)."""
    return torch.cat([torch.stack((batch.input_ids, batch.targets), dim=1) for batch in batches])


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    """The next batches, after which the loader is closed."""
    taken = list(islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken
