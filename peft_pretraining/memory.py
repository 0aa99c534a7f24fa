"""The memory of a run by every method, side by side, planned for a GPU: `python -m qgalore.memory CONFIG`."""

import argparse
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from loguru import logger

from peft_pretraining.cli.args import parse_args
from peft_pretraining.errors import Parser, UserError
from peft_pretraining.model.build import meta_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.dtypes import known_dtype
from peft_pretraining.training.memory_fit import CONTEXT, RESERVE, gigabytes
from peft_pretraining.training.memory_plan import plan_memory
from peft_pretraining.training.memory_report import by_kind, cards_for
from peft_pretraining.training.plan import check_sharding
from peft_pretraining.training.report import format_table
from qgalore.factory import OPTIMIZERS

BATCH_SIZE = 16
# What a method is used with, where nothing else is asked for.
USUAL: dict[str, list[str]] = {
    name: ["--weight_quant", "--stochastic_round", "--proj_quant"] for name in OPTIMIZERS if name.startswith("q_galore")
}
METHODS: dict[str, list[str]] = {
    **{name: ["--optimizer", name, *USUAL.get(name, [])] for name in OPTIMIZERS},
    "adamw --peft lora": ["--optimizer", "adamw", "--peft", "lora"],
}
WIDTHS = {"method": max(map(len, METHODS)), "weights": 8, "bases": 8, "moments": 8, "sums": 8, "gradients": 10,
          "activations": 12, "peak": 8, "fits, GB": 20}  # fmt: skip


def main(argv: list[str]) -> int:
    """Prints the table. argv: the command line without the program. Returns the exit status."""
    logger.remove()
    parser = Parser(prog="python -m qgalore.memory", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="file with the shape of the model, such as configs/llama_60m.json")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs: the plan is that of each, by --parallel")
    parser.epilog = (
        "All other flags are those of torchrun_main.py, such as --batch_size, --max_length, --rank. With --optimizer "
        "or --preset, one method is planned, kind by kind."
    )
    try:
        own, flags = parser.parse_known_args(argv)
        warnings.simplefilter("ignore")  # of options that do not suit a model; a run says so
        if own.ranks < 1:
            raise UserError(f"--ranks {own.ranks}: must be at least 1.")
        read_config(own.config)
        rows = _one(own, flags) if {"--optimizer", "--preset"} & set(flags) else _all(own, flags)
        for line in rows:
            print(line, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _completed(own: argparse.Namespace, flags: list[str]) -> argparse.Namespace:
    if "--fit" in flags:
        raise UserError("--fit chooses flags for a run: try it with torchrun_main.py --dry_run.")
    batch = [] if {"--batch_size", "--preset"} & set(flags) else ["--batch_size", str(BATCH_SIZE)]
    data = ["--dataset", "pydocs", "--dry_run"]  # no data is read
    args = parse_args(["--model_config", own.config, *batch, *flags, *data], world_size=own.ranks)
    known_dtype(args.dtype or "bfloat16")  # before anything is printed
    check_sharding(args, model=meta_model(read_config(own.config)), ranks=own.ranks)
    return args


def _one(own: argparse.Namespace, flags: list[str]) -> Iterator[str]:
    """The plan of one command line, kind by kind."""
    args = _completed(own, flags)
    plan = plan_memory(args, dtype=known_dtype(args.dtype or "bfloat16"), ranks=own.ranks)
    yield _heading(own, args)
    yield format_table(by_kind(plan), numbers=True)
    cards = ", ".join(map(str, cards_for(plan.peak.bytes)))
    fits = f"fits cards of {cards} GB" if cards else "fits no card of up to 80 GB"
    yield f"peak {gigabytes(plan.peak.bytes)} at {plan.peak.line}; {fits}, {_margin()}"


def _all(own: argparse.Namespace, flags: list[str]) -> Iterator[str]:
    """A line for each method; those that cannot be had with these flags are left out at the end, with the reason.

    Raises UserError if none can.
    """
    possible: dict[str, argparse.Namespace] = {}
    left_out: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        try:
            possible[name] = _completed(own, [*flags, *method])
        except UserError as error:
            left_out.setdefault(str(error).replace(name, "NAME"), []).append(name)
    if not possible:
        raise UserError(next(iter(left_out)))
    yield _heading(own, next(iter(possible.values())))
    yield _line({name: name for name in WIDTHS})
    for name, args in possible.items():
        plan = plan_memory(args, dtype=known_dtype(args.dtype or "bfloat16"), ranks=own.ranks)
        held, peak = plan.held, plan.peak
        cards = ", ".join(map(str, cards_for(peak.bytes)))
        cells: dict[str, Any] = {name: round(peak.kinds.get(name, 0) / 1e6) for name in WIDTHS}
        cells |= {
            "method": name,
            "weights": round((held.get("weights", 0) + held.get("scales", 0)) / 1e6),
            "bases": round(held.get("bases", 0) / 1e6),
            "moments": round(held.get("moments", 0) / 1e6),
            "peak": round(peak.bytes / 1e6),
            "fits, GB": cards or "none up to 80",
        }
        yield _line(cells)
    for reason, names in left_out.items():
        yield f"left out: {', '.join(names)}: {reason}"
    yield f"q_galore rows with {' '.join(USUAL['q_galore_adamw8bit'])}; a card fits {_margin()}"


def _margin() -> str:
    return f"with {RESERVE:.0%} of the peak and {gigabytes(CONTEXT)} for its context to spare"


def _heading(own: argparse.Namespace, args: argparse.Namespace) -> str:
    count = "1 micro-batch" if args.gradient_accumulation == 1 else f"{args.gradient_accumulation} micro-batches"
    each = f" on each of {own.ranks} GPUs with --parallel {args.parallel}" if own.ranks > 1 else ""
    return (
        f"{own.config}, {count} of {args.batch_size} x {args.max_length} tokens"
        f"{each}, MB of 1e6 bytes; gradients, sums and activations at the peak"
    )


def _line(cells: dict[str, Any]) -> str:
    shown = {name: f"{cell:,}" if isinstance(cell, int) else str(cell) for name, cell in cells.items()}
    return "".join(
        shown[name].ljust(width)
        if name == "method"
        else f"  {shown[name]}"
        if "fits" in name
        else shown[name].rjust(width)
        for name, width in WIDTHS.items()
    ).rstrip()
