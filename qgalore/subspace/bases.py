"""Bases of a gradient's dominant subspace.

G is (m, n); a basis is (m, r) with orthonormal columns that span, exactly or nearly, the leading left singular
directions of G. For the right side pass G.mT. Everything but `exact_basis` sees G only through the products G @ X and
G.mT @ X: they run in G's own dtype, while the small factors (orthogonalisation, rotations) are computed in the dtype of
the basis, float32 or float64.

The columns of G may be spread over ranks: those of G.mT are, where a gradient is sharded over its rows. Then G @ X and
norms are sums over the ranks, G.mT @ X has the rows of this rank, and every rank computes the same basis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qgalore.sharding import Shard


def product(G: Tensor, X: Tensor, *, shard: Shard | None = None) -> Tensor:
    """G @ X in G's dtype, returned in X's. G (m, n), X (n, k) -> (m, k).

    shard: where this rank's columns of G, and rows of X, belong; None if it has all.
    """
    Y = (G @ X.to(G.dtype)).to(X.dtype)
    return Y if shard is None else shard.sum(Y.contiguous())


def norm_of(X: Tensor, *, shard: Shard | None) -> Tensor:
    """The norm of X, which has the rows of this rank, if not all. It can be divided by. ()"""
    norm = X.norm() if shard is None else shard.norm(X.norm())
    return norm.clamp_min(torch.finfo(X.dtype).tiny)


def orthonormalize(Y: Tensor) -> Tensor:
    """An orthonormal basis of Y's columns, by QR with a positive diagonal. (m, k) -> (m, k), k <= m.

    The positive diagonal makes the result unique and continuous: a slowly moving Y gives a slowly moving basis, so the
    optimizer's moments, which live in its coordinates, keep their meaning.
    """
    Q, T = torch.linalg.qr(Y)  # (m, k), (k, k)
    return Q.mul_(torch.where(T.diagonal() < 0, -1.0, 1.0).to(Y.dtype))


def exact_basis(G: Tensor, *, rank: int, shard: Shard | None = None) -> Tensor:
    """The `rank` leading left singular vectors of G, strongest first. (m, n) -> (m, rank) in at least float32.

    By the eigenvectors of the smaller Gram matrix, in float64: several times faster than an SVD, and the squared
    condition number is harmless there. Each vector's largest entry is positive. Source: GaLore, eq. 12-13.
    """
    G64 = G.double()
    tall = G.shape[0] > G.shape[1] and shard is None
    gram = G64.mT @ G64 if tall else product(G64, G64.mT, shard=shard)
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)  # ascending -> strongest first
    U = orthonormalize(G64 @ vectors) if tall else vectors  # (m, rank)
    peak = U.gather(0, U.abs().argmax(0, keepdim=True))  # (1, rank)
    return (U * torch.where(peak < 0, -1.0, 1.0)).to(torch.promote_types(G.dtype, torch.float32))


def randomized_basis(
    G: Tensor,
    *,
    rank: int,
    seed: int,
    oversampling: int = 8,
    power_iterations: int = 2,
    shard: Shard | None = None,
) -> Tensor:
    """Nearly the `rank` leading left singular vectors of G, without a starting point. (m, n) -> (m, rank).

    A randomized range finder with power iterations, then Rayleigh-Ritz, which orders the columns by strength.
    seed: 64 bits, decides the random start.
    Source: Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.3.
    """
    columns = G.shape[1] if shard is None else shard.whole[0]
    width = min(rank + oversampling, G.shape[0], columns)
    Y = gaussian_matrix(columns, width, seed=seed, like=G)  # (n, width)
    Y = Y if shard is None else Y[shard.start : shard.start + shard.shape[0]]
    Q = orthonormalize(product(G, Y, shard=shard))  # (m, width)
    for _ in range(power_iterations):
        Q = iterate_basis(G, Q, shard=shard)
    B = product(G.mT, Q)  # (n, width), the gradient seen from Q
    B = B / norm_of(B, shard=shard)
    # In float32, squares of directions below 3e-4 of the strongest would be noise, and so would their rotation. Adam
    # gives every coordinate the same size, so the last bit of a gradient would decide an update: docs/notebook.md.
    gram = product(B.double().mT, B.double(), shard=shard)
    rotation = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)  # (width, rank)
    return Q @ rotation.to(Q.dtype)


def iterate_basis(G: Tensor, basis: Tensor, *, shard: Shard | None = None) -> Tensor:
    """One step of orthogonal iteration from a good starting point: orth(G G^T P). (m, n), (m, r) -> (m, r).

    Source: Golub and Van Loan, Matrix Computations, section 7.3.2 ("orthogonal iteration").
    """
    Z = product(G.mT, basis)  # (n, r)
    Z.div_(norm_of(Z, shard=shard))  # G may be tiny: its square must not underflow
    return orthonormalize(product(G, Z, shard=shard))


def align(target: Tensor, *, basis: Tensor) -> Tensor:
    """The same subspace, its columns rotated to match those of `basis` as well as they can. (m, r), (m, r) -> (m, r).

    Singular vectors come in an order and with signs that mean nothing to the optimizer's moments.
    Source: orthogonal Procrustes, Golub and Van Loan, section 6.4.1.
    """
    U, _, Vh = torch.linalg.svd(target.mT @ basis)  # (r, r) each
    return target @ (U @ Vh)


def turn_towards(target: Tensor, *, basis: Tensor, share: float) -> Tensor:
    """Part of the way from a basis to another with like columns: share 0 stays, 1 arrives. (m, r), (m, r) -> (m, r)."""
    return orthonormalize(torch.lerp(basis, target, share))


def gaussian_matrix(rows: int, columns: int, *, seed: int, like: Tensor) -> Tensor:
    """Independent normal entries drawn from 64 bits of seed, in float32 or wider, on the device of `like`."""
    # On the meta device there is nothing to draw, and no generator.
    generator = None if like.is_meta else torch.Generator(like.device).manual_seed(seed % (1 << 63))
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.randn((rows, columns), generator=generator, device=like.device, dtype=wide)


@dataclass(frozen=True)
class BasisMethod:
    """One way to compute a basis at a refresh.

    title: its name in the log.
    compute: (G, old, *, rank, share, seed, draw, shard, average) -> basis (m, r), where
        G: (m, n), the whole gradient.
        old: (m, r), the basis so far; None at the first refresh.
        share: how far to turn from the old basis, in (0, 1]; see RefreshSchedule.share.
        seed: 64 bits, the same at every refresh of this parameter.
        draw: 64 bits, new at each refresh.
        shard: where the columns of G that this rank has belong; None if it has all.
        average: (m, r), the average of G G^T old over the updates so far; None unless `averages`, and before the first.
    sees_gradient: whether G's values matter; if not, any tensor of G's shape will do.
    averages: whether it takes the average, which every update adds to and needs the whole gradient for.
    """

    title: str
    compute: Callable[..., Tensor]
    sees_gradient: bool = True
    averages: bool = False


def iterated(
    G: Tensor, old: Tensor | None, *, rank: int, share: float, seed: int, shard: Shard | None = None, **unused: Any
) -> Tensor:
    """A randomized start, then one warm orthogonal iteration a refresh."""
    if old is None:
        return randomized_basis(G, rank=rank, seed=seed, shard=shard)
    basis = iterate_basis(G, old, shard=shard)
    return turn_towards(basis, basis=old, share=share) if share < 1 else basis


def averaged(G: Tensor, old: Tensor | None, *, share: float, average: Tensor | None = None, **others: Any) -> Tensor:
    """One warm orthogonal iteration with the average of G G^T, of which `average` is the product with the basis.

    One gradient is mostly noise, and so are its leading directions; those of the average are not (docs/notebook.md).
    Source: Vyas et al. 2024, "SOAP", arXiv 2409.11321, algorithm 4, for r columns in the place of a whole eigenbasis.
    """
    if old is None or average is None:
        return iterated(G, old, share=share, **others)
    basis = orthonormalize(average)
    return turn_towards(basis, basis=old, share=share) if share < 1 else basis


def exact(
    G: Tensor, old: Tensor | None, *, rank: int, share: float, shard: Shard | None = None, **unused: Any
) -> Tensor:
    """The leading singular vectors, exactly, at every refresh."""
    basis = exact_basis(G, rank=rank, shard=shard)
    if old is None or share == 1:
        return basis
    return turn_towards(align(basis, basis=old), basis=old, share=share)


def random_orthonormal(G: Tensor, old: Tensor | None, *, rank: int, draw: int, **unused: Any) -> Tensor:
    """An orthonormal basis, drawn at each refresh."""
    return orthonormalize(gaussian_matrix(G.shape[0], rank, seed=draw, like=G))


def gaussian(G: Tensor, old: Tensor | None, *, rank: int, draw: int, **unused: Any) -> Tensor:
    """A sketch with independent entries of variance 1 / r, drawn at each refresh: it keeps norms on average."""
    return gaussian_matrix(G.shape[0], rank, seed=draw, like=G).div_(rank**0.5)


METHODS = {
    "iterate": BasisMethod("orthogonal iteration", iterated),
    "svd": BasisMethod("exact SVD", exact),
    "average": BasisMethod("averaged gradients", averaged, averages=True),
    "gaussian": BasisMethod("random sketches", gaussian, sees_gradient=False),
    "random": BasisMethod("random bases", random_orthonormal, sees_gradient=False),
}
