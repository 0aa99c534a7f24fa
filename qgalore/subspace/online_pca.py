"""A basis that learns: one gradient step an update on how much of the gradient it misses.

    loss(P) = ||G^ - G^ P P^T||_F^2 + reg * ||P^T P - I||_F^2        G^ = G / ||G||_F

Source: Liang et al. 2024, "Memory-Efficient LLM Training with Online Subspace Descent", arXiv 2408.12857. The paper's
reg is 0.1; its code leaves the second term out. A rule makes the gradient a step, see projector.LEARNERS.
"""

import torch
from torch import Tensor

SMALLEST_NORM = 1e-18  # of G: below, its square is no float32; such a gradient counts for less than one of norm 1


def pca_gradient(G: Tensor, R: Tensor, P: Tensor, *, reg: float) -> Tensor:
    """The gradient of the loss above with respect to P, in P's dtype. (n, r)

    G: (m, n), any floating dtype.
    R: G @ P, (m, r), float32 or wider.
    P: (n, r), R's dtype.
    For a basis of the left side pass G.mT and R.mT. The result is not finite if the norm of G is not.

    With R^ = G^ P and S = G^^T R^ it is -2 [2 S - S (P^T P) - P (R^^T R^)] + 4 reg P (P^T P - I): one product with G,
    two of (n, r) by (r, r), and nothing of G's size, where autograd would build the (n, n) projector and the (m, n)
    residual.
    """
    norm = torch.linalg.vector_norm(G, dtype=R.dtype)
    scale = norm.clamp_min(SMALLEST_NORM)
    R = R / scale
    S = (G.mT @ R.to(G.dtype)).to(R.dtype).div_(scale)  # (n, r)
    gram = P.mT @ P  # (r, r)
    energy = P.mT @ S if len(P) < len(R) else R.mT @ R  # (r, r), the same: by the shorter of the two
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    slope = S @ (2 * gram - 4 * identity) + P @ (2 * energy + 4 * reg * (gram - identity))
    return slope.add_(norm * 0)  # an infinite norm would pass for a G of zeros
