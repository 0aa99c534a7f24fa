"""What follows from an update that went wrong: it is skipped, or the run goes back to a checkpoint, or it ends."""

import hashlib
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

MAX_ROLLBACKS = 5  # to one checkpoint: spikes that come again on other data are not due to the data


def react(run: Run, *, loss: float, outcome: Outcome, skipped: Sequence[str], bad_documents: bool) -> None:
    """Reacts to an update that went wrong; does nothing after a good one. Raises UserError after too many bad ones.

    loss: loss of the update, over all ranks.
    outcome: what the optimizer says about the update.
    skipped: one line for each document that this rank could not read for this update.
    bad_documents: whether any rank skipped one.
    """
    health = run.state.health
    if bad_documents:
        _count_bad_documents(run, skipped)
    spike = is_spike(loss, losses=health.losses, factor=run.args.spike_rollback)
    bad = bool(outcome.bad) or not math.isfinite(loss)
    health.note(loss, bad=bad)
    if bad:
        _report_bad_update(run, loss=loss, outcome=outcome)
    elif spike:
        _roll_back(run, loss=loss)


def _count_bad_documents(run: Run, skipped: Sequence[str]) -> None:
    """Counts the documents of all ranks that were not counted in an earlier epoch."""
    health = run.state.health
    ids = [hashlib.blake2b(line.encode(), digest_size=8).hexdigest() for line in skipped]
    found = [one for rank in run.world.gather(ids) for one in rank]
    new = sorted(set(found) - set(health.bad_document_ids))
    health.bad_document_ids += new
    health.bad_documents += len(new)
    run.record.event("bad_documents", update=run.state.update, skipped=len(found), total=health.bad_documents)
    if health.bad_documents > run.args.max_bad_documents:
        advice = "Repair the data, or raise --max_bad_documents."
        raise give_up(run, f"{health.bad_documents} documents could not be read (see above)", advice=advice)


def _report_bad_update(run: Run, *, loss: float, outcome: Outcome) -> None:
    state, limit = run.state, run.args.max_bad_updates
    names = [name for name, p in run.model.named_parameters() if any(p is bad for bad in outcome.bad)]
    run.record.event("bad_update", update=state.update, loss=loss, parameters=names)
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    cause = f"the gradient of {names[0]}{others} is not finite" if names else f"the loss is {loss}"
    logger.warning(f"update {state.update} skipped: {cause}")
    if state.health.bad_in_a_row >= limit:
        advice = "A lower --lr or --grad_clipping 1.0 may help."
        raise give_up(run, f"{limit} updates in a row were skipped, the last because {cause}", advice=advice)


def _roll_back(run: Run, *, loss: float) -> None:
    """Undoes all updates since the last checkpoint. The data is not rewound, so the next updates see other data."""
    state, folder = run.state, last_checkpoint(run)
    if folder is None:
        logger.warning(f"update {state.update}: loss {loss:.4f} is a spike, but there is no checkpoint to go back to")
        return
    if state.health.rollbacks_since_save == MAX_ROLLBACKS:
        raise UserError(
            f"the loss has spiked {MAX_ROLLBACKS + 1} times after {folder}, on different data. A lower --lr or "
            "--grad_clipping 1.0 may help; or raise --spike_rollback."
        )
    checkpoint = Checkpoint.open(folder)
    restore(run, checkpoint)
    saved = State.from_json(checkpoint.state["state"])
    health = replace(
        state.health,
        losses=saved.health.losses,
        rollbacks=state.health.rollbacks + 1,
        rollbacks_since_save=state.health.rollbacks_since_save + 1,
    )
    run.state = replace(
        saved, health=health, seconds=state.seconds, epoch=state.epoch, position=state.position, began=state.began
    )
    run.record.event("rollback", update=state.update, loss=loss, to=saved.update)
    logger.warning(f"update {state.update}: loss {loss:.4f} is a spike; back to {folder}, and on with other data")
