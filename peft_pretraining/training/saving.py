"""Saving a run and getting it back: checkpoints, their restoration, and what follows from an update that went wrong."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loguru import logger
from torch import Tensor

from peft_pretraining.checkpoint.files import Checkpoint, complete_checkpoints
from peft_pretraining.checkpoint.snapshot import restore_model, restore_optimizer, restore_rng, take_snapshot
from peft_pretraining.checkpoint.start import StartingPoint, same_folder
from peft_pretraining.checkpoint.weights import load_initial_weights
from peft_pretraining.errors import UserError
from peft_pretraining.training import report
from peft_pretraining.training.health import is_spike
from peft_pretraining.training.run import Run, State
from qgalore.outcome import Outcome

MAX_ROLLBACKS = 5  # to one checkpoint: spikes that come again whatever the data are no accident


def save(run: Run) -> None:
    """A checkpoint of everything, written in the background; none while updates are being skipped."""
    state = run.state
    if state.saved == state.update:
        return
    if state.health.bad_in_a_row:
        logger.warning(f"no checkpoint after update {state.update}: the last updates were not finite")
        return
    state.saved = state.update
    state.health.rollbacks_since_save = 0
    positions = run.world.gather(state.position)
    if run.writer is not None:
        run.writer.wait()  # so that only one copy of everything exists at a time
        progress = _progress(run, positions)
        run.writer.save(take_snapshot(run.model, run.updates.optimizer, update=state.update, progress=progress))


def _progress(run: Run, positions: list[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint says besides tensors."""
    return {
        "args": vars(run.args),
        "state": run.state.to_json(),
        "positions": positions,
        "fingerprint": run.fingerprint,
        "processes": run.world.size,
        "wandb_id": run.metrics.wandb_id,
        "versions": report.versions(),
        "commit": report.git_commit(),
    }


def begin(run: Run, start: StartingPoint) -> None:
    """Puts weights, optimizer and state where `start` says. Raises UserError where they do not fit."""
    if start.weights is not None:
        load_initial_weights(run.model, start.weights)
        logger.info(f"a new run with the weights of {start.weights}")
    if start.checkpoint is not None:
        _restore(run, start.checkpoint)
        restore_rng(start.checkpoint)
        run.state = State.from_json(start.saved["state"])
        run.state.position = start.saved["positions"][run.world.rank] if _same_ranks(run, start) else {}
        if same_folder(start.checkpoint.folder.parent, run.save_dir):
            _set_aside(run, later_than=start.checkpoint.folder)
        run.metrics.resume(update=run.state.update, checkpoint=str(start.folder))
        logger.info(f"going on from {start.folder}, after update {run.state.update}")
        if not _same_ranks(run, start):
            logger.warning(f"the checkpoint is of {start.saved['processes']} processes, this run of {run.world.size}")


def _set_aside(run: Run, *, later_than: Path) -> None:
    """Later checkpoints in the folder are of a way not taken: --resume auto shall not find them."""
    later = [other for other in complete_checkpoints(run.save_dir) if other.name > later_than.name]
    for other in later if run.writer is not None else []:
        aside = other.with_name(f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}-{other.name}")
        other.rename(aside)
        logger.warning(f"{other} is later than the checkpoint that the run goes on from: it is now {aside.name}")


def _same_ranks(run: Run, start: StartingPoint) -> bool:
    return start.saved["processes"] == run.world.size


def _restore(run: Run, checkpoint: Checkpoint) -> None:
    restore_model(run.model, checkpoint)
    names: dict[Tensor, str] = {p: name for name, p in run.model.named_parameters()}
    restore_optimizer(run.updates.optimizer, checkpoint, names=names)


def react(run: Run, *, loss: float, outcome: Outcome, bad_documents: int) -> None:
    """What follows from an update that went wrong. Raises UserError where too much has."""
    args, health = run.args, run.state.health
    if bad_documents:
        health.bad_documents += bad_documents
        run.metrics.note("bad_documents", update=run.state.update, skipped=bad_documents, total=health.bad_documents)
        if health.bad_documents > args.max_bad_documents:
            advice = "Mend the data, or raise --max_bad_documents."
            raise give_up(run, f"{health.bad_documents} documents could not be read (see above)", advice=advice)
    spike = is_spike(loss, losses=health.losses, factor=args.spike_rollback)
    bad = bool(outcome.bad) or not math.isfinite(loss)
    health.note(loss, bad=bad)
    if bad:
        names = [name for name, p in run.model.named_parameters() if any(p is other for other in outcome.bad)]
        report_bad_update(run, loss=loss, names=names)
    elif spike:
        roll_back(run, loss=loss)


def report_bad_update(run: Run, *, loss: float, names: Sequence[str]) -> None:
    """Says that an update was skipped, and why. Raises UserError where it is the last of too many."""
    state, most = run.state, run.args.max_bad_updates
    run.metrics.note("bad_update", update=state.update, loss=loss, parameters=names)
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    cause = f"the gradient of {names[0]}{others} is not finite" if names else f"the loss is {loss}"
    logger.warning(f"update {state.update} skipped: {cause}")
    if state.health.bad_in_a_row >= most:
        advice = "A lower --lr or --grad_clipping 1.0 may help."
        raise give_up(run, f"{most} updates in a row were skipped, the last because {cause}", advice=advice)


def roll_back(run: Run, *, loss: float) -> None:
    """Undoes all updates since the last checkpoint; the data goes on where it is. Raises UserError if it is in vain."""
    state, checkpoint = run.state, last_checkpoint(run)
    if checkpoint is None:
        logger.warning(f"update {state.update}: loss {loss:.4f} is a spike, but there is no checkpoint to go back to")
        return
    if state.health.rollbacks_since_save == MAX_ROLLBACKS:
        raise UserError(
            f"the loss has spiked {MAX_ROLLBACKS + 1} times after {checkpoint}, on different data. A lower --lr or "
            "--grad_clipping 1.0 may help; or raise --spike_rollback."
        )
    opened = Checkpoint.open(checkpoint)
    _restore(run, opened)
    saved = State.from_json(opened.state["state"])
    health = replace(
        state.health,
        losses=saved.health.losses,
        rollbacks=state.health.rollbacks + 1,
        rollbacks_since_save=state.health.rollbacks_since_save + 1,
    )
    run.state = replace(state, update=saved.update, tokens_seen=saved.tokens_seen, saved=saved.update, health=health)
    run.state.evaluated, run.state.evaluation = saved.evaluated, saved.evaluation
    run.metrics.note("rollback", update=state.update, loss=loss, to=saved.update)
    logger.warning(f"update {state.update}: loss {loss:.4f} is a spike; back to {checkpoint}, on with other data")


def last_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint of this run, the same on every rank."""
    if run.writer is not None:
        run.writer.wait()
    run.world.gather(None)  # until the main rank has waited
    complete = complete_checkpoints(run.save_dir)
    return complete[-1] if complete else None


def give_up(run: Run, message: str, *, advice: str) -> UserError:
    """The error to raise where all ranks have found that the run cannot go on. Saves what can be saved."""
    save(run)
    checkpoint = last_checkpoint(run)
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
    return UserError(f"{message}. {kept} {advice}")
