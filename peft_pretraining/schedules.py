"""The learning rate as a pure function of the update: nothing to save, nothing to resume."""

import difflib
import math

from peft_pretraining.errors import UserError

SCHEDULERS = ("linear", "cosine", "cosine_restarts")


def lr_ratio(
    update: int,
    *,
    scheduler: str,
    num_training_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    cycle_length: int | None = None,
    restart_warmup_steps: int = 0,
) -> float:
    """The learning rate of an update over the peak learning rate, in [0, 1].

    update: 1-based number of the update. The warm-up climbs in equal steps from 1 / warmup_steps at update 1 to 1 at
        update warmup_steps. From there the rate decays (linear or cosine) to exactly min_lr_ratio at update
        num_training_steps. A warm-up as long as the run ends at 1.

    With cosine_restarts (ReLoRA, Lialin et al. 2023, arXiv 2307.05695), the cosine of the whole run is an envelope.
    Each time cycle_length updates are done, the next restart_warmup_steps updates climb in equal steps, from one step
    above 0 to the envelope. No restart begins inside the warm-up, and none whose climb the run would cut off.
    """
    assert update >= 1, f"updates are counted from 1, not {update}"
    if update <= warmup_steps:
        return update / warmup_steps
    decay_steps = num_training_steps - warmup_steps

    def decayed(at: int) -> float:
        progress = min((at - warmup_steps) / decay_steps, 1.0) if decay_steps else 1.0
        left = 1 - progress if scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return min_lr_ratio + (1 - min_lr_ratio) * left

    if scheduler == "cosine_restarts":
        assert cycle_length is not None, "check_schedule refuses this"
        restart = (update - 1) // cycle_length * cycle_length  # the last update before this cycle
        climbed, top = update - restart, restart + restart_warmup_steps
        if climbed < restart_warmup_steps and warmup_steps <= restart and 0 < restart and top < num_training_steps:
            return climbed / restart_warmup_steps * decayed(top)
    return decayed(update)


def check_schedule(
    *,
    scheduler: str,
    num_training_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    cycle_length: int | None = None,
    restart_warmup_steps: int = 0,
) -> None:
    """Raises UserError, which names the flags, if lr_ratio cannot do what these arguments ask for."""
    if scheduler not in SCHEDULERS:
        close = difflib.get_close_matches(scheduler, SCHEDULERS, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown --scheduler {scheduler!r}. {hint}Known: {', '.join(SCHEDULERS)}.")
    if num_training_steps < 1:
        raise UserError(f"--num_training_steps {num_training_steps}: at least 1 update is needed.")
    if not 0 <= warmup_steps <= num_training_steps:
        raise UserError(
            f"--warmup_steps {warmup_steps} must lie between 0 and --num_training_steps {num_training_steps}. "
            f"Try {num_training_steps // 10}."
        )
    if not 0 <= min_lr_ratio <= 1:
        raise UserError(
            f"--min_lr_ratio {min_lr_ratio} must lie between 0 and 1: it is the last rate over the peak rate."
        )
    if scheduler == "cosine_restarts":
        _check_restarts(cycle_length, restart_warmup_steps)
    elif cycle_length is not None or restart_warmup_steps:
        flag = "--restart_warmup_steps" if cycle_length is None else "--cycle_length"
        raise UserError(f"{flag} has no effect with --scheduler {scheduler}. Use cosine_restarts, or leave it out.")


def _check_restarts(cycle_length: int | None, restart_warmup_steps: int) -> None:
    if cycle_length is None:
        raise UserError("--scheduler cosine_restarts needs --cycle_length, the number of updates between restarts.")
    if cycle_length < 2:
        raise UserError(f"--cycle_length {cycle_length} is too short to restart in: at least 2 updates are needed.")
    if restart_warmup_steps < 1:
        raise UserError(
            f"--restart_warmup_steps {restart_warmup_steps}: nothing would restart. Give at least 1, or use "
            "--scheduler cosine."
        )
    if restart_warmup_steps >= cycle_length:
        raise UserError(
            f"--restart_warmup_steps {restart_warmup_steps} must be below --cycle_length {cycle_length}. "
            f"Try {max(1, cycle_length // 10)}."
        )
