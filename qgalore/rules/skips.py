"""Skipped updates: a coin decides for each matrix and update whether its weight moves; moments always take part.

    W <- W - z f lr U        z = 1 with probability 1/2, else 0

The coin is a hash of seed, update and parameter, so all ranks see the same one, and so does a run that goes on. With
z = 0 the weight stays as it is, to the last bit. Weight decay is part of the update: it is skipped and scaled alike.

Source: Joo et al. 2026, "On Surprising Effectiveness of Masking Updates in Adaptive Optimizers", arXiv 2602.15322,
algorithm 1. The whole matrix is a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qgalore.rules.moments import Moment
from qgalore.storage.rounding import mix_seed

MEMORY = 0.9  # decay rate of the alignment
TEMPERATURE = 2.0
MIN_NORM = 1e-30  # the norm of a gradient or momentum below which it has no direction


@dataclass(frozen=True)
class Skip:
    """One row of the table."""

    title: str = ""  # its name in the log
    flips: bool = False  # whether a coin is flipped
    factor: float = 1.0  # f, if it is fixed
    remembers: str | None = None  # the name in a parameter's state of the alignment, which f is then; see `align`

    def lr(self, lr: float, *, seed: int) -> float | None:
        """The step size of an update; None where the weight stays. seed: 64 bits for this update and parameter."""
        stays = lr == 0 or (self.flips and mix_seed(seed) >> 63)
        return None if stays else lr * self.factor


def align(R: Tensor, M: Moment, s: Tensor) -> Tensor:
    """The factor f of Magma: how well gradients have lately agreed with their momentum. (1,)

        s <- 0.9 s + 0.1 sigmoid(cos(M, R) / 2)

    R: the gradient, as the rule sees it, float32 or wider.
    M: its momentum after this update, as many elements.
    s: (1,) R's dtype, written in place. 0 means that there is none yet: the first value is then taken as it is,
        which is our choice: it needs no correction of a bias.
    """
    r, m = (X / torch.linalg.vector_norm(X).clamp_min(MIN_NORM) for X in (R.flatten(), M.read().flatten()))
    fresh = torch.sigmoid((r * m).sum() / TEMPERATURE)
    s.copy_(torch.where(s > 0, MEMORY * s + (1 - MEMORY) * fresh, fresh))
    return s


SKIPS = {
    "none": Skip(),
    "skip": Skip("SkipUpdate", flips=True, factor=2.0),
    "magma": Skip("Magma", flips=True, remembers="alignment"),
}
