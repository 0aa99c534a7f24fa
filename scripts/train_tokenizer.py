"""Trains a sentencepiece tokenizer on the training documents of a data set.

    python scripts/train_tokenizer.py --dataset data/books --vocab_size 4096 --output data/books-4096.model

Validation documents are never read. The same documents give the same file.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from loguru import logger

from peft_pretraining.cli.flags import add_flags, defaults
from peft_pretraining.data.order import Document
from peft_pretraining.data.sources import open_documents
from peft_pretraining.data.tokenizer_training import count_tokens, train_tokenizer
from peft_pretraining.errors import Parser, UserError, command_status
from peft_pretraining.training.metrics import set_up_log

SHARED = ("dataset", "text_field", "validation")  # with torchrun_main.py
SAMPLE = 100  # documents that are tokenized to say how long a token is


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_flags(parser, names=SHARED)
    parser.add_argument("--vocab_size", type=int, default=4096, metavar="TOKENS", help="size (default: 4096)")
    parser.add_argument(
        "--documents", type=int, default=4000, metavar="DOCUMENTS", help="documents to train on (default: 4000)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the model; must not exist")
    args = argparse.Namespace(**defaults() | vars(parser.parse_args(argv)))
    if args.vocab_size < 260 or args.documents < 1:
        parser.error("--vocab_size must be at least 260, which the bytes take, and --documents at least 1")
    if args.output.exists():
        parser.error(f"--output {args.output} exists; name a file that does not")
    return args


def texts_of(args: argparse.Namespace) -> Iterator[str]:
    """The first training documents, in a shuffled order. Raises UserError if they are stored as tokens."""
    source = open_documents(args.dataset, split="train", seed=0, validation=args.validation, text_field=args.text_field)
    source.check()
    found = (each.text for each in source.read(epoch=0) if isinstance(each, Document))
    for _, text in zip(range(args.documents), found, strict=False):
        if not isinstance(text, str):
            raise UserError(f"--dataset {args.dataset} holds tokens: name the folder of the text they were made from.")
        yield text


def main(argv: list[str] | None = None) -> None:
    """Writes the tokenizer. Raises UserError."""
    args = parse(argv)
    texts = list(texts_of(args))
    model = train_tokenizer(texts, vocab_size=args.vocab_size)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(model)
    sample = texts[:SAMPLE]
    length = sum(map(len, sample)) / max(1, count_tokens(model, sample))
    logger.info(f"{args.output}: {args.vocab_size} tokens of {length:.2f} characters, from {len(texts)} documents")


def command_line(argv: list[str] | None = None) -> int:
    """Runs main. Returns the exit status: 2, after one line on stderr, for what the user can repair."""
    set_up_log(is_main=True)
    return command_status(lambda: main(argv))


if __name__ == "__main__":
    sys.exit(command_line())
