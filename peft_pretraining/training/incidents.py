"""What follows from an update that went wrong: it is skipped, or the run goes back to a checkpoint, or it ends."""

import math
from collections.abc import Sequence
from dataclasses import replace

from loguru import logger

from peft_pretraining.checkpoint.files import Checkpoint
from peft_pretraining.errors import UserError
from peft_pretraining.training.health import is_spike
from peft_pretraining.training.run import Run, State
from peft_pretraining.training.saving import give_up, last_checkpoint, restore
from qgalore.outcome import Outcome

MAX_ROLLBACKS = 5  # to one checkpoint: spikes that come again whatever the data are no accident


def react(run: Run, *, loss: float, outcome: Outcome, bad_documents: int) -> None:
    """Does what follows from an update that went wrong; nothing after a good one. Raises UserError after too many.

    loss: that of the update, over all ranks.
    bad_documents: how many documents could not be read on the way to it, over all ranks.
    """
    health = run.state.health
    if bad_documents:
        count_bad_documents(run, bad_documents)
    spike = is_spike(loss, losses=health.losses, factor=run.args.spike_rollback)
    bad = bool(outcome.bad) or not math.isfinite(loss)
    health.note(loss, bad=bad)
    if bad:
        names = [name for name, p in run.model.named_parameters() if any(p is other for other in outcome.bad)]
        report_bad_update(run, loss=loss, names=names)
    elif spike:
        roll_back(run, loss=loss)


def count_bad_documents(run: Run, skipped: int) -> None:
    """Records that documents were skipped. Raises UserError, having saved the run, where they are too many."""
    health = run.state.health
    health.bad_documents += skipped
    run.record.event("bad_documents", update=run.state.update, skipped=skipped, total=health.bad_documents)
    if health.bad_documents > run.args.max_bad_documents:
        advice = "Mend the data, or raise --max_bad_documents."
        raise give_up(run, f"{health.bad_documents} documents could not be read (see above)", advice=advice)


def report_bad_update(run: Run, *, loss: float, names: Sequence[str]) -> None:
    """Says that an update was skipped, and why. Raises UserError where it is the last of too many."""
    state, limit = run.state, run.args.max_bad_updates
    run.record.event("bad_update", update=state.update, loss=loss, parameters=names)
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    cause = f"the gradient of {names[0]}{others} is not finite" if names else f"the loss is {loss}"
    logger.warning(f"update {state.update} skipped: {cause}")
    if state.health.bad_in_a_row >= limit:
        advice = "A lower --lr or --grad_clipping 1.0 may help."
        raise give_up(run, f"{limit} updates in a row were skipped, the last because {cause}", advice=advice)


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
    run.state = _state_before(run, Checkpoint.open(checkpoint))
    run.record.event("rollback", update=state.update, loss=loss, to=run.state.update)
    logger.warning(f"update {state.update}: loss {loss:.4f} is a spike; back to {checkpoint}, on with other data")


def _state_before(run: Run, checkpoint: Checkpoint) -> State:
    """Restores the weights and the optimizer; returns the checkpoint's state, but where the data is now."""
    restore(run, checkpoint)
    state, saved = run.state, State.from_json(checkpoint.state["state"])
    health = replace(
        state.health,
        losses=saved.health.losses,
        rollbacks=state.health.rollbacks + 1,
        rollbacks_since_save=state.health.rollbacks_since_save + 1,
    )
    return replace(
        state,
        update=saved.update,
        tokens_seen=saved.tokens_seen,
        saved=saved.update,
        evaluated=saved.evaluated,
        evaluation=saved.evaluation,
        health=health,
    )
