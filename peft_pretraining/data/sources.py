"""Sources of documents: local files, token shards, the embedded Python documentation, and C4 streamed from the hub.

A source hands every document to exactly one of its virtual readers in each epoch. The order of local files is global:
it depends on the seed and the epoch alone, and every n-th record belongs to reader k of n. order.py says how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from peft_pretraining.data.chat import ChatTemplate
from peft_pretraining.data.dialogues import DialogueRecord, read_dialogues
from peft_pretraining.data.fingerprint import fingerprint_files
from peft_pretraining.data.folders import Split, find_files, naming_advice
from peft_pretraining.data.order import Document, OrderedDocuments, Skipped, content_of, in_one_part
from peft_pretraining.data.position import EarlierReaders, Position
from peft_pretraining.data.records import TEXT_FIELD, Record, read_records
from peft_pretraining.data.token_shards import TokenDocuments, holds_tokens, read_index
from peft_pretraining.errors import UserError

HELD_OUT = 100  # one document in HELD_OUT is held out for validation where there is no validation split
MAX_UNREADABLE = 1000  # records in a row from the start, after which the data set is not what it should be


class DocumentSource(Protocol):
    """A picklable stream of documents, split over virtual readers."""

    name: str  # what is read, for the log: "10 files in data/books/en"
    readers: int  # number of virtual readers of a new run

    def together(self, readers: int) -> bool:
        """Whether so many readers share the same files, so that one walk serves them all; else each has its own."""

    def read(
        self,
        *,
        epoch: int,
        readers: int = 1,
        starts: Mapping[int, Position] | None = None,
        earlier: Sequence[EarlierReaders] = (),
    ) -> Iterator[Document | Skipped]:
        """The documents of some readers in this 0-based epoch: over all `readers`, each document exactly once.

        starts: the readers to read for, each with its position: its documents before that are left out, without
            reading more than the first of their blocks. None for all readers, from the beginning. A reader that is
            taken out meanwhile gets no more.
        earlier: documents that these readers have read are left out, too.
        A document that cannot be decoded, or the rest of a damaged file, comes as Skipped, in its place in the order.
        Raises UserError if a file is gone or cannot be opened.
        """

    def check(self) -> None:
        """Cheap test before anything slow. Raises UserError if there is nothing to read."""

    def fingerprint(self) -> dict[str, str]:
        """A hash for each file, by its name, to be compared after a resume; empty if unknown."""


def open_documents(
    dataset: str,
    *,
    split: Split,
    seed: int,
    validation: str | None = None,
    text_field: str = TEXT_FIELD,
    template: ChatTemplate | None = None,
) -> DocumentSource:
    """The documents of one split; call `check()` before the slow work.

    dataset: `c4` (streamed from the hub), `pydocs` (embedded), or a PATH: a folder (see
        folders.find_files), a single file, a glob, or a folder of token shards (see token_shards).
    split: `train` comes in an order drawn from `seed` and the epoch, `validation` always in file order.
    validation: documents to validate on, given like `dataset`. Without it the dataset's own validation split is used;
        if there is none, about one document in HELD_OUT is held out, and never trained on. Both splits must be
        opened with the same value.
    text_field: the field or column of local files that holds the text, see records.Record.
    template: what makes texts of dialogues, which the local files then hold; see dialogues.py.

    Raises UserError if the path does not exist, holds no usable file, or has a suffix we cannot read.
    """
    if template is not None:
        _refuse_texts(dataset, validation)
    form = Form(text_field, template)
    if split == "validation" and validation is not None:
        return _open_validation(validation, seed=seed, form=form)
    if dataset == "c4":
        from peft_pretraining.data.hub import HubDocuments

        return HubDocuments(split=split, seed=seed)
    if dataset == "pydocs":
        from peft_pretraining.data.pydocs import pydocs_files

        files = pydocs_files(split)
        return LocalDocuments(files, name=f"pydocs, {split} ({_count(files)})", seed=seed, shuffle=split == "train")
    if holds_tokens(dataset):
        return TokenDocuments(read_index(dataset), split=split, seed=seed)
    own = find_files(dataset)
    if not own["train"]:
        raise UserError(f"{dataset} holds a validation split but no train files. {naming_advice(dataset)}")
    if not own["validation"] and validation is None:
        return _hold_out(dataset, own["train"], split=split, seed=seed, form=form)
    files = own[split]
    return LocalDocuments(files, name=_describe(dataset, files), seed=seed, shuffle=split == "train", form=form)


class Form(NamedTuple):
    """What the records of local files hold: a text in one field, or with a template, a dialogue."""

    text_field: str = TEXT_FIELD
    template: ChatTemplate | None = None


class LocalDocuments(OrderedDocuments[Path]):
    """Documents of local files, reshuffled for each epoch, or in file order. `keep` restricts them to one split."""

    def __init__(
        self,
        files: Sequence[Path],
        *,
        name: str,
        seed: int,
        shuffle: bool,
        keep: Split | Literal["all"] = "all",
        form: Form = Form(),  # noqa: B008  # it cannot change
    ) -> None:
        super().__init__(seed=seed, shuffle=shuffle)
        self.name = name
        self.files = list(files)
        self.keep = keep
        self.form = form

    def parts(self, epoch: int) -> list[list[Path]]:
        """See OrderedDocuments.parts."""
        return in_one_part(self.files, seed=self.seed, epoch=epoch, shuffle=self.shuffle)

    def records(self, file: Path, *, line: int) -> Iterator[Record | DialogueRecord]:
        """See OrderedDocuments.records."""
        if self.form.template is not None:
            return read_dialogues(file, self.form.template, line=line)
        return read_records(file, line=line, text_field=self.form.text_field)

    def keeps(self, text: str) -> bool:
        """See OrderedDocuments.keeps."""
        return self.keep == "all" or split_of(text) == self.keep

    def check(self) -> None:
        """Decodes records up to the first document that has text, or up to MAX_UNREADABLE that cannot be read."""
        problems: list[str] = []
        for record in chain.from_iterable(self.records(file, line=1) for file in self.files):
            try:
                text = content_of(record.text())
            except UserError as error:
                problems.append(str(error))
                if len(problems) == MAX_UNREADABLE:
                    break
            else:
                if text.strip() and self.keeps(text):
                    return
        if problems:
            raise UserError(f"no document in {self.name} can be read. The first problem: {problems[0]}")
        advice = "Give a larger dataset, or --validation PATH." if self.keep != "all" else "Is it empty?"
        raise UserError(f"no document in {self.name}. {advice}")

    def fingerprint(self) -> dict[str, str]:
        """See DocumentSource.fingerprint."""
        return fingerprint_files(self.files)


def split_of(text: str) -> Split:
    """The split of a document in a data set without splits, by a hash of its text: the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") % HELD_OUT == 0 else "train"


