"""What a run records as it goes: after an update, after an evaluation, and at its end."""

import resource
import sys
import time

import torch
from loguru import logger

from peft_pretraining.batch import Batch
from peft_pretraining.model.build import meta_model
from peft_pretraining.training import report
from peft_pretraining.training.evaluate import evaluate
from peft_pretraining.training.run import Run
from qgalore.memory import adamw_bytes, kept_bytes
from qgalore.outcome import Outcome
from qgalore.param_groups import split_parameters


def log_step(run: Run, *, loss: float, outcome: Outcome, batch: Batch, targets: int, began: float) -> None:
    """Advances the state by one finished update and records it.

    batch: the last batch of the update on this rank.
    targets: target tokens of the update, over all ranks.
    began: when the update began, on the clock of time.monotonic.
    """
    state, seconds = run.state, time.monotonic() - began
    state.advance(batch, targets=targets, seconds=seconds)
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
        for measured in report.describe_details(run.model, run.updates.optimizer):
            run.record.event("subspace_details", update=state.update, **measured)


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def evaluate_and_log(run: Run) -> None:
    """Loss and perplexity on the validation set, over all ranks. A signal ends the evaluation without a result."""
    state, stop = run.state, run.interruption
    evaluation = evaluate(run.model, run.validation, reduce_sum=run.world.sum, stop=lambda: stop.requested)
    if evaluation is None:
        run.stopping = True
        return
    state.evaluation, state.evaluated = evaluation, state.update
    run.record.event("eval", update=state.update, **evaluation._asdict())
    matrices = report.describe_refreshes(split_parameters(run.model), run.updates.optimizer)
    if matrices:
        run.record.event("subspaces", update=state.update, matrices=matrices)


def report_end(run: Run) -> None:
    """The last line of the record, and where everything is."""
    state = run.state
    assert state.evaluation is not None
    perplexity, seconds = state.evaluation.perplexity, time.monotonic() - state.began
    matrices = report.describe_refreshes(split_parameters(run.model), run.updates.optimizer)
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
        logger.info(report.summarize_refreshes(matrices))
    plain = meta_model(run.model.config, dtype=run.model.dtype)
    logger.info("kept between updates, in bytes:\n" + report.memory_table(kept, adamw=adamw_bytes(plain)))
    logger.info(
        f"{state.update} updates, {state.tokens_seen:,} tokens in {seconds:.0f} s "
        f"({state.tokens_seen / state.seconds:,.0f} tokens/s while training)"
    )
    logger.info(
        f"validation perplexity {perplexity:.2f}; record: {run.save_dir}/metrics.jsonl; model: {run.save_dir}/model"
    )
