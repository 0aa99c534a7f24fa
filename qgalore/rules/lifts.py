"""Lifts: free functions from a direction in the subspace to an update of the weight, and their table.

Every lift takes the same arguments:

    D, R    (m, r) or (r, n), float32 or wider: the direction that a rule made of R = project(G), and R
    G       (m, n), the whole gradient in the parameter's dtype; None unless the lift needs it
    way     the way back

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

MAX_GROWTH = 1.01  # largest growth of a limited norm from one update to the next
MIN_NORM = 1e-30  # the norm below which a row of R does not count


class Way(NamedTuple):
    """The way back out of a subspace."""

    projector: Projector
    bases: Mapping[str, Stored]
    last: Tensor | None = None  # () float32: the norm that the lift keeps, written in place; 0 before the first update

    def back(self, D: Tensor) -> Tensor:
        """P D Q^T. (m, n)"""
        return self.projector.back(D, self.bases)


@dataclass(frozen=True)
class Lift:
    """One row of the table."""

    function: Callable[..., Tensor]  # (D, R, G, way) -> U, see above
    needs_whole: bool = False  # whether it needs G
    remembers: str | None = None  # the name in a parameter's state of the norm that it keeps, if it keeps one


def bring_back(D: Tensor, R: Tensor, G: Tensor | None, way: Way) -> Tensor:
    """U = P D Q^T. Source: Zhao et al. 2024, GaLore, arXiv 2403.03507, algorithm 2."""
    return way.back(D)


def recover_residual(D: Tensor, R: Tensor, G: Tensor, way: Way) -> Tensor:
    """Adds what the projection leaves out of G to the update.

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
    """Scales each row or column j of G by ||D_j|| / ||R_j||, as the rule has scaled its sketch. The norm is limited.

    alpha: if given, all of G is scaled by alpha ||D|| / ||R||, as in APOLLO-Mini, whose sketch has rank 1.
    Source: Zhu et al. 2024, "APOLLO", arXiv 2412.05270, algorithm 1 and section 4.2.
    """
    if alpha is None:
        phi, _ = scaling(D, R, way)
    else:
        phi = alpha * torch.linalg.vector_norm(D) / torch.linalg.vector_norm(R).clamp_min(MIN_NORM)
    U = phi * G  # (m, n)
    return U.mul_(limiter(torch.linalg.vector_norm(U), way))


def scaling(D: Tensor, R: Tensor, way: Way) -> tuple[Tensor, int]:
    """The factors ||D_j|| / ||R_j|| by which the rule has scaled the rows or columns of R, (m, 1) or (1, n).

    Returns them and the dimension of the sums, which is the projected one.
    """
    across = 1 if "right" in way.projector.sides else 0
    r, d = (torch.linalg.vector_norm(X, dim=across, keepdim=True) for X in (R, D))
    return torch.where(r > MIN_NORM, d / r, 0.0), across


def limiter(norm: Tensor, way: Way) -> Tensor:
    """The factor, at most 1, by which the norm grows by MAX_GROWTH at most. Keeps the limited norm in way.last."""
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
