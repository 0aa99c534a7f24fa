"""Token shards: a data set that has been tokenized once, in files that are mapped into memory.

scripts/tokenize_corpus.py writes a folder of

    tokens.json        the index: type of the tokens, tokenizer, and for each shard its counts and checksums
    train-00000.bin    token ids of one file of the data set, without EOS: little-endian uint16 or uint32
    train-00000.idx    one row for each document of that file: three little-endian uint32, see below

and the same for the split `validation`. A row has the number of token ids, the line at which the document begins in the
file of text, and the size of its undecoded record in bytes. A very long document, which is tokenized in pieces, has a
row for each piece. A document without token ids (bad, empty, or of the other split) keeps its row. So everything that
the order of documents depends on is here, and a reader of token shards gives the batches, and the positions in the
data, that a reader of the text gives.

The sizes of all files are checked before anything is read, a `.idx` against its checksum when it is opened, and token
ids against the vocabulary as they are read. `verify` checks everything.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from peft_pretraining.data.folders import Split
from peft_pretraining.data.order import OrderedDocuments, in_one_part
from peft_pretraining.errors import UserError
from peft_pretraining.json_files import read_json

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

FORMAT = 1
INDEX = "tokens.json"
SPLITS: tuple[Split, ...] = ("train", "validation")
ROW = np.dtype("<u4")  # three of them are a row of an .idx file
ROWS = 10_000  # rows of an .idx file that are turned into Python numbers at a time
ADVICE = "Bring the file back as it was written, or tokenize the data again: scripts/tokenize_corpus.py."


@dataclass(frozen=True)
class Shard:
    """One file of the data set, tokenized."""

    name: str  # such as train-00000
    rows: int  # rows of the .idx file
    documents: int  # documents that have token ids
    tokens: int  # token ids in the .bin file
    bad_documents: int  # documents that could not be read
    bin_sha256: str
    idx_sha256: str


@dataclass
class TokenIndex:
    """What tokens.json says."""

    folder: Path
    vocab_size: int
    tokenizer: str  # as it was named
    digest: str  # see Tokenizer.digest
    made_from: dict[str, Any]  # what else the tokens depend on: data set, its files, flags
    shards: dict[Split, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    @property
    def dtype(self) -> np.dtype:
        """The type of the token ids."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def count(self, split: Split) -> dict[str, int]:
        """Documents, tokens and bad documents of a split."""
        return {
            key: sum(getattr(s, key) for s in self.shards[split]) for key in ("documents", "tokens", "bad_documents")
        }

    def to_json(self) -> dict[str, Any]:
        """The content of tokens.json."""
        return {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "tokenizer": {"name": self.tokenizer, "digest": self.digest},
            "made_from": self.made_from,
            **{split: self.count(split) | {"shards": list(map(asdict, self.shards[split]))} for split in SPLITS},
        }

    def files(self, split: Split) -> Iterator[tuple[Path, int, str]]:
        """Path, size in bytes and SHA-256 of each file of a split."""
        for shard in self.shards[split]:
            yield self.folder / f"{shard.name}.bin", shard.tokens * self.dtype.itemsize, shard.bin_sha256
            yield self.folder / f"{shard.name}.idx", shard.rows * 3 * ROW.itemsize, shard.idx_sha256

    def check_sizes(self, split: Split) -> None:
        """Raises UserError that names a file that is missing or has another size than it was written with."""
        for path, size, _ in self.files(split):
            try:
                found = path.stat().st_size
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}). {ADVICE}") from error
            if found != size:
                raise UserError(f"{path} has {found} bytes, but was written with {size}. {ADVICE}")


def holds_tokens(dataset: str) -> bool:
    """Whether `dataset` is a folder of token shards, be it one whose index is lost."""
    folder = Path(dataset).expanduser()
    return os.path.exists(folder / INDEX) or (os.path.isdir(folder) and any(folder.glob("train-*.idx")))


def read_index(folder: Path | str, *, name: str = INDEX) -> TokenIndex:
    """The index of a folder of token shards. Raises UserError if it is lost, damaged or of another format."""
    path = Path(folder).expanduser() / name
    content = read_json(path, advice=ADVICE)
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: format {content.get('format')!r}, where this version reads {FORMAT}. {ADVICE}")
    try:
        tokenizer = content["tokenizer"]
        index = TokenIndex(
            path.parent, content["vocab_size"], tokenizer["name"], tokenizer["digest"], content["made_from"],
            {split: [Shard(**entry) for entry in content[split]["shards"]] for split in SPLITS},
        )  # fmt: skip
        if not _is_sound(index) or index.to_json() != content:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not an index of token shards, or damaged. {ADVICE}") from None
    return index


def _is_sound(index: TokenIndex) -> bool:
    """Whether names are those that the writer gives, which lead nowhere else, and counts are counts."""
    shards = [shard for split in SPLITS for shard in index.shards[split]]
    numbers = [getattr(shard, each.name) for shard in shards for each in fields(Shard) if each.type == "int"]
    whole = all(type(number) is int and number >= 0 for number in (*numbers, index.vocab_size))
    named = all(re.fullmatch(rf"{split}-\d{{5,}}", shard.name) for split in SPLITS for shard in index.shards[split])
    return whole and named


