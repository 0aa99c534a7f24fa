"""Saving a run, restoring it, and ending one that cannot go on."""

import math
import time
from pathlib import Path

from loguru import logger
from torch import Tensor

from peft_pretraining.checkpoint.files import Checkpoint, complete_checkpoints, update_of
from peft_pretraining.checkpoint.snapshot import restore_model, restore_optimizer, restore_rng, take_snapshot
from peft_pretraining.checkpoint.start import StartingPoint, same_folder
from peft_pretraining.checkpoint.weights import load_initial_weights, open_checkpoint
from peft_pretraining.checkpoint.writer import save_together
from peft_pretraining.data.position import Progress
from peft_pretraining.errors import UserError
from peft_pretraining.export.folder import save_model
from peft_pretraining.host_memory import free_host_memory
from peft_pretraining.model.adapters import Adapters
from peft_pretraining.model.sharding import is_sharded
from peft_pretraining.progress import LongWait
from peft_pretraining.training.provenance import git_commit, versions
from peft_pretraining.training.report import show_first_bases
from peft_pretraining.training.run import Run, State
from qgalore.memory import kept_bytes
from qgalore.optimizer import LowRankOptimizer

SLOW_DISK = 200e6  # bytes a second


def save(run: Run) -> None:
    """Saves a checkpoint of the whole run. While updates are being skipped, saves none.

    It is written in the background, from a copy in host memory, if training goes on meanwhile and there is room for the
    copy. Otherwise tensors are written one at a time, and training waits.
    """
    state = run.state
    if state.saved == state.update:
        return
    if state.health.bad_in_a_row:
        logger.warning(f"no checkpoint after update {state.update}: the last updates were not finite")
        return
    state.saved = state.update
    state.health.rollbacks_since_save = 0
    assert state.position is not None, "there was an update"
    positions = run.world.gather(state.position.to_json())
    shared = run.world if is_sharded(run.model) else None
    if run.writer is None and shared is None:
        return
    progress = {
        "args": vars(run.args),
        "state": state.to_json(),
        "position": Progress.merged([Progress.from_json(one) for one in positions]).to_json(),
        "fingerprint": run.fingerprint,
        "validation_fingerprint": run.validation_fingerprint,
        "tokenizer": run.tokenizer.digest(),
        "processes": run.world.size,
        "wandb_id": run.record.wandb_id,
        "versions": versions(),
        "commit": git_commit(),
    }
    with LongWait(f"saving after update {state.update}"):
        if run.writer is not None:
            run.writer.wait()  # so that only one copy of model and optimizer exists at a time
        in_background = shared is None and not _training_waits(run)
        snapshot = take_snapshot(
            run.model,
            run.updates.optimizer,
            update=state.update,
            progress=progress,
            tokenizer=run.tokenizer.files(),
            copied=in_background,
            world=shared,
        )
        if shared is None:
            assert run.writer is not None
            run.writer.save(snapshot, in_background=in_background)
        else:
            save_together(run.writer, snapshot, save_dir=run.save_dir, world=shared)


def leave_time_to_save(run: Run, *, update_seconds: float) -> None:
    """Makes the run stop so early that one more update and a save end before its time budget does.

    A save counts as long as the last one; before the first, as its bytes on a slow disk take. One that is under way
    has to end first.
    """
    if run.writer is None or run.interruption.deadline == math.inf:
        return
    if run.writer.seconds is None:
        run.writer.seconds = sum(kept_bytes(run.model, run.updates.optimizer).values()) / SLOW_DISK
    run.interruption.margin = update_seconds + run.writer.seconds * (2 if run.writer.busy else 1)


def _training_waits(run: Run) -> bool:
    """Whether a checkpoint is written while training waits: at the end, on a CPU, and without room for a copy."""
    ends = run.stopping or run.state.update == run.args.num_training_steps
    if ends or run.world.device.type == "cpu":
        return True
    free, needed = free_host_memory(), sum(kept_bytes(run.model, run.updates.optimizer).values())
    if free is not None and free < needed:
        logger.warning(f"{free / 1e9:.1f} GB of host memory are free, a copy takes {needed / 1e9:.1f}: training waits")
        return True
    return False


def save_result(run: Run) -> None:
    """Writes SAVE_DIR/model, on the main rank; of a model that is spread over the ranks, from its last checkpoint."""
    spread = is_sharded(run.model)
    checkpoint = last_checkpoint(run) if spread else None
    if run.writer is None:
        return
    if spread and checkpoint is None:
        logger.error(f"{run.save_dir / 'model'} is not written: there is no checkpoint to write it from")
        return
    folder, adapters = run.save_dir / "model", Adapters.of(vars(run.args))
    weights = None if checkpoint is None else open_checkpoint(checkpoint)
    with LongWait(f"writing {folder}"):
        problem = save_model(run.model, folder, tokenizer=run.tokenizer, adapters=adapters, weights=weights)
    if problem:
        logger.warning(f"{folder} has no tokenizer for transformers: {problem}")


def begin(run: Run, start: StartingPoint) -> None:
    """Gives the run the weights, optimizer state and progress of its start. Raises UserError if they do not fit."""
    if start.weights is not None:
        with LongWait(f"reading {start.weights}"):
            load_initial_weights(run.model, start.weights)
        logger.info(f"a new run with the weights of {start.weights}")
    if start.checkpoint is not None:
        _go_on(run, start.checkpoint)
    elif isinstance(run.updates.optimizer, LowRankOptimizer):
        show_first_bases(run.updates.optimizer)


def _go_on(run: Run, checkpoint: Checkpoint) -> None:
    restore(run, checkpoint)
    restore_rng(checkpoint)
    saved, folder = checkpoint.state, checkpoint.folder
    run.state = State.from_json(saved["state"])
    if same_folder(folder.parent, run.save_dir):
        _set_aside(run, later_than=checkpoint)
    run.record.event("resume", update=run.state.update, checkpoint=str(folder))
    logger.info(f"going on from {folder}, after update {run.state.update}")
    if saved["processes"] != run.world.size:
        logger.info(f"the checkpoint is of {saved['processes']} processes, this run of {run.world.size}")


def _set_aside(run: Run, *, later_than: Checkpoint) -> None:
    """Renames later checkpoints in the run's folder: `--resume auto` must not find what this run does not build on."""
    later = [other for other in complete_checkpoints(run.save_dir) if (update_of(other) or 0) > later_than.update]
    for other in later if run.writer is not None else []:
        aside = other.with_name(f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}-{other.name}")
        other.rename(aside)
        logger.warning(f"{other} is later than the checkpoint that the run goes on from: it is now {aside.name}")


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Restores the model and the optimizer from a checkpoint."""
    with LongWait(f"reading {checkpoint.folder.name}"):
        restore_model(run.model, checkpoint)
        names: dict[Tensor, str] = {p: name for name, p in run.model.named_parameters()}
        restore_optimizer(run.updates.optimizer, checkpoint, names=names)


def last_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint of this run, the same on every rank."""
    if run.writer is not None:
        with LongWait("finishing the last save"):
            run.writer.wait()
    run.world.gather(None)  # the other ranks wait here for the main rank
    complete = complete_checkpoints(run.save_dir)
    return complete[-1] if complete else None


def give_up(run: Run, message: str, *, advice: str) -> UserError:
    """The error to raise when all ranks have found that the run cannot go on. Saves a checkpoint first if it can."""
    save(run)
    checkpoint = last_checkpoint(run)
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
    error = UserError(f"{message.removesuffix('.')}. {kept} {advice}".rstrip())
    error.on_one_rank = False
    return error
