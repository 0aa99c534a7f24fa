"""Lifts: free functions from a direction in the subspace to an update of the weight, and their table.

An update of the weight is

    U = back(D') + phi * G        back(D) = P D Q^T

so a lift is two things: D', a direction in the subspace, and phi, factors on the rows or columns of the gradient. Both
are small, and U itself (m, n) is made a few rows at a time, where it is written. Every lift takes the same arguments:

    D, R    (m, r) or (r, n), float32 or wider: the direction that a rule made of R = project(G), and R
    G       (m, n), the whole gradient in the parameter's dtype; None unless the lift needs it
    way     the way back

and returns (D', phi): D' like D, or None for zero; phi (m, 1), (1, n) or (1,), or None for zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore.subspace.projector import Projector

MAX_GROWTH = 1.01  # largest growth of a limited norm from one update to the next
MIN_NORM = 1e-30  # the norm below which a row of R does not count

Lifted = tuple[Tensor | None, Tensor | None]  # D' and phi


class Way(NamedTuple):
    """The way back out of a subspace."""

    projector: Projector
    bases: Mapping[str, Tensor]  # the values of the bases, by side
    last: Tensor | None = None  # (1,): the norm that the lift keeps, written in place; 0 before the first update

    def back(self, D: Tensor, rows: slice | None = None) -> Tensor:  # compiled by torch 2.11: no slice as a default
        """P D Q^T, or some of its rows. (m, n)"""
        return self.projector.back(D, self.bases, rows=rows)


@dataclass(frozen=True)
class Lift:
    """One row of the table."""

    function: Callable[..., Lifted]  # (D, R, G, way) -> (D', phi), see above
    needs_whole: bool = False  # whether it needs G
    remembers: str | None = None  # the name in a parameter's state of the norm that it keeps, if it keeps one


def bring_back(D: Tensor, R: Tensor, G: Tensor | None, way: Way) -> Lifted:
    """U = P D Q^T. Source: Zhao et al. 2024, GaLore, arXiv 2403.03507, algorithm 2."""
    return D, None


def recover_residual(D: Tensor, R: Tensor, G: Tensor, way: Way) -> Lifted:
    """Adds what the projection leaves out of G to the update.

        U = back(D) + k * phi * (G - back(R))       phi_j = ||D_j|| / ||R_j||      j: along the side not projected

    phi scales the rest of each row (or column) of G as the rule has scaled its projection. k <= 1 is the limiter: from
    one update to the next, the norm of the second term grows by 1% at most.
    Source: Chen et al. 2024, "Fira", arXiv 2410.01623, sections 4.1 and 4.2.

    It is back(D - k phi R) + k phi G.
    """
    phi, across = scaling(D, R, way)  # (m, 1) or (1, n)
    phi = phi * limiter(torch.linalg.vector_norm(phi * left_out(R, G, way, across=across)), way)
    return D - phi * R, phi


def left_out(R: Tensor, G: Tensor, way: Way, *, across: int) -> Tensor:
    """The norms of the rows, or columns, of G - back(R). (m, 1) or (1, n)

    across: the dimension of the sums, the projected one.

    For row j and the basis P of its side, ||G_j - R_j P^T||^2 = ||G_j||^2 - 2 <G_j P, R_j> + <R_j P^T P, R_j>, and
    G_j P is R_j: no matrix of G's size is made. A packed or learning basis is not orthonormal, so P^T P stays.
    """
    (P,) = (basis.to(R.dtype) for basis in way.bases.values())
    gram = P.mT @ P  # (r, r)
    back_and_forth = R @ gram if across == 1 else gram @ R
    whole = torch.linalg.vector_norm(G, dim=across, keepdim=True, dtype=R.dtype)
    kept = (R * (2 * R - back_and_forth)).sum(across, keepdim=True)
    return (whole.square() - kept).clamp_min(0).sqrt()


def scale_gradient(D: Tensor, R: Tensor, G: Tensor, way: Way, *, alpha: float | None = None) -> Lifted:
    """Scales each row or column j of G by ||D_j|| / ||R_j||, as the rule has scaled its sketch. The norm is limited.

    alpha: if given, all of G is scaled by alpha ||D|| / ||R||, as in APOLLO-Mini, whose sketch has rank 1.
    Source: Zhu et al. 2024, "APOLLO", arXiv 2412.05270, algorithm 1 and section 4.2.
    """
    phi, across = scaling(D, R, way)
    if alpha is not None:
        phi = alpha * torch.linalg.vector_norm(D) / torch.linalg.vector_norm(R).clamp_min(MIN_NORM)
    norms = torch.linalg.vector_norm(G, dim=across, keepdim=True, dtype=D.dtype)
    return None, phi * limiter(torch.linalg.vector_norm(phi * norms), way)


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