def check_tokens(source: object, tokenizer: Tokenizer) -> None:
    """Raises UserError if a source reads token shards that another tokenizer has made."""
    if isinstance(source, TokenDocuments) and source.index.digest != tokenizer.digest():
        raise UserError(
            f"{source.index.folder} was tokenized with {source.index.tokenizer}, and --tokenizer {tokenizer.name} "
            "gives other ids. Give the one that it was made with, or tokenize the text again: "
            "scripts/tokenize_corpus.py."
        )


def verify(index: TokenIndex) -> None:
    """Reads every file. Raises UserError that names one whose content is not what was written."""
    for split in SPLITS:
        index.check_sizes(split)
        for path, _, sha256 in index.files(split):
            _check(path, sha256)


class TokenDocuments(OrderedDocuments[Shard]):
    """The documents of one split of a folder of token shards, which come as token ids."""

    def __init__(self, index: TokenIndex, *, split: Split, seed: int) -> None:
        super().__init__(seed=seed, shuffle=split == "train")
        count = index.count(split)
        self.name = f"{count['tokens']:,} {split} tokens of {count['documents']:,} documents in {index.folder}"
        self.index, self.split = index, split
        self._checked: set[str] = set()  # shards whose .idx file has the right checksum

    def parts(self, epoch: int) -> list[list[Shard]]:
        """See OrderedDocuments.parts."""
        return in_one_part(self.index.shards[self.split], seed=self.seed, epoch=epoch, shuffle=self.shuffle)

    def records(self, file: Shard, *, line: int) -> Iterator[TokenRecord]:
        """See OrderedDocuments.records."""
        path = self.index.folder / file.name
        if file.name not in self._checked:
            _check(path.with_suffix(".idx"), file.idx_sha256)
            self._checked.add(file.name)
        rows = _map(path.with_suffix(".idx"), ROW).reshape(-1, 3)
        shard = _Tokens(_map(path.with_suffix(".bin"), self.index.dtype), path, self.index.vocab_size)
        first = int(np.searchsorted(rows[:, 1], line))
        start = int(rows[:first, 0].sum(dtype=np.int64))
        for number, pieces in groupby(_as_numbers(rows[first:]), key=itemgetter(1)):
            counts, _, sizes = zip(*pieces, strict=True)
            yield TokenRecord(number, sizes[0], start, counts, shard)
            start += sum(counts)

    def check(self) -> None:
        """Checks that all files are there and have their sizes, and that there is a document."""
        self.index.check_sizes(self.split)
        if not self.index.count(self.split)["tokens"]:
            raise UserError(f"no document in {self.name}. Tokenize a larger data set.")

    def fingerprint(self) -> dict[str, str]:
        """See DocumentSource.fingerprint."""
        return {path.name: sha256 for path, _, sha256 in self.index.files(self.split)}


class _Tokens(NamedTuple):
    """The mapped token ids of a shard."""

    ids: np.ndarray
    path: Path  # without a suffix
    vocab_size: int


class TokenRecord(NamedTuple):
    """One document of a shard, not yet read."""

    line: int  # 1-based line of the document in the text
    size: int  # bytes of its record there
    start: int  # index of its first token in the shard
    counts: tuple[int, ...]  # token ids of each of its pieces
    shard: _Tokens

    def text(self) -> list[np.ndarray]:
        """The token ids of each piece. Raises UserError if one is beyond the vocabulary."""
        ids = self.shard.ids[self.start : self.start + sum(self.counts)]
        if len(ids) and ids.max() >= self.shard.vocab_size:
            raise UserError(
                f"{self.shard.path}.bin is damaged: among tokens {self.start} to {self.start + len(ids) - 1} is "
                f"{ids.max()}, where the vocabulary has {self.shard.vocab_size}. {ADVICE}"
            )
        return [ids] if len(self.counts) == 1 else np.split(ids, np.cumsum(self.counts[:-1]))


def _as_numbers(rows: np.ndarray) -> Iterator[list[int]]:
    for begin in range(0, len(rows), ROWS):
        yield from rows[begin : begin + ROWS].tolist()


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        return np.frombuffer(_bytes_of(path), dtype)
    except ValueError as error:  # a part of a number is left
        raise UserError(f"{path} is damaged ({error}). {ADVICE}") from error


def _bytes_of(path: Path) -> mmap.mmap | bytes:
    """The content of a file, mapped into memory."""
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                return b""  # nothing cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {ADVICE}") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits. Raises UserError if it cannot be read."""
    return hashlib.sha256(_bytes_of(path)).hexdigest()


def _check(path: Path, sha256: str) -> None:
    if sha256_of(path) != sha256:
        raise UserError(f"{path} is damaged: its checksum is not the one that it was written with. {ADVICE}")
