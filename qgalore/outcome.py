"""The outcome of an update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qgalore.sharding import Shard


@dataclass(frozen=True)
class Outcome:
    """The gradients' norm in an update, and the parameters whose gradients were not finite.

    A whole-model update with a bad gradient is skipped. In an update per layer, bad parameters stay as they were and
    the others have moved.
    """

    norm: float  # of all gradients together, before clipping
    bad: tuple[Tensor, ...] = ()  # parameters whose gradients were not finite

    @classmethod
    def of(cls, norms: Mapping[Tensor, Tensor], *, shard: Shard | None = None) -> "Outcome":
        """The outcome for the gradients' norms, 0-d tensors. Waits for the device once; twice if a norm is bad.

        shard: of one of the parameters, if all are sharded alike; the norms are then those of the rows of this rank.
        """
        if not norms:
            return cls(0.0)
        stacked = torch.stack([norm.double() for norm in norms.values()])  # float64: squares of float32 fit
        stacked = stacked if shard is None else shard.sum(stacked.square()).sqrt()
        norm = float(stacked.norm())
        if math.isfinite(norm):
            return cls(norm)
        finite = stacked.isfinite().tolist()
        return cls(norm, tuple(p for p, fine in zip(norms, finite, strict=True) if not fine))