def _refuse_texts(*datasets: str | None) -> None:
    for dataset in datasets:
        if dataset in ("c4", "pydocs") or (dataset is not None and holds_tokens(dataset)):
            raise UserError(f"{dataset} holds texts, and --task sft needs dialogues: give a folder, a file or a glob.")


def _open_validation(validation: str, *, seed: int, form: Form) -> DocumentSource:
    """`validation` as the user gave it: its own validation split if it has one, else all of it."""
    if validation in ("c4", "pydocs") or holds_tokens(validation):
        return open_documents(validation, split="validation", seed=seed)
    own = find_files(validation, any_name=True)
    files = own["validation"] or own["train"]
    return LocalDocuments(files, name=_describe(validation, files), seed=seed, shuffle=False, form=form)


def _hold_out(dataset: str, files: list[Path], *, split: Split, seed: int, form: Form) -> DocumentSource:
    whole = _describe(dataset, files)
    if split == "train":
        name = f"{whole}, without the 1 in {HELD_OUT} documents held out for validation"
    else:
        name = f"1 in {HELD_OUT} documents of {whole}, held out from training"
    return LocalDocuments(files, name=name, seed=seed, shuffle=split == "train", keep=split, form=form)


def _describe(dataset: str, files: Sequence[Path]) -> str:
    if files == [Path(dataset).expanduser()]:
        return dataset
    folder = f"in {files[0].parent}" if Path(dataset).expanduser().is_dir() else f"matching {dataset}"
    return f"{_count(files)} {folder}"


def _count(files: Sequence[Path]) -> str:
    return f"{len(files)} file{'s' if len(files) > 1 else ''}"
