"""The loop that trains, one update after the other, whatever the task of the run is."""

import contextlib
import time

import torch
from loguru import logger

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.cli.args import schedule_of
from peft_pretraining.errors import UserError
from peft_pretraining.model.adapters import reset_if_due
from peft_pretraining.model.loss import accumulate_gradients, language_loss_sum
from peft_pretraining.progress import LongWait
from peft_pretraining.schedules import lr_ratio
from peft_pretraining.training.incidents import react
from peft_pretraining.training.interruption import Interrupted
from peft_pretraining.training.replicas import check_replicas
from peft_pretraining.training.report import count_too_long, evaluate_and_log, log_step
from peft_pretraining.training.run import Run, State, Task
from peft_pretraining.training.saving import give_up, last_checkpoint, leave_time_to_save, save, save_result
from qgalore.factory import set_lr

LANGUAGE = Task(  # the next token
    loss_sum=language_loss_sum,
    lr_ratio=lambda args, update: lr_ratio(update, **schedule_of(args)),
    evaluate=evaluate_and_log,
    save_result=save_result,
)


def loop(run: Run) -> None:
    """Trains until update num_training_steps. Evaluates and saves when it is due, and at the end.

    Raises Interrupted, after saving, if a signal has asked to stop or the time budget is nearly used up.
    """
    args, begun_at, task = run.args, run.state.update, run.task or LANGUAGE
    # It waits for data, compiles, and computes bases.
    first_update = LongWait("first update, with compilation" if args.compile else "first update")
    while True:
        state = run.state
        last = state.update >= args.num_training_steps
        if args.check_replicas and args.parallel == "ddp" and due(state, args.check_replicas):
            check_replicas(run.model, run.updates.optimizer, world=run.world, update=state.update)
        if (last or due(state, args.eval_every)) and state.evaluated != state.update and not run.stopping:
            task.evaluate(run)
        if last or run.stopping or due(state, args.save_every):
            save(run)
        if last or run.stopping:
            break
        with first_update if state.update == begun_at else contextlib.nullcontext():
            train_step(run)
    if run.stopping:
        checkpoint = last_checkpoint(run)
        said = f"stopped after update {state.update}; go on with --continue_from {checkpoint} or --resume auto"
        logger.info(said)
        raise Interrupted(said, status=run.interruption.status)
    task.save_result(run)


def due(state: State, every: int) -> bool:
    return state.update > 0 and state.update % every == 0


def train_step(run: Run) -> None:
    """One update: the learning rate, micro-batches forward and backward, the optimizer, the record.

    The loss is the sum over the target tokens of all micro-batches and ranks, divided by their number.
    """
    args, state, task = run.args, run.state, run.task or LANGUAGE
    began = time.monotonic()
    micro_batches = read_batches(run)
    targets = sum(int((batch.targets != IGNORED).sum()) for batch in micro_batches)
    targets = max(1, int(run.world.sum(torch.tensor(float(targets), dtype=torch.float64))))
    set_lr(run.updates.optimizer, args.lr * task.lr_ratio(args, state.update + 1))
    loss = accumulate_gradients(
        run.model, micro_batches, targets=targets, device=run.world.device, loss_sum=task.loss_sum
    )
    outcome = run.updates.finish()
    reset_if_due(args, run.model, run.updates.optimizer, update=state.update + 1)
    skipped = [line for batch in micro_batches for line in batch.skipped]
    leave_time_to_save(run, update_seconds=time.monotonic() - began)
    # One all-reduce for everything that the ranks must agree on.
    too_long = [sum(counts) for counts in zip(*(batch.too_long for batch in micro_batches), strict=True)]
    told = torch.tensor([float(loss), run.interruption.requested, len(skipped), *too_long], dtype=torch.float64)
    total, stops, bad_documents, *too_long = run.world.sum(told).tolist()
    run.stopping = stops > 0
    log_step(run, loss=total, outcome=outcome, batch=micro_batches[-1], targets=targets, began=began)
    if run.memory is not None:
        evaluated = state.evaluation is not None
        run.memory.after_update(run.record, update=state.update, optimizer=run.updates.optimizer, evaluated=evaluated)
    count_too_long(run, *map(int, too_long))
    react(run, loss=total, outcome=outcome, skipped=skipped, bad_documents=bad_documents > 0)


def read_batches(run: Run) -> list[Batch]:
    """The micro-batches of the next update. The state still describes the last finished one.

    Raises UserError if the data cannot be read; a process that is alone saves the run first.
    """
    state = run.state
    try:
        micro_batches = [next(run.batches) for _ in range(run.args.gradient_accumulation)]
    except UserError as error:
        raise give_up(run, str(error), advice="") if run.world.size == 1 else error from None
    for line in (line for batch in micro_batches for line in batch.skipped):
        logger.warning(f"skipped: {line}")
    epoch = micro_batches[-1].epoch
    if epoch > state.epoch:
        logger.info(f"the data has ended: epoch {epoch + 1} begins, reshuffled")
    return micro_batches
