"""Examples to learn from and to be judged by: from local files, or a task of GLUE from the hub."""

import argparse
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peft_pretraining.errors import UserError
from peft_pretraining.glue.files import Row, find_rows_file, read_rows
from peft_pretraining.glue.tasks import TASKS, GlueTask

HUB = "nyu-mll/glue"
LOCAL = Path("glue")  # GaLore's script opens the data set "glue", which can be a folder
LABEL = "label"


class Example(NamedTuple):
    """A text, or a pair of texts, and its class number, or a value where the task is a regression."""

    texts: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class Examples:
    """A task with its examples."""

    task: GlueTask
    train: list[Example]
    evaluations: dict[str, list[Example]]  # by the name of the split; the first decides what is best
    numbers: tuple[int, ...] = ()  # the task's number of each class of the model, where the model has another order

    @property
    def regression(self) -> bool:
        return not self.task.labels

    def fingerprint(self) -> dict[str, str]:
        """Hashes of the examples, by split."""
        splits = {"train": self.train, **self.evaluations}
        return {name: hashlib.blake2b(repr(rows).encode(), digest_size=16).hexdigest() for name, rows in splits.items()}


def load_examples(args: argparse.Namespace) -> Examples:
    """The examples that --task_name, --train_file and --validation_file mean.

    Files come before the folder glue/TASK, and this before the hub. Raises UserError if there are no such examples.
    """
    task = TASKS.get(args.task_name)
    if args.train_file or args.validation_file:
        rows = _from_files(args, task)
    elif task is None:
        raise UserError("give --task_name, or --train_file and --validation_file.")
    else:
        folder = LOCAL / args.task_name
        rows = _from_folder(folder, task) if folder.is_dir() else _from_hub(args.task_name, task)
    task = task or _guess(rows)
    found = {name: _examples(split, task, name=name) for name, split in rows.items()}
    return Examples(task, found.pop("train"), found)


def _from_files(args: argparse.Namespace, task: GlueTask | None) -> dict[str, list[Row]]:
    files = {"train": args.train_file, "validation": args.validation_file}
    for name, given in files.items():
        if given is None:
            raise UserError(f"--{name}_file is missing: a run needs --train_file and --validation_file.")
    names = ("validation",) if task is None else task.evaluations
    chosen = {"train": args.train_file, names[0]: args.validation_file}
    if args.validation_mismatched_file:
        if len(names) < 2:
            raise UserError("--validation_mismatched_file is for --task_name mnli.")
        chosen[names[1]] = args.validation_mismatched_file
    return {name: read_rows(Path(path)) for name, path in chosen.items()}


def _from_folder(folder: Path, task: GlueTask) -> dict[str, list[Row]]:
    files = {name: find_rows_file(folder, name) for name in ("train", *task.evaluations)}
    if missing := [name for name, path in files.items() if path is None]:
        raise UserError(f"{folder} has no {missing[0]}.csv, .tsv, .json or .jsonl. Or name files: --train_file PATH.")
    return {name: read_rows(path) for name, path in files.items() if path is not None}


def _from_hub(name: str, task: GlueTask) -> dict[str, list[Row]]:
    """A task of GLUE from the hub, which is asked for data and runs no code."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"--task_name {name} from the hub needs the package datasets: pip install datasets.") from error
    try:
        splits = load_dataset(HUB, name)
    except Exception as error:  # datasets, huggingface_hub and requests have their own, and OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--task_name {name}: {HUB} could not be read from the hub ({reason[:200]}). Without a network, put "
            f"{LOCAL / name}/train.csv and validation.csv beside you, or give --train_file and --validation_file."
        ) from error
    return {split: [dict(row) for row in splits[split]] for split in ("train", *task.evaluations)}


def _guess(rows: dict[str, list[Row]]) -> GlueTask:
    """The task that files of one's own mean, by GaLore's rules: the texts are `sentence1` and `sentence2`, else the
    first two columns, or the only one, besides the label. Labels that are not all whole numbers or words are values."""
    first = rows["train"][0]
    others = [name for name in first if name not in (LABEL, "idx")]
    pair = ("sentence1", "sentence2")
    columns = pair if set(pair) <= set(others) else tuple(others[:2])
    if LABEL not in first or not columns:
        raise UserError(f"a training file needs a column `{LABEL}` and one with text; there are: {', '.join(first)}.")
    values = [row[LABEL] for row in rows["train"] if row.get(LABEL) is not None]
    if values and all(_as_number(value) is not None for value in values) and not all(map(_is_whole, values)):
        return GlueTask(columns, (), ("pearson", "spearmanr"))
    numbers = bool(values) and all(map(_is_whole, values))
    labels = sorted({str(int(str(value))) if numbers else str(value) for value in values}, key=int if numbers else None)
    return GlueTask(columns, tuple(labels), ("accuracy",))


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number, or the text of one. JSON's true and false are names of classes."""
    if isinstance(value, str):
        return re.fullmatch(r"\s*[+-]?\d+\s*", value) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _examples(rows: Sequence[Row], task: GlueTask, *, name: str) -> list[Example]:
    """The rows as examples. Raises UserError for a row without text or with a label that the task does not have."""
    needed = (*task.columns, LABEL)
    if missing := [column for column in needed if column not in rows[0]]:
        raise UserError(f"the {name} data has no column `{missing[0]}`, only {', '.join(rows[0])}.")
    return list(_read_examples(rows, task, name=name))


def _read_examples(rows: Sequence[Row], task: GlueTask, *, name: str) -> Iterable[Example]:
    numbers = {label: number for number, label in enumerate(task.labels)}
    for place, row in enumerate(rows, start=1):
        value = row.get(LABEL)
        label = _as_number(value) if not task.labels else _class_number(value, numbers)
        texts = tuple(row.get(column) for column in task.columns)
        if label is None or not math.isfinite(label):
            known = ", ".join(task.labels) or "numbers"
            raise UserError(f"row {place} of the {name} data has the label {value!r}; the task has {known}.")
        if any(not isinstance(text, str) for text in texts):
            raise UserError(f"row {place} of the {name} data has no text in {' and '.join(task.columns)}.")
        yield Example(tuple(map(str, texts)), label)


def _class_number(value: Any, numbers: dict[str, int]) -> int | None:
    """The number of a label, which is given by its name or its number; None if the task has no such label."""
    if value is None:
        return None
    text = str(value).strip()
    if text not in numbers and _is_whole(text):
        text = str(int(text))  # +1 and 01 are 1
    if text in numbers:
        return numbers[text]
    return int(text) if text.isdecimal() and int(text) < len(numbers) else None
