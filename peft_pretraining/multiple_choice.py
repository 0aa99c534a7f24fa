"""Few-shot multiple choice by likelihood, on files in MMLU's format.

`python -m peft_pretraining.multiple_choice --model DIR --data DIR`: --data has the folders dev, val and test, and in
each a file SUBJECT_dev.csv, SUBJECT_val.csv or SUBJECT_test.csv a subject, whose rows are question, A, B, C, D, answer.
The prompt is that of Hendrycks et al. 2021 (arXiv 2009.03300), whose evaluation also takes the letter that is the most
likely to follow it:

    The following are multiple choice questions (with answers) about SUBJECT.

    QUESTION
    A. ...                      the first rows of dev, each with its answer
    Answer: B

    QUESTION
    A. ...
    Answer:
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from peft_pretraining.data.tokenizer import Tokenizer, TransformersTokenizer
from peft_pretraining.errors import Parser, UserError, command_status
from peft_pretraining.export.model import open_model
from peft_pretraining.model.dtypes import DTYPES, resolve_dtype
from peft_pretraining.model.family import family_of
from peft_pretraining.progress import LongWait
from peft_pretraining.training.report import format_table

LETTERS = "ABCD"
SHOTS = 5


class Question(NamedTuple):
    """A question with its four choices."""

    text: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice

    def prompt(self, *, answered: bool) -> str:
        """The question as it stands in a prompt, with its answer or open."""
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.text}{choices}\nAnswer:" + (f" {LETTERS[self.answer]}\n\n" if answered else "")


@dataclass
class Score:
    """How a subject went."""

    questions: int = 0
    correct: int = 0
    fewer_shots: int = 0  # questions whose prompt had room for fewer examples

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions


class Choices(NamedTuple):
    """A question in token ids.

    ids: the prompt with each of the letters behind it.
    shared: number of ids at the start that all four have in common.
    """

    ids: list[list[int]]
    shared: int


def read_questions(path: Path) -> list[Question]:
    """The questions of a file. Raises UserError with the line of one that is not a question."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            return [_question(row, f"{path} line {rows.line_num}") for row in rows if row and row[-1] != "answer"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error


def _question(row: list[str], where: str) -> Question:
    if len(row) != len(LETTERS) + 2:
        raise UserError(f"{where}: {len(row)} columns, where question, A, B, C, D and answer are six.")
    text, *choices, answer = row
    if answer.strip() not in tuple(LETTERS):
        raise UserError(f"{where}: the answer is {answer.strip()[:20]!r}, not one of A, B, C, D.")
    return Question(text.strip(), tuple(choice.strip() for choice in choices), LETTERS.index(answer.strip()))


def find_subjects(data: Path, *, split: str, only: Sequence[str] | None = None) -> dict[str, Path]:
    """The file of each subject in a split. Raises UserError if there is none, or one of `only` is missing."""
    ending = f"_{split}.csv"
    found = {path.name.removesuffix(ending): path for path in sorted((data / split).glob(f"*{ending}"))}
    if not found:
        raise UserError(f"{data / split} holds no SUBJECT{ending}: give the folder that has dev, val and test.")
    if missing := [name for name in only or () if name not in found]:
        raise UserError(f"{data / split} has no {missing[0]}{ending}. It has {', '.join(islice(found, 8))} ...")
    return {name: path for name, path in found.items() if only is None or name in only}


def build_choices(
    question: Question, *, subject: str, shots: Sequence[Question], tokenizer: Tokenizer, max_length: int
) -> tuple[Choices, int]:
    """The question behind as many of the shots, the first ones, as leave room for it, and how many these are.

    max_length: tokens that the model can take. Raises UserError for a question that alone is longer.
    """
    title = subject.replace("_", " ")
    begin = _begin(tokenizer)
    head = f"The following are multiple choice questions (with answers) about {title}.\n\n"
    for count in range(len(shots), -1, -1):
        prompt = head + "".join(shot.prompt(answered=True) for shot in shots[:count]) + question.prompt(answered=False)
        ids = [[*begin, *each] for each in tokenizer.encode([f"{prompt} {letter}" for letter in LETTERS])]
        if max(map(len, ids)) <= max_length + 1:
            return Choices(ids, _shared(ids)), count
    raise UserError(f"a question of {subject} has more than {max_length} tokens: {question.text[:60]!r} ...")


def _begin(tokenizer: Tokenizer) -> list[int]:
    """The BOS token where the tokenizer itself puts one, as LLaMA's do."""
    if not isinstance(tokenizer, TransformersTokenizer):
        return []
    begin = tokenizer.tokenizer("a")["input_ids"][:1]
    return begin if begin == [tokenizer.bos_id] else []


def _shared(ids: Sequence[Sequence[int]]) -> int:
    return next((i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1), min(map(len, ids)))


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, choices: Sequence[Choices], *, pad_id: int) -> Tensor:
    """The log-likelihood of what distinguishes each of the four choices, after what they share.

    Where they differ in their last token alone, which is usual, one sequence serves all four.
    Returns (questions, 4) in float32, in float64 for a model in float64.
    """
    rows: dict[tuple[int, ...], int] = {}  # the inputs that are needed, numbered
    for ids in (ids for each in choices for ids in each.ids):
        rows.setdefault(tuple(ids[:-1]), len(rows))
    length = max(map(len, rows))
    inputs = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows], device=model.device)
    family = family_of(model.config)
    # Padding stands behind, where causal attention does not look.
    hidden = family.part("body", model)(input_ids=inputs, use_cache=False).last_hidden_state  # (rows, L, hidden)
    head = family.part("head", model)
    found = [
        [_tail(head, hidden[rows[tuple(ids[:-1])]], ids, shared=each.shared) for ids in each.ids] for each in choices
    ]
    return torch.stack([torch.stack(each) for each in found])


