"""Classification tasks made of books, in GLUE's shapes, with an answer that the books themselves give.

    python benchmarks/text_tasks.py --dataset data/books --out runs/tasks

    same_book       a pair of passages: are they of the same book? (as MRPC asks whether two sentences mean the same)
    which_book      one passage: which of 8 books is it of?
    word_order      one passage: is it as it was written, or are six neighbouring words shuffled? (as CoLA)
    speech          ten words: are they spoken, or told? (as SST-2; the marks around direct speech are left out)
    continuation    a pair: does the second passage follow on the first, or come later in the document? (as RTE)
    order           two neighbouring passages, perhaps swapped: is the first one first?

--dataset is a folder of .json.gz files whose `url` ends in BOOK/NUMBER. Passages are a few sentences of one document.
Training examples are of documents in its training files, evaluation's of those in its validation files, which are whole
books that the others are not of. For which_book, evaluation is of every fifth document of its books: a model that was
pre-trained on the training files has read these, without their labels. Classes are equally frequent. Writes
TASK/train.csv and TASK/validation.csv.
"""

import argparse
import csv
import gzip
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

BOOKS = 8  # of which_book
SHUFFLED = 6  # words, of word_order
OPENING = 10  # words, of speech
TRIES = 10_000  # to find some
SPOKEN = re.compile(r'(?<!\S)["“]([A-Z][^"“”]*)["”](?!\S)')
MARKS = re.compile(r"""["“”‘]|(?<!\S)'""")


class Passages(NamedTuple):
    """A document as passages in their order, and the book it is of."""

    book: str
    texts: list[str]


def read_documents(dataset: Path, split: str, *, words: int) -> list[Passages]:
    """The documents of a split with two passages or more, of at least so many words each."""
    found = []
    for path in sorted(dataset.rglob(f"*{split}*.json.gz")):
        with gzip.open(path, "rt") as file:
            for line in file:
                record = json.loads(line)
                texts = passages_of(record["text"], at_least=words)
                if len(texts) > 1:
                    found.append(Passages(record["url"].split("/")[-2], texts))
    return found


def passages_of(text: str, *, at_least: int) -> list[str]:
    """The text cut at ends of sentences into passages of so many words up to twice as many; the rest is left out."""
    passages, words = [], []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        words += sentence.split()
        if len(words) >= at_least:
            passages.append(" ".join(words[: 2 * at_least]))
            words = []
    return passages


Row = dict[str, str | int]


def same_book(documents: list[Passages], rng: random.Random, label: int) -> Row:
    one = rng.choice(documents)
    books = [each for each in rng.choices(documents, k=400) if (each.book == one.book) == label and each is not one]
    other = books[0] if books else one
    return _pair(rng.choice(one.texts), rng.choice(other.texts), label if books else 1)


def which_book(documents: list[Passages], rng: random.Random, label: int) -> Row:
    book = sorted({each.book for each in documents})[label]
    own = [each for each in documents if each.book == book]
    return {"sentence": rng.choice(rng.choice(own).texts), "label": label}


def word_order(documents: list[Passages], rng: random.Random, label: int) -> Row:
    """The first and the last word stay: their spelling would tell."""
    words = rng.choice(rng.choice(documents).texts).split()
    start = rng.randrange(1, len(words) - SHUFFLED)
    own = words[start : start + SHUFFLED]
    while not label and words[start : start + SHUFFLED] == own and len({*own}) > 1:
        words[start : start + SHUFFLED] = rng.sample(own, SHUFFLED)
    return {"sentence": " ".join(words), "label": label}


def speech(documents: list[Passages], rng: random.Random, label: int) -> Row:
    """Both begin a sentence and have the same length, so that neither tells. Where something is told, the passages
    before and after have no quotation marks either: it could be the middle of a long speech."""
    for _ in range(TRIES):
        texts = rng.choice(documents).texts
        place = rng.randrange(len(texts))
        told = texts[place][:1].isupper() and not MARKS.search(" ".join(texts[max(place - 1, 0) : place + 2]))
        found = SPOKEN.findall(texts[place]) if label else [texts[place]] * told
        long = [words for each in found if len(words := each.split()) >= OPENING]
        if long:
            return {"sentence": " ".join(rng.choice(long)[:OPENING]), "label": label}
    raise ValueError(f"no {'direct speech' if label else 'passage without it'} among {TRIES:,} passages")


def continuation(documents: list[Passages], rng: random.Random, label: int) -> Row:
    """The wrong one comes later in the same document, so that neither subject nor style tells."""
    long = rng.choice(documents)
    place = rng.randrange(len(long.texts) - 3)
    return _pair(
        long.texts[place], long.texts[place + 1 if label else rng.randrange(place + 3, len(long.texts))], label
    )


def order(documents: list[Passages], rng: random.Random, label: int) -> Row:
    texts = rng.choice(documents).texts
    place = rng.randrange(len(texts) - 1)
    first, second = texts[place], texts[place + 1]
    return _pair(first, second, 1) if label else _pair(second, first, 0)


def _pair(first: str, second: str, label: int) -> Row:
    return {"sentence1": first, "sentence2": second, "label": label}


TASKS: dict[str, tuple[Callable[[list[Passages], random.Random, int], Row], int]] = {
    "same_book": (same_book, 2),
    "which_book": (which_book, BOOKS),
    "word_order": (word_order, 2),
    "speech": (speech, 2),
    "continuation": (continuation, 2),
    "order": (order, 2),
}


def select(splits: dict[str, list[Passages]], task: str, split: str) -> list[Passages]:
    """The documents that a split of a task is made of."""
    if task == "which_book":
        books = frequent(splits["train"])
        own = [each for each in splits["train"] if each.book in books]
        return [each for place, each in enumerate(own) if (place % 5 == 0) == (split == "validation")]
    return [each for each in splits[split] if len(each.texts) > 4] if task == "continuation" else splits[split]


def frequent(documents: list[Passages]) -> list[str]:
    """The books with the most documents."""
    counts: dict[str, int] = defaultdict(int)
    for each in documents:
        counts[each.book] += 1
    return sorted(counts, key=lambda book: (-counts[book], book))[:BOOKS]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=4000, help="examples to train on")
    parser.add_argument("--validation", type=int, default=1000, help="examples to evaluate on")
    parser.add_argument("--words", type=int, default=40, help="at least, of a passage")
    args = parser.parse_args(argv)
    splits = {split: read_documents(args.dataset, split, words=args.words) for split in ("train", "validation")}
    for task, (make, classes) in TASKS.items():
        for split in splits:
            rng = random.Random(f"{task} {split}")
            chosen = select(splits, task, split)
            rows = [make(chosen, rng, number % classes) for number in range(getattr(args, split))]
            rng.shuffle(rows)
            path = args.out / task / f"{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            print(f"{path}: {len(rows)} examples of {len(chosen)} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
