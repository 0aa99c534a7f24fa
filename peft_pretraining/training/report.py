"""What a run records and logs after an update, after an evaluation and at its end."""

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from peft_pretraining.batch import Batch
from peft_pretraining.errors import UserError
from peft_pretraining.model.build import meta_model
from peft_pretraining.progress import LongWait
from peft_pretraining.training.evaluate import evaluate
from peft_pretraining.training.run import Run
from qgalore.memory import adamw_bytes, kept_bytes
from qgalore.optimizer import LowRankOptimizer
from qgalore.outcome import Outcome


def log_step(run: Run, *, loss: float, outcome: Outcome, batch: Batch, targets: int, began: float) -> None:
    """Advances the state by one finished update and records it.

    loss: loss of the update, over all ranks.
    outcome: what the optimizer says about the update.
    batch: the last batch of the update on this rank.
    targets: number of target tokens of the update, over all ranks.
    began: start of the update, on the clock of time.monotonic.
    """
    state, seconds = run.state, time.monotonic() - began
    state.update += 1
    state.tokens_seen += targets
    state.seconds += seconds
    state.epoch = max(state.epoch, batch.epoch)
    state.position = batch.position
    run.record.event(
        "update",
        update=state.update,
        loss=loss,
        lr=max(group["lr"] / group["lr_ratio"] for group in run.updates.optimizer.param_groups),
        grad_norm=outcome.norm,
        tokens_seen=state.tokens_seen,
        tokens_per_second=targets / seconds,
        memory_bytes=memory_bytes(run.world.device),
    )
    if run.args.log_details:
        for details in per_matrix(run, LowRankOptimizer.details):
            run.record.event("subspace_details", update=state.update, **details)


def count_too_long(run: Run, shortened: int, left_out: int) -> None:
    """Counts the dialogues of an update that were longer than a sequence, over all ranks; the first are told."""
    state, first = run.state, not (run.state.shortened or run.state.left_out)
    if not (shortened or left_out):
        return
    state.shortened += shortened
    state.left_out += left_out
    run.record.event("too_long", update=state.update, shortened=state.shortened, left_out=state.left_out)
    if first and run.world.is_main:
        logger.warning(
            f"some dialogues are longer than --max_length {run.args.max_length}: they end after an earlier answer, or "
            "are left out if not even the first fits; the end of the log counts them"
        )


def show_first_bases(optimizer: LowRankOptimizer) -> None:
    """Shows how many bases the first update has computed: those of a 7B take minutes."""
    projected = [update for update in optimizer.updates.values() if update.projector.sides]
    progress = LongWait("first bases", total=len(projected))
    for update in projected:
        update.observer.refreshed = progress.advance


def memory_bytes(device: torch.device) -> int:
    """The largest memory of this process so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def per_matrix(run: Run, ask: Callable[[LowRankOptimizer, Tensor], dict[str, Any] | None]) -> list[dict[str, Any]]:
    """One record for each parameter that `ask` returns figures for, with its name. Empty for other optimizers."""
    optimizer = run.updates.optimizer
    if not isinstance(optimizer, LowRankOptimizer):
        return []
    found = ((name, ask(optimizer, p)) for name, p in run.model.named_parameters() if p.requires_grad)
    return [{"name": name, **figures} for name, figures in found if figures is not None]


def evaluate_and_log(run: Run) -> None:
    """Evaluates on the validation set, over all ranks. A signal ends the evaluation without a result."""
    state, world, interruption = run.state, run.world, run.interruption
    assert run.validation is not None, "the task predicts tokens"
    evaluation = evaluate(
        run.model, run.validation, reduce_sum=world.sum, stop=lambda: world.any(interruption.requested)
    )
    if evaluation is None:
        run.stopping = True
        return
    state.evaluation, state.evaluated = evaluation, state.update
    run.record.event("eval", update=state.update, **evaluation._asdict())
    if matrices := per_matrix(run, LowRankOptimizer.refreshes):
        run.record.event("subspaces", update=state.update, matrices=matrices)


def report_end(run: Run) -> None:
    """Writes the last line of the record; logs the memory and where the results are.

    Raises UserError if the model is of no use, because its validation perplexity is not finite.
    """
    state = run.state
    assert state.evaluation is not None
    perplexity, seconds = state.evaluation.perplexity, time.monotonic() - state.began
    matrices = per_matrix(run, LowRankOptimizer.refreshes)
    kept = kept_bytes(run.model, run.updates.optimizer, accumulators=run.updates.sums.values())
    run.record.event(
        "end",
        updates=state.update,
        tokens_seen=state.tokens_seen,
        perplexity=perplexity,
        seconds=round(seconds, 3),
        kept_bytes=kept,
        refreshes=sum(matrix["refreshes"] for matrix in matrices),
    )
    if matrices:
        logger.info(_summarize_refreshes(matrices))
    adamw = adamw_bytes(meta_model(run.model.config, dtype=run.model.dtype))
    rows = [{"kind": kind, "this_run": kept[kind], "AdamW_would_keep": adamw[kind]} for kind in kept]
    rows += [{"kind": "total", "this_run": sum(kept.values()), "AdamW_would_keep": sum(adamw.values())}]
    logger.info("kept between updates, in bytes:\n" + format_table(rows))
    logger.info(
        f"{state.update} updates, {state.tokens_seen:,} tokens in {seconds:.0f} s "
        f"({state.tokens_seen / state.seconds:,.0f} tokens/s while training)"
    )
    if state.shortened or state.left_out:
        logger.warning(
            f"too long for --max_length {run.args.max_length}, counted in every epoch: {state.shortened:,} dialogues "
            f"that ended after an earlier answer, {state.left_out:,} that were left out"
        )
    logger.info(
        f"validation perplexity {perplexity:.2f}; record: {run.save_dir}/metrics.jsonl; model: {run.save_dir}/model"
    )
    if not math.isfinite(perplexity):
        raise UserError(
            f"the validation perplexity at the end is {perplexity}: the model in {run.save_dir}/model is of no use. A "
            "lower --lr or --grad_clipping 1.0 may help."
        )


def _summarize_refreshes(matrices: Sequence[dict[str, Any]]) -> str:
    total, seconds = (sum(matrix[key] for matrix in matrices) for key in ("refreshes", "seconds"))
    gaps = [matrix["gap"] for matrix in matrices if matrix["gap"] is not None]
    then = f"gaps of {min(gaps)} to {max(gaps)} updates at the end" if gaps else "after that, the bases learnt online"
    return f"{total} refreshes of {len(matrices)} matrices' bases took {seconds:.1f} s; {then}"


def format_table(rows: Sequence[dict[str, Any]], *, numbers: bool = False) -> str:
    """Rows with the same keys as aligned text: numbers on the right, the keys as headings of the columns.

    numbers: whether all columns but the first have numbers, as text.
    """
    heads = list(rows[0])
    cells = [[f"{row[key]:,}" if isinstance(row[key], int) else str(row[key]) for key in heads] for row in rows]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    sides = [">" if isinstance(rows[0][key], (int, float)) or (numbers and key != heads[0]) else "<" for key in heads]
    lines = [[head.replace("_", " ") for head in heads], *cells]
    padded = ([f"{cell:{s}{w}}" for cell, s, w in zip(line, sides, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)
