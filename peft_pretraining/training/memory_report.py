"""The plan of a run's memory in words: by kind and phase, the cards that it fits, and what would make it fit others."""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from loguru import logger

from peft_pretraining.distributed import World
from peft_pretraining.model.build import prepare_model
from peft_pretraining.model.config import read_config
from peft_pretraining.training.memory_fit import (
    CARDS,
    CONTEXT,
    GB,
    RESERVE,
    SAVINGS,
    Search,
    changes,
    gigabytes,
    needed,
    show,
)
from peft_pretraining.training.memory_plan import MemoryPlan, plan_memory
from peft_pretraining.training.memory_watch import MemoryWatch
from peft_pretraining.training.plan import open_updates
from peft_pretraining.training.report import format_table

# What a run keeps and needs, in the order of the table; "refresh" is the workspace of computing bases.
KINDS = (
    "weights", "scales", "bases", "moments", "sums", "gradients", "activations", "logits", "refresh", "update",
    "dequantized weights", "gathered weights", "buffers",
)  # fmt: skip
GOAL = 16 * GB  # bytes; a run that needs more is told what would make it fit
SECONDS = 12.0  # of this process, for trying; a plan takes one to three of them for a 7B


SHORT = {"an update with refreshes": "with refreshes", "building the model": "building"}


def by_kind(plan: MemoryPlan) -> list[dict[str, Any]]:
    """One row for each kind of memory, in MB of 1e6 bytes: between updates, and at the peak of each phase."""
    columns = {"held": plan.held} | {SHORT.get(phase, phase): peak.kinds for phase, peak in plan.peaks.items()}
    columns["building"] = {"weights": sum(columns["building"].values())}  # nothing else exists then
    names = {name: name.replace(" ", "_") for name in columns}
    kinds = [kind for kind in KINDS if any(column.get(kind, 0) >= 5e4 for column in columns.values())]
    return [
        {"MB": kind} | {names[name]: _megabytes(column.get(kind, 0)) for name, column in columns.items()}
        for kind in kinds
    ] + [{"MB": "together"} | {names[name]: _megabytes(sum(column.values())) for name, column in columns.items()}]


def _megabytes(size: int) -> str:
    return "" if size < 5e4 else f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def cards_for(peak: int) -> list[int]:
    """The cards, in GB, that a planned peak fits."""
    return [card for card in CARDS if needed(peak) <= card * GB]


def log_memory(args: argparse.Namespace, *, dtype: torch.dtype, device: torch.device, world_size: int = 1) -> None:
    """Logs the plan of a run, the cards that it fits, and what would make it fit smaller ones.

    The latter where it needs more than GOAL, or more than the GPU that is present has.
    """
    _warn_of_options(args, dtype=dtype)
    plan = plan_memory(args, dtype=dtype, device_type=device.type, ranks=world_size)
    each = f" for each of {world_size} processes" if world_size > 1 else ""
    logger.info(f"memory, planned{each}:\n{format_table(by_kind(plan), numbers=True)}")
    peak, cards = plan.peak.bytes, cards_for(plan.peak.bytes)
    fits = f"fits cards of {', '.join(map(str, cards))} GB" if cards else f"fits no card of up to {CARDS[-1]} GB"
    logger.info(
        f"the peak, {gigabytes(peak)} at {plan.peak.line}, needs {gigabytes(needed(peak))} with {RESERVE:.0%} of it "
        f"and {gigabytes(CONTEXT)} for a GPU's context: it {fits}"
    )
    goal = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else GOAL
    if needed(peak) > goal:
        search = Search(args, dtype=dtype, device_type=device.type, world_size=world_size, seconds=SECONDS)
        lines = list(smaller_cards(search, [card for card in CARDS if card not in cards]))
        logger.info("\n".join(["what would make it fit, found by trying (* changes results):", *lines]))


def _warn_of_options(args: argparse.Namespace, *, dtype: torch.dtype) -> None:
    """Builds model and optimizer without memory: they warn of what does not suit them, as in a run."""
    eager = argparse.Namespace(**vars(args) | {"compile": False})
    config = read_config(args.model_config)
    open_updates(eager, model=prepare_model(eager, config=config, dtype=dtype, device=torch.device("meta")))


def watch_memory(args: argparse.Namespace, *, dtype: torch.dtype, world: World) -> MemoryWatch | None:
    """What puts the plan beside the measured peak, on the main rank; None where that is not worth its seconds.

    To be called before this process joins others, see one_of.

    On a CPU, where nothing is measured, there is a plan only if --fit has made it already.
    """
    if args.eval_only or not world.is_main or not (world.device.type == "cuda" or args.fit is not None):
        return None
    try:
        plan = plan_memory(args, dtype=dtype, device_type=world.device.type, ranks=world.size)
    except Exception as error:  # a plan is an extra, and may not end a run, whatever is wrong with it
        logger.warning(f"the memory could not be planned: {type(error).__name__}: {error}")
        return None
    return MemoryWatch(plan.peaks, device=world.device)


def smaller_cards(search: Search, cards: list[int]) -> Iterator[str]:
    """For each of these cards, the largest first, a line with the smallest changes that make the run fit it."""
    steps = search.steps([*SAVINGS, *changes(search.args)])
    for card in sorted(cards, reverse=True):
        note = ""
        try:
            fit = search.fewest(card * GB, steps=steps, batches=search.batches(at_most=search.args.batch_size))
        except TimeoutError:
            note = f", found in {SECONDS:g} s: fewer flags may do"
            fit = search.found or search.least
            if fit is None or needed(fit.peak) > card * GB:
                yield f"  {card} GB and less: not tried to the end in {SECONDS:g} s; --fit {card}GB takes its time"
                return
        if fit is None:
            yield (
                f"  {card} GB and less: nothing that was tried, not even {' '.join(map(show, steps))}; "
                f"python -m qgalore.memory {search.args.model_config} compares other methods"
            )
            return
        same = set().union(*SAVINGS, ["batch_size"])
        flags = {name: value for name, value in fit.flags.items() if getattr(search.args, name) != value}
        shown = " ".join(
            f"--{name}{'' if value is True else f' {value}'}{'' if name in same else '*'}"
            for name, value in flags.items()
        )
        yield f"  {card} GB: {shown} (peak {gigabytes(fit.peak)}{note})"
