"""What bases learn from every gradient, not from that of a refresh alone.

    OnlinePca    the basis itself: one step of descent an update
    Average      the average of G G^T P: the next refresh orthonormalizes it

Both are stored tensors with an update of their own, the one of any weight: nothing is written for a gradient that is
not finite, the noise of rounding is that of the update, and compiled code is the same. Both need the whole gradient.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qgalore.options import learner_group
from qgalore.rules.moments import MomentKind, moment_codec
from qgalore.storage.stored import Codec, Stored, find, part_key, put
from qgalore.subspace.bases import norm_of, product
from qgalore.subspace.online_pca import pca_gradient
from qgalore.subspace.projector import LEARNERS
from qgalore.subspace.schedule import MEMORY
from qgalore.update import BasisUpdate, ParameterUpdate


def create_learner(of: ParameterUpdate) -> BasisUpdate | None:
    """What the basis of a parameter learns from every gradient; None if it does not."""
    if of.projector.learns:
        return OnlinePca(of)
    return Average(of) if of.projector.averages else None


class OnlinePca(BasisUpdate):
    """The updates of a basis by online PCA: a weight that is not projected, with moments of its own."""

    def __init__(self, of: ParameterUpdate) -> None:
        learner = LEARNERS[of.group["proj_type"]]
        super().__init__(of, group=learner_group(rule=learner.rule, state_bits=learner.bits, eps=of.group["eps"]))

    def learn(self, G: Tensor, R: Tensor) -> None:
        """One step of online PCA, but none from the gradient that the first basis came from.

        Its step size follows the learning rate's schedule.
        """
        if self.of.steps == 1:
            return
        options, basis = self.of.group, self.of.projector.open(self.state)[self.side]
        G, R = self.facing(G, R)
        gradient = pca_gradient(G, R, basis.read(R.dtype), reg=options["proj_reg"])
        peak = 1 / options["update_proj_gap"] if options["proj_lr"] is None else options["proj_lr"]
        self.group["lr"] = peak * (options["lr"] / options["peak_lr"] if options["peak_lr"] else 1.0)
        self._run(gradient, basis)


class Average(BasisUpdate):
    """The average of G G^T P over the updates (of G^T G Q on the right side), and the basis that follows from it.

        S <- b S + (1 - b) G R^T / ||R||^2       R = P^T G, b = 1 - 1 / min(gap, MEMORY)

    This is the update of a weight S by descent, with the gradient -G R^T / ||R||^2, a step size of 1 - b and a weight
    decay of 1. R is there already, so it costs one product. Divided by ||R||^2 every gradient counts alike.

    S is in the state as `right.average` or `left.average`, in 8 bits where moments are in 8 or 4. A refresh turns the
    columns of the basis a little; carrying S over as the moments are changes nothing that could be measured. A longer
    memory follows a turning subspace too late, a shorter one keeps noise (docs/notebook.md, "Bases from an average").
    """

    def __init__(self, of: ParameterUpdate) -> None:
        group: dict[str, Any] = learner_group(rule="descent", state_bits=32, eps=of.group["eps"])
        super().__init__(of, group=group | {"weight_decay": 1.0})
        self.rule = replace(self.rule, separable=None)  # rows of S may lie across the blocks of its codec

    def learn(self, G: Tensor, R: Tensor) -> None:
        """Adds G R^T / ||R||^2 to the average."""
        self.group["lr"] = 1 / min(self.of.projector.schedule.gap, MEMORY)
        G, R = self.facing(G, R)
        norm = norm_of(R, shard=None)
        gradient = product(G.mT, R / norm).div_(-norm)
        gradient.add_(norm * 0)  # an infinite norm would pass for a G of zeros
        self.create_moments(R.dtype, device=R.device)
        self._run(gradient, self._open())

    def average(self) -> Tensor | None:
        """S in float32 or wider, (m or n, r); None before the first update that counts."""
        return self._open().read(self.of.projector.wide) if self.steps else None

    def create_moments(self, dtype: torch.dtype, *, device: torch.device) -> None:
        """Puts S, of zeros, into the state if it is not there yet."""
        if part_key(self._name, self._codec.PARTS[0]) not in self.state:
            put(self.state, self._name, Stored.zeros(self._codec, self.projector.shape, device=device))

    @property
    def _name(self) -> str:
        return f"{self.prefix}average"

    @property
    def _codec(self) -> Codec:
        kind = MomentKind("average", True, self.projector.shape)
        bits = 32 if self.of.group["state_bits"] == 32 else 8
        return moment_codec(kind, bits=bits, dtype=self.of.projector.wide)

    def _open(self) -> Stored:
        return find(self.state, self._name, codec=self._codec, shape=self.projector.shape)
