"""What the projection leaves out of a gradient, brought back into the update.

    U = back(D) + k * phi * (G - back(R))       phi_j = ||D_j|| / ||R_j||      j: along the side that is not projected

phi scales the rest of each row (or column) of G as the rule has scaled its projection; D is the rule's direction for R.
k <= 1 is the limiter: from one update to the next, the norm of the second term grows by 1% at most.
Source: Chen et al. 2024, "Fira", arXiv 2410.01623, sections 4.1 and 4.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qgalore.subspace.projector import Projector

RESIDUALS = ("none", "fira")
MOST_GROWTH = 1.01
SMALLEST = 1e-30  # a row of R whose norm is smaller says nothing of the scale of D


class Residual(NamedTuple):
    """G: the whole gradient, (m, n).  norm: of the residual in the last update, kept in the state, written in place; 0:
    there was none. () float32"""

    G: Tensor
    norm: Tensor


def recover(D: Tensor, R: Tensor, residual: Residual, *, projector: Projector, bases: dict[str, Tensor]) -> Tensor:
    """U, see above; remembers the norm. D, R (m, r) or (r, n), float32 or wider -> (m, n), their dtype.

    back(D) + k phi (G - back(R)) is back(D - k phi R) + k phi G: apart from U, one matrix of G's size at a time, for
    the norm.
    """
    G, last = residual
    across = 1 if "right" in projector.sides else 0  # the dimension that is projected
    r, d = (torch.linalg.vector_norm(X, dim=across, keepdim=True) for X in (R, D))  # (m, 1) or (1, n)
    phi = torch.where(r > SMALLEST, d / r, 0.0)
    left_out = projector.back(R, bases, like=G).neg_().add_(G)  # (m, n)
    norm = torch.linalg.vector_norm(phi * torch.linalg.vector_norm(left_out, dim=across, keepdim=True))
    del left_out
    limit = torch.where(last > 0, MOST_GROWTH * last, torch.inf)
    allowed = torch.minimum(norm, limit)
    phi = phi * (allowed / norm.clamp_min(SMALLEST))
    last.copy_(allowed)
    return projector.back(D - phi * R, bases, like=G).addcmul_(phi, G.to(D.dtype))
