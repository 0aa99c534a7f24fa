"""From a direction in the subspace back to an update of the weight: free functions, and a table of what each needs.

D is what a rule made of R = project(G). Every lift takes the same arguments:

    D, R    (m, r) or (r, n), float32 or wider; R before the rule
    G       (m, n), the whole gradient, in the parameter's dtype; None for lifts that do not need it
    way     how to get back

and returns U (m, n) in D's dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore.storage.stored import Stored
from qgalore.subspace.projector import Projector

MAX_GROWTH = 1.01  # of a limited norm, from one update to the next
MIN_NORM = 1e-30  # a row of R whose norm is smaller says nothing of the scale of D


class Way(NamedTuple):
    """The way back out of a subspace.

    projector, bases: see subspace.projector.
    last: (), float32: the norm that the lift remembers from update to update, written in place; 0: none yet.
    """

    projector: Projector
    bases: Mapping[str, Stored]
    last: Tensor | None = None

    def back(self, D: Tensor) -> Tensor:
        """P D Q^T. (m, n)"""
        return self.projector.back(D, self.bases)


@dataclass(frozen=True)
class Lift:
    """One entry of the table.

    function: (D, R, G, way) -> U, see above.
    needs_whole: whether it needs G.
    remembers: the name of its norm in a parameter's state; None where it has none.
    """

    function: Callable[..., Tensor]
    needs_whole: bool = False
    remembers: str | None = None


def bring_back(D: Tensor, R: Tensor, G: Tensor | None, way: Way) -> Tensor:
    """U = P D Q^T. Source: Zhao et al. 2024, GaLore, arXiv 2403.03507, algorithm 2."""
    return way.back(D)


def recover_residual(D: Tensor, R: Tensor, G: Tensor, way: Way) -> Tensor:
    """What the projection leaves out of G, brought back into the update.

        U = back(D) + k * phi * (G - back(R))       phi_j = ||D_j|| / ||R_j||      j: along the side not projected

    phi scales the rest of each row (or column) of G as the rule has scaled its projection. k <= 1 is the limiter: from
    one update to the next, the norm of the second term grows by 1% at most.
    Source: Chen et al. 2024, "Fira", arXiv 2410.01623, sections 4.1 and 4.2.

    back(D) + k phi (G - back(R)) is back(D - k phi R) + k phi G: apart from U, one matrix of G's size at a time, for
    the norm.
    """
    phi, across = scaling(D, R, way)  # (m, 1) or (1, n)
    left_out = way.back(R).neg_().add_(G)  # (m, n)
    norm = torch.linalg.vector_norm(phi * torch.linalg.vector_norm(left_out, dim=across, keepdim=True))
    del left_out
    phi = phi * limiter(norm, way)
    return way.back(D - phi * R).addcmul_(phi, G.to(D.dtype))


def scale_gradient(D: Tensor, R: Tensor, G: Tensor, way: Way, *, alpha: float | None = None) -> Tensor:
    """G, each row or column j scaled by ||D_j|| / ||R_j||, as the rule has scaled its sketch. The norm is limited.

    alpha: scales all of G by alpha ||D|| / ||R|| instead, as APOLLO-Mini does, whose sketch has rank 1.
    Source: Zhu et al. 2024, "APOLLO", arXiv 2412.05270, algorithm 1 and section 4.2.
    """
    if alpha is None:
        phi, _ = scaling(D, R, way)
    else:
        phi = alpha * torch.linalg.vector_norm(D) / torch.linalg.vector_norm(R).clamp_min(MIN_NORM)
    U = phi * G  # (m, n)
    return U.mul_(limiter(torch.linalg.vector_norm(U), way))


def scaling(D: Tensor, R: Tensor, way: Way) -> tuple[Tensor, int]:
    """How much the rule has scaled each row or column of R, ||D_j|| / ||R_j||, (m, 1) or (1, n), and along which
    dimension that was summed: the projected one."""
    across = 1 if "right" in way.projector.sides else 0
    r, d = (torch.linalg.vector_norm(X, dim=across, keepdim=True) for X in (R, D))
    return torch.where(r > MIN_NORM, d / r, 0.0), across


def limiter(norm: Tensor, way: Way) -> Tensor:
    """The factor, at most 1, with which a norm grows by MAX_GROWTH at most; remembers the limited norm."""
    last = way.last
    assert last is not None
    limit = torch.where(last > 0, MAX_GROWTH * last, torch.inf)
    allowed = torch.minimum(norm, limit)
    last.copy_(allowed)
    return allowed / norm.clamp_min(MIN_NORM)


LIFTS = {
    "apollo": Lift(scale_gradient, needs_whole=True, remembers="update_norm"),
    "apollo_mini": Lift(partial(scale_gradient, alpha=128**0.5), needs_whole=True, remembers="update_norm"),
    "none": Lift(bring_back),
    "fira": Lift(recover_residual, needs_whole=True, remembers="residual_norm"),
}
