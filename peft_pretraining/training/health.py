"""Bad numbers: how many updates were lost to them, and whether a loss is a spike."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW = 128  # number of earlier losses that a new loss is compared with
MIN_LOSSES = 32  # with fewer earlier losses, no loss counts as a spike
TO_SIGMA = 1.4826  # standard deviation over median absolute deviation, for a normal distribution


@dataclass
class Health:
    """What has gone wrong so far."""

    bad_updates: int = 0  # updates that were skipped because a gradient or the loss was not finite
    bad_in_a_row: int = 0  # length of the unbroken series of skipped updates that ends with the latest update
    bad_documents: int = 0  # documents that could not be read, each counted once, in whatever epoch
    bad_document_ids: list[str] = field(default_factory=list)  # hashes that tell them apart
    rollbacks: int = 0  # times that the run went back to a checkpoint
    rollbacks_since_save: int = 0  # times that the run went back to the latest checkpoint
    losses: list[float] = field(default_factory=list)  # losses of the last WINDOW good updates

    def note(self, loss: float, *, bad: bool) -> None:
        """Counts one more update. Its loss is kept unless the update was skipped as bad."""
        self.bad_updates += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if not bad:
            self.losses = [*self.losses, loss][-WINDOW:]


def is_spike(loss: float, *, losses: Sequence[float], factor: float) -> bool:
    """Whether a loss lies more than `factor` robust standard deviations above the median of the losses before it.

    The deviation is the median absolute one, so that earlier spikes do not hide a new one. It is at least a thousandth
    of the median, so that noise in a loss which hardly moves is not a spike. With factor 0, nothing is a spike.
    """
    if not factor or len(losses) < MIN_LOSSES:
        return False
    middle = median(losses)
    deviation = TO_SIGMA * median(abs(other - middle) for other in losses)
    return loss > middle + factor * max(deviation, 1e-3 * abs(middle))
