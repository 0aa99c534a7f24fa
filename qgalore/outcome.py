"""What came of an update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What an update found.

    norm: norm of all gradients together, before clipping.
    bad: the parameters whose gradients were not finite.

    A whole-model update with a bad gradient is not done at all; in an update per layer, bad parameters stay as they
    were and the others have moved.
    """

    norm: float
    bad: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, norms: Mapping[Tensor, Tensor]) -> "Outcome":
        """From the norm of each parameter's gradient, a 0-d tensor. Waits for the device once, twice if any is bad."""
        if not norms:
            return cls(0.0)
        stacked = torch.stack([norm.double() for norm in norms.values()])  # float64: squares of float32 fit
        norm = float(stacked.norm())
        if math.isfinite(norm):
            return cls(norm)
        finite = stacked.isfinite().tolist()
        return cls(norm, tuple(p for p, fine in zip(norms, finite, strict=True) if not fine))
