"""Bad numbers: how many updates were lost to them, and whether a loss is a spike."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW = 128  # losses that a new one is compared with
MIN_LOSSES = 32  # losses below which there is no telling
TO_SIGMA = 1.4826  # standard deviations of a normal distribution to its median absolute deviation


@dataclass
class Health:
    """What has gone wrong so far.

    bad_updates: number of updates skipped because a gradient or the loss was not finite.
    bad_in_a_row: how many of them came last, without a good one since.
    bad_documents: number of documents that could not be read.
    rollbacks: how often the run went back to a checkpoint.
    rollbacks_since_save: how often it went back to the last one.
    losses: the losses of the last WINDOW good updates.
    """

    bad_updates: int = 0
    bad_in_a_row: int = 0
    bad_documents: int = 0
    rollbacks: int = 0
    rollbacks_since_save: int = 0
    losses: list[float] = field(default_factory=list)

    def note(self, loss: float, *, bad: bool) -> None:
        """Counts one more update. Its loss is kept unless the update was skipped as bad."""
        self.bad_updates += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if not bad:
            self.losses = [*self.losses, loss][-WINDOW:]


def is_spike(loss: float, *, losses: Sequence[float], factor: float) -> bool:
    """Whether a loss lies more than `factor` robust standard deviations above the median of the losses before it.

    The deviation is the median absolute one, so that earlier spikes do not hide this one; at least a thousandth of the
    median, so that a loss which hardly moves has no spikes of nothing. factor 0: never.
    """
    if not factor or len(losses) < MIN_LOSSES:
        return False
    middle = median(losses)
    deviation = TO_SIGMA * median(abs(other - middle) for other in losses)
    return loss > middle + factor * max(deviation, 1e-3 * abs(middle))
