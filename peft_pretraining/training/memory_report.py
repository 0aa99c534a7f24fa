"""The plan of a run's memory in words: by kind and phase, the cards that it fits, and what would make it fit others."""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from loguru import logger

from peft_pretraining.training.memory_fit import CARDS, CONTEXT, RESERVE, SAVINGS, Search, changes, gigabytes, needed
from peft_pretraining.training.memory_plan import MemoryPlan, plan_memory
from peft_pretraining.training.report import format_table

# What a run keeps and needs, in the order of the table; "refresh" is the workspace of computing bases.
KINDS = (
    "weights", "scales", "bases", "moments", "sums", "gradients", "activations", "logits", "refresh", "update",
    "dequantized weights", "buffers",
)  # fmt: skip
GOAL = 16 * 10**9  # bytes; a run that needs more is told what would make it fit
SECONDS = 15.0  # of trying; a plan takes one to three of them for a 7B


def by_kind(plan: MemoryPlan) -> list[dict[str, Any]]:
    """One row for each kind of memory, in MB of 1e6 bytes: between updates, and at the peak of each phase."""
    columns = {"between_updates": plan.held} | {
        phase.replace(" ", "_"): peak.kinds for phase, peak in plan.peaks.items()
    }
    kinds = [kind for kind in KINDS if any(column.get(kind, 0) >= 5e4 for column in columns.values())]
    rows: list[dict[str, Any]] = [
        {"MB": kind} | {name: _megabytes(column.get(kind, 0)) for name, column in columns.items()} for kind in kinds
    ]
    whole = {name: _megabytes(sum(column.values())) for name, column in columns.items()}
    made_by = {"between_updates": ""} | {phase.replace(" ", "_"): peak.line for phase, peak in plan.peaks.items()}
    return [*rows, {"MB": "together"} | whole, {"MB": "made by"} | made_by]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def cards_for(peak: int) -> list[int]:
    """The cards, in GB, that a planned peak fits."""
    return [card for card in CARDS if needed(peak) <= card * 10**9]


def log_memory(
    args: argparse.Namespace, *, dtype: torch.dtype, device: torch.device, world_size: int = 1
) -> None:
    """Logs the plan of a run, the cards that it fits, and what would make it fit smaller ones.

    The latter where it needs more than GOAL, or more than the GPU that is present has.
    """
    plan = plan_memory(args, dtype=dtype, device_type=device.type)
    logger.info(f"memory, planned{f' for each of {world_size} GPUs' if world_size > 1 else ''}:\n{table(plan)}")
    peak, cards = plan.peak.bytes, cards_for(plan.peak.bytes)
    fits = f"fits cards of {', '.join(map(str, cards))} GB" if cards else f"fits no card of up to {CARDS[-1]} GB"
    logger.info(
        f"the peak, {gigabytes(peak)}, needs {gigabytes(needed(peak))} with {RESERVE:.0%} of it and "
        f"{gigabytes(CONTEXT)} for a GPU's context: it {fits}"
    )
    goal = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else GOAL
    if needed(peak) > goal:
        search = Search(args, dtype=dtype, device_type=device.type, world_size=world_size)
        lines = list(smaller_cards(search, [card for card in CARDS if card not in cards]))
        logger.info("\n".join(["what would make it fit, found by trying (* changes results):", *lines]))


def table(plan: MemoryPlan) -> str:
    """by_kind as aligned text, with numbers on the right."""
    rows = by_kind(plan)
    text = format_table([{"": row["MB"]} | {key: value for key, value in row.items() if key != "MB"} for row in rows])
    return text


def smaller_cards(search: Search, cards: list[int], *, seconds: float = SECONDS) -> Iterator[str]:
    """For each of these cards, the largest first, a line with the smallest changes that make the run fit it.

    seconds: after this time no other card is begun.
    """
    began = time.monotonic()
    steps = search.steps([*SAVINGS, *changes(search.args)])
    for card in sorted(cards, reverse=True):
        if time.monotonic() - began > seconds:
            yield f"  {card} GB and less: not tried, after {seconds:g} s; --fit {card}GB tries it"
            return
        fit = search.fewest(card * 10**9, steps=steps, batches=search.batches(at_most=search.args.batch_size))
        if fit is None:
            yield f"  {card} GB and less: nothing that was tried"
            return
        same = set().union(*SAVINGS, ["batch_size"])
        flags = {name: value for name, value in fit.flags.items() if getattr(search.args, name) != value}
        shown = " ".join(
            f"--{name}{'' if value is True else f' {value}'}{'' if name in same else '*'}"
            for name, value in flags.items()
        )
        yield f"  {card} GB: {shown} (peak {gigabytes(fit.peak)})"