def _tail(head: torch.nn.Module, hidden: Tensor, ids: list[int], *, shared: int) -> Tensor:
    """The log-likelihood of ids[shared:]. hidden: (L, hidden)"""
    logits = head(hidden[shared - 1 : len(ids) - 1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (tail, vocab)
    tail = torch.tensor(ids[shared:], device=logits.device)
    return -F.cross_entropy(logits, tail, reduction="sum")


def evaluate_subject(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    subject: str,
    shots: Sequence[Question],
    batch_size: int,
    max_length: int,
) -> Score:
    """The score of a model in one subject. Raises UserError for a question that is too long."""
    score = Score()
    built = []
    for question in questions:
        choices, used = build_choices(
            question, subject=subject, shots=shots, tokenizer=tokenizer, max_length=max_length
        )
        score.fewer_shots += used < len(shots)
        built.append((choices, question.answer))
    built.sort(key=lambda each: len(each[0].ids[0]))  # so that little is padded
    for batch in _batches(built, batch_size):
        best = log_likelihoods(model, [choices for choices, _ in batch], pad_id=tokenizer.pad_id).argmax(1)
        score.correct += int((best.cpu() == torch.tensor([answer for _, answer in batch])).sum())
        score.questions += len(batch)
    return score


def _batches(items: list[tuple[Choices, int]], size: int) -> Iterator[list[tuple[Choices, int]]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def summarize(scores: dict[str, Score]) -> dict[str, object]:
    """Accuracy by subject, over all questions (MMLU's average), and as the mean of the subjects."""
    questions, correct = (sum(getattr(score, name) for score in scores.values()) for name in ("questions", "correct"))
    return {
        "accuracy": correct / questions,
        "mean_of_subjects": sum(score.accuracy for score in scores.values()) / len(scores),
        "questions": questions,
        "subjects": {name: asdict(score) | {"accuracy": score.accuracy} for name, score in scores.items()},
    }


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m peft_pretraining.multiple_choice", description=__doc__.splitlines()[0])
    add = parser.add_argument
    found = "a transformers folder, a checkpoint, or a run: its newest checkpoint"
    add("--model", type=Path, required=True, metavar="DIR", help=found)
    add("--data", type=Path, required=True, metavar="DIR", help="the folder that has dev, val and test")
    add("--split", choices=("test", "val", "dev"), default="test", help="the questions to be asked (default: test)")
    add("--shots", type=int, default=SHOTS, metavar="N", help=f"answered questions of dev in front (default: {SHOTS})")
    add("--subjects", metavar="A,B", help="only these (default: all)")
    add("--limit", type=int, metavar="N", help="only so many questions of each subject (default: all)")
    add("--batch_size", type=int, default=8, metavar="QUESTIONS", help="asked together (default: 8)")
    add("--max_length", type=int, metavar="TOKENS", help="of a prompt (default: as many as the model can take)")
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 where the device multiplies it natively")
    add("--output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    for name, least in (("shots", 0), ("limit", 1), ("batch_size", 1), ("max_length", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}.")
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise UserError(f"--output {args.output}: must be a file in a folder that exists.")
    return args


def main(argv: list[str] | None = None) -> dict[str, object]:
    """The whole command. Returns and prints the result. Raises UserError."""
    args = _parse_args(argv)
    only = args.subjects.split(",") if args.subjects else None
    asked = {name: read_questions(path) for name, path in find_subjects(args.data, split=args.split, only=only).items()}
    if empty := [name for name, questions in asked.items() if not questions]:
        raise UserError(f"{args.data / args.split}: {empty[0]} has no question.")
    shots: dict[str, list[Question]] = dict.fromkeys(asked, [])
    if args.shots:
        files = find_subjects(args.data, split="dev", only=list(asked))
        shots = {name: read_questions(path)[: args.shots] for name, path in files.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = open_model(args.model, device=device, dtype=resolve_dtype(args.dtype, device))
    length = args.max_length or model.config.max_position_embeddings
    scores: dict[str, Score] = {}
    with LongWait("asking subjects", total=len(asked)) as progress:
        for name, questions in asked.items():
            scores[name] = evaluate_subject(
                model, tokenizer, questions[: args.limit], subject=name, shots=shots[name],
                batch_size=args.batch_size, max_length=length,
            )  # fmt: skip
            progress.advance()
    result = {"model": str(args.model), "split": args.split, "shots": args.shots} | summarize(scores)
    rows = [{"subject": name, "questions": s.questions, "accuracy": f"{s.accuracy:.4f}"} for name, s in scores.items()]
    print(format_table(rows))
    print(
        f"accuracy {result['accuracy']:.4f} over {result['questions']} questions; "
        f"{result['mean_of_subjects']:.4f} as the mean of {len(scores)} subjects"
    )
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def command_line(argv: list[str] | None = None) -> int:
    """Runs main; one line and exit status 2 for what the user can mend."""
    return command_status(lambda: main(argv))


if __name__ == "__main__":
    sys.exit(command_line())
