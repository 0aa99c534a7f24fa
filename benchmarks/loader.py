"""Tokens per second of the data loader alone: the text of a data set against its token shards.

    python benchmarks/loader.py --dataset data/books --tokenizer data/spiece.model --output loader.jsonl

Tokenizes the data set into a temporary folder, then reads both with each number of workers, in turn, `--repeats` times,
for `--seconds` each. Nothing else uses the batches, so this is the most that training could get. Prints a Markdown
table of medians; `--output` gets one line of JSON for each measurement.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.support import add_data_flags, print_table
from peft_pretraining.cli.args import default_tokenizer
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.sources import open_documents
from peft_pretraining.data.token_writer import tokenize
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.training.provenance import git_commit, versions

KINDS = ("text", "token shards")


def measure(dataset: str, tokenizer: Tokenizer, *, workers: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds until the first batch, and tokens per second after as many batches as the workers have ready by then."""
    source = open_documents(dataset, split="train", seed=0)
    began = time.perf_counter()
    batches = train_batches(
        source, tokenizer, batch_size=args.batch_size, max_length=args.max_length, packing="concat", workers=workers,
        world_size=args.world_size,
    )  # fmt: skip
    next(batches)
    first = time.perf_counter() - began
    for _ in range(4 * max(1, workers)):
        next(batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < args.seconds:
        count += next(batches).input_ids.numel()
    speed = count / (time.perf_counter() - began)
    batches.close()
    return {"first_batch_seconds": first, "tokens_per_second": speed}


def table(records: list[dict[str, Any]], workers: list[int]) -> list[dict[str, Any]]:
    """Medians over the repeats, and how much faster token shards are read."""
    rows = []
    for count in workers:
        medians = {
            (kind, key): statistics.median(r[key] for r in records if (r["kind"], r["workers"]) == (kind, count))
            for kind in KINDS
            for key in ("tokens_per_second", "first_batch_seconds")
        }
        text, tokens = (medians[kind, "tokens_per_second"] for kind in KINDS)
        speeds = {f"{kind}, tokens/s": f"{medians[kind, 'tokens_per_second'] / 1e6:.2f}M" for kind in KINDS}
        waits = {f"first batch of {kind}": f"{medians[kind, 'first_batch_seconds']:.2f} s" for kind in KINDS}
        rows.append({"workers": count, **speeds, "ratio": f"{tokens / text:.1f}", **waits})
    return rows


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All measurements: text and token shards in turn, so that a busy moment of the machine meets both."""
    tokenizer = load_tokenizer(args.tokenizer or default_tokenizer(args.dataset))
    records = []
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "tokens"
        tokenize(
            args.dataset, tokenizer, shards, validation=None, text_field="text",
            processes=len(os.sched_getaffinity(0)), max_bad_documents=100,
        )  # fmt: skip
        for repeat in range(args.repeats):
            for workers in args.workers:
                for kind, dataset in zip(KINDS, (args.dataset, str(shards)), strict=True):
                    found = measure(dataset, tokenizer, workers=workers, args=args)
                    records.append({"kind": kind, "workers": workers, "repeat": repeat} | found)
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 4], metavar="PROCESSES")
    parser.add_argument("--batch_size", type=int, default=16, metavar="SEQUENCES")
    parser.add_argument("--max_length", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--world_size", type=int, default=1, metavar="RANKS", help="read the share of one of so many")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="JSONL")
    args = parser.parse_args(argv)
    try:
        records = run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "workers")}
        shared = settings | {"commit": git_commit(), "versions": versions(), "cpus": len(os.sched_getaffinity(0))}
        args.output.write_text("".join(json.dumps(shared | record) + "\n" for record in records))
    print_table(table(records, args.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
