"""Tokenizes a data set once, into a folder that `--dataset FOLDER` of torchrun_main.py reads at the speed of memory.

    python scripts/tokenize_corpus.py --dataset data/books --tokenizer data/spiece.model --output data/books-tokens

The folder has the train and the validation documents, with the names and in the order of the text, so training gets the
very batches that it would get from the text. It appears when it is complete; after a kill, the same command goes on
with the files that are missing. `--verify FOLDER` compares every file of such a folder with its checksum.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from loguru import logger

from peft_pretraining.cli.args import default_tokenizer
from peft_pretraining.cli.flags import add_flags, defaults
from peft_pretraining.data.token_shards import SPLITS, read_index, verify
from peft_pretraining.data.token_writer import check_output, tokenize
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.errors import Parser, command_status
from peft_pretraining.training.metrics import set_up_log

SHARED = ("dataset", "text_field", "validation", "tokenizer", "max_bad_documents")  # with torchrun_main.py


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_flags(parser, names=SHARED)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the tokens go; must not exist")
    parser.add_argument(
        "--processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="PROCESSES",
        help="files that are tokenized at a time; the result does not depend on it (default: one for each CPU)",
    )
    parser.add_argument("--verify", type=Path, metavar="FOLDER", help="check a folder of tokens and write nothing")
    args = argparse.Namespace(**defaults() | vars(parser.parse_args(argv)))
    if (args.output is None) == (args.verify is None):
        parser.error("give --output FOLDER, or --verify FOLDER")
    if args.processes < 1 or args.max_bad_documents < 0:
        parser.error("--processes must be at least 1 and --max_bad_documents at least 0")
    return args


def main(argv: list[str] | None = None) -> None:
    """Writes or verifies a folder. Raises UserError."""
    args = parse(argv)
    if args.verify:
        index = read_index(args.verify)
        verify(index)
        logger.info(f"{args.verify}: every file has the checksum that it was written with")
    else:
        check_output(args.output)
        tokenizer = load_tokenizer(args.tokenizer or default_tokenizer(args.dataset))
        index = tokenize(
            args.dataset, tokenizer, args.output, validation=args.validation, text_field=args.text_field,
            processes=args.processes, max_bad_documents=args.max_bad_documents,
        )  # fmt: skip
    for split in SPLITS:
        count = index.count(split)
        bad = f", {count['bad_documents']} could not be read" if count["bad_documents"] else ""
        logger.info(f"{index.folder}: {count['tokens']:,} {split} tokens of {count['documents']:,} documents{bad}")


def command_line(argv: list[str] | None = None) -> int:
    """Runs main. Returns the exit status: 2, after one line on stderr, for what the user can repair."""
    set_up_log(is_main=True)
    return command_status(lambda: main(argv))


if __name__ == "__main__":
    sys.exit(command_line())
