"""What a person reads at the start and at the end of a run, as text and as rows of a table."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger
from torch import nn

from peft_pretraining.distributed import World
from peft_pretraining.model.adapters import Adapters
from peft_pretraining.training.provenance import device_name
from qgalore.factory import Recipe, Settings, find_recipe
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import ParameterGroup, frozen_parameters, split_parameters


def describe_groups(
    model: nn.Module, *, recipe: Recipe, settings: Settings, weight_bits: int | None, adapters: Adapters | None = None
) -> list[dict[str, Any]]:
    """One record for each parameter group: name, tensors, elements, trained_by. What is frozen comes last.

    weight_bits: bits of the matrices, where they are quantized.
    adapters: the adapters that are in the model.
    """
    shape = adapters.describe() if adapters is not None else "full rank"
    rows: list[tuple[ParameterGroup, str]] = []
    for group in split_parameters(model):
        weights = f"INT{weight_bits} weights, " if weight_bits and group.kind == "matrix" else ""
        how = recipe.describe(group, settings, unprojected=shape if group.kind == "matrix" else "full rank")
        rows.append((group, weights + how))
    rows += [(group, "nothing: W0 of the adapters") for group in frozen_parameters(model)]
    return [
        {"name": group.name, "tensors": len(group.parameters), "elements": group.elements, "trained_by": trained_by}
        for group, trained_by in rows
    ]


def log_plan(
    args: argparse.Namespace,
    *,
    groups: list[dict[str, Any]],
    dtype: torch.dtype,
    world: World,
    threads: int,
    preset: str | None,
) -> None:
    """Says what is about to happen: the size of the model, who is trained how, the length of the run.

    groups: see describe_groups.
    preset: what the preset is, in one line; None without one.
    """
    if preset is not None:
        logger.info(f"preset {args.preset}: {preset}")
    total = sum(group["elements"] for group in groups)
    kind = str(dtype).removeprefix("torch.")
    logger.info(f"{args.model_config}: {total:,} parameters in {kind} on {device_name(world.device)}")
    logger.info("who is trained how:\n" + format_table(groups))
    for flag, why in args.ignored.items():
        logger.warning(f"{flag} has no effect {why}")
    if args.grad_clipping and find_recipe(args.optimizer).per_layer:
        logger.info(f"clipping: each parameter's own projected gradient, to norm {args.grad_clipping:g}")
    logger.info(
        f"{args.num_training_steps} updates of {args.total_batch_size} x {args.max_length} tokens: "
        f"{args.gradient_accumulation} micro-batches of {args.batch_size} on {world.size} x {threads} threads"
    )


def describe_refreshes(groups: Sequence[ParameterGroup], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """One record for each projected matrix: its name, and LowRankOptimizer.refreshes. Empty for other optimizers."""
    if not isinstance(optimizer, LowRankOptimizer):
        return []
    pairs = [pair for group in groups for pair in zip(group.names, group.parameters, strict=True)]
    found = ((name, optimizer.refreshes(p)) for name, p in pairs)
    return [{"name": name, **refreshes} for name, refreshes in found if refreshes is not None]


def describe_details(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """One record for each matrix measured in this update: its name, and LowRankOptimizer.details. Empty for others."""
    if not isinstance(optimizer, LowRankOptimizer):
        return []
    found = ((name, optimizer.details(p)) for name, p in model.named_parameters())
    return [{"name": name, **details} for name, details in found if details is not None]


def summarize_refreshes(matrices: Sequence[dict[str, Any]]) -> str:
    """What describe_refreshes found, in one line."""
    total, seconds = (sum(matrix[key] for matrix in matrices) for key in ("refreshes", "seconds"))
    gaps = [matrix["gap"] for matrix in matrices if matrix["gap"] is not None]
    then = f"gaps of {min(gaps)} to {max(gaps)} updates at the end" if gaps else "from then on they learnt"
    return f"{total} refreshes of {len(matrices)} matrices' bases took {seconds:.1f} s; {then}"


def memory_table(kept: dict[str, int], *, adamw: dict[str, int]) -> str:
    """Bytes by kind, of this run and of AdamW on the same model, as text."""
    rows = [{"kind": kind, "this_run": kept[kind], "AdamW_would_keep": adamw[kind]} for kind in kept]
    total: dict[str, Any] = {"kind": "total", "this_run": sum(kept.values()), "AdamW_would_keep": sum(adamw.values())}
    return format_table([*rows, total])


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned text: numbers to the right, the keys as column heads."""
    heads = list(rows[0])
    cells = [[f"{row[key]:,}" if isinstance(row[key], int) else str(row[key]) for key in heads] for row in rows]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    right = [isinstance(rows[0][key], (int, float)) for key in heads]

    def align(line: list[str]) -> str:
        padded = [f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(line, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    names = [head.replace("_", " ") for head in heads]
    return "\n".join([align(names), *(align(line) for line in cells)])
