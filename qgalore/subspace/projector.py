"""How a gradient enters a low-rank subspace and how a direction comes back out of it.

A projector holds settings only. Its tensors, the bases, are in the optimizer's state of the parameter under the names
`left` (m, r) and `right` (n, r), plain or packed, so they are saved and loaded like every other state. The shape of the
gradient and `proj_type` decide which sides have a basis. Without any, the projector is the identity.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore.factored import dense, factors_of
from qgalore.sharding import Shard
from qgalore.storage.affine import Affine
from qgalore.storage.rounding import mix_seed
from qgalore.storage.stored import Codec, Plain, Stored, find, part_key, put
from qgalore.subspace.bases import METHODS, BasisMethod
from qgalore.subspace.schedule import RefreshSchedule

SIDE_TYPES = ("std", "reverse_std", "left", "right", "full")
SMALLEST = "auto"  # std or reverse_std, whichever keeps fewer bytes of a matrix
SIDES = ("left", "right")


class Learner(NamedTuple):
    """How a basis learns by online PCA."""

    rule: str  # of rules.RULES
    bits: int  # bits of the moments
    title: str  # name in the log


LEARNERS = {
    "continuous": Learner("adam", 32, "AdamW"),
    "continuous_adam8bit": Learner("adam", 8, "8-bit Adam"),
    "continuous_lion": Learner("lion", 32, "Lion"),
    "continuous_adafactor": Learner("adafactor", 32, "Adafactor"),
    "continuous_sgd": Learner("descent", 32, "SGD"),
}
PROJ_TYPES = (*SIDE_TYPES, SMALLEST, *LEARNERS, "random")


def projection_sides(shape: torch.Size | tuple[int, ...], *, proj_type: str) -> tuple[str, ...]:
    """The sides of an (m, n) gradient that are projected, by the reference's names.

    std: the shorter side (the right one where m >= n), so that R keeps the longer one.
    reverse_std: the longer side.
    left, right, full: P^T G, G Q, P^T G Q.
    Any other type of projection: as std.
    """
    wide = shape[0] < shape[1]
    sides = {
        "std": ("left",) if wide else ("right",),
        "reverse_std": ("right",) if wide else ("left",),
        "left": ("left",),
        "right": ("right",),
        "full": ("left", "right"),
    }
    return sides.get(proj_type, sides["std"])


class Turn(NamedTuple):
    """The change of coordinates by a refresh: P_new^T P_old, (r, r), for each side; None for a side that stayed."""

    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def overlap(self) -> Tensor:
        """||P_new^T P_old||_F^2 / r, from 0 to 1, multiplied over the sides. ()"""
        sides = [T.square().sum() / T.shape[0] for T in self if T is not None]
        return torch.stack(sides).prod()

    def carry(self, M: Tensor) -> Tensor:
        """M, of the shape of R, in the coordinates of the new bases. What they do not span is lost."""
        if self.left is not None:
            M = self.left @ M
        if self.right is not None:
            M = M @ self.right.mT
        return M


@dataclass(frozen=True)
class Projector:
    """The projection of one parameter's gradient.

    If the gap is too short for the moments, a refresh turns a basis part of the way only (RefreshSchedule.share).
    """

    shape: torch.Size  # shape of the gradient; (m, n) if it is projected
    dtype: torch.dtype  # dtype of the parameter, of products with the bases, and of bases that are not packed
    sides: tuple[str, ...] = ()  # `left`, `right`, both or none
    rank: int = 0  # columns of each basis
    method: str = "iterate"  # of bases.METHODS
    learns: bool = False  # whether the basis learns after its first refresh, which is then the only one
    schedule: RefreshSchedule = RefreshSchedule(gap=1, offset=1)
    seed: int = 0  # 64 bits; decides what is drawn
    bits: int | None = None  # bits of a packed basis, 4 or 8; None keeps bases plain
    group_size: int = 256  # largest number of elements that share a scale in a packed basis

    @property
    def sees_gradient(self) -> bool:
        """Whether bases are computed from the whole gradient."""
        return bool(self.sides) and self._method.sees_gradient

    @property
    def averages(self) -> bool:
        """Whether bases are computed from an average over the gradients of all updates."""
        return bool(self.sides) and self._method.averages and not self.learns

    @property
    def _method(self) -> BasisMethod:
        return METHODS[self.method]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of R and of all arithmetic in the subspace."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def projected_shape(self) -> torch.Size:
        """The shape of R."""
        if not self.sides:
            return self.shape
        m, n = self.shape
        return torch.Size((self.rank if "left" in self.sides else m, self.rank if "right" in self.sides else n))

    def basis_shape(self, side: str) -> torch.Size:
        """(m, r) on the left and (n, r) on the right."""
        return torch.Size((self.shape[SIDES.index(side)], self.rank))

    @property
    def codec(self) -> Codec:
        if self.bits is None:
            return Plain(self.dtype)
        return Affine.fitting(self.rank, bits=self.bits, at_most=self.group_size)

    def open(self, state: Mapping[str, Any]) -> dict[str, Stored]:
        """The bases that a state holds, by side."""
        if not self.sides:
            return {}
        codec = self.codec
        held = [side for side in self.sides if part_key(side, codec.PARTS[0]) in state]
        return {side: find(state, side, codec=codec, shape=self.basis_shape(side)) for side in held}

    def allocate(self, state: dict[str, Any], *, device: torch.device | str) -> None:
        """Puts bases of zeros into a state, to be counted."""
        for side in self.sides:
            put(state, side, Stored.zeros(self.codec, self.basis_shape(side), device=device))

    def due(self, state: Mapping[str, Any], *, step: int) -> bool:
        """Whether bases must be computed for this update. step: its number, from 1."""
        if not self.sides or (self.learns and "refreshes" in state):
            return False
        return self.schedule.due(state, step=step)

    def refresh(
        self,
        G: Tensor,
        state: dict[str, Any],
        *,
        step: int,
        shard: Shard | None = None,
        average: Tensor | None = None,
    ) -> Turn | None:
        """Computes the bases from G (m, n) and counts the refresh in the schedule.

        shard: where the rows of G belong, if other ranks have more of them.
        average: see BasisMethod.
        Returns the change of coordinates, or None if the bases stayed or are the first ones.
        If the gradient is not finite or a factorization fails, the old basis stays, `failed_refreshes` counts it, and
        there is a warning.
        """
        turns = {side: self._refresh_side(G, state, side, shard=shard, average=average) for side in self.sides}
        turn = Turn(**turns) if any(T is not None for T in turns.values()) else None
        # Reading the overlap waits for the device, so only a lazy schedule does it.
        overlap = float(turn.overlap) if turn is not None and self.schedule.lazy else None
        self.schedule.record(state, step=step, overlap=overlap)
        return turn

    def project(self, G: Tensor, bases: Mapping[str, Stored]) -> Tensor:
        """R = P^T G Q, in float32 or wider. (m, n) -> (r or m, r or n). The products run in the parameter's dtype.

        Without a side it is G itself, in its own dtype: the largest tensors of a model are not projected.
        """
        if not self.sides:
            return dense(G)
        factors = factors_of(G)
        if factors is not None and self._is_cheaper(tokens=len(factors[0])):
            left, right = (factor.to(self.dtype) for factor in factors)
            left = left @ bases["left"].read(self.dtype) if "left" in self.sides else left
            right = right @ bases["right"].read(self.dtype) if "right" in self.sides else right
            return (left.mT @ right).to(self.wide)
        R = dense(G).to(self.dtype)
        if "left" in self.sides:
            R = bases["left"].read(self.dtype).mT @ R
        if "right" in self.sides:
            R = R @ bases["right"].read(self.dtype)
        return R.to(self.wide)

    def _is_cheaper(self, *, tokens: int) -> bool:
        """Whether R takes fewer multiplications from the factors of G, see factored.py, than from G."""
        (m, n), (k, l), r = self.shape, self.projected_shape, self.rank
        of_factors = tokens * (k * l + r * sum(self.shape[SIDES.index(side)] for side in self.sides))
        return of_factors < tokens * m * n + (r * m * n if len(self.sides) == 1 else r * n * (m + r))

    def read(self, bases: Mapping[str, Stored]) -> dict[str, Tensor]:
        """The values of the bases, as products use them."""
        return {side: basis.read(self.dtype) for side, basis in bases.items()}

    def back(self, D: Tensor, bases: Mapping[str, Tensor], *, rows: slice | None = None) -> Tensor:
        """P D Q^T: the direction in the full space, in D's dtype. (r or m, r or n) -> (m, n)

        bases: their values, see `read`.
        rows: the rows that are wanted, of the m, where there is a basis; None for all.
        """
        rows = slice(None) if rows is None else rows
        if not self.sides:
            return D
        U = D.to(self.dtype)
        U = bases["left"][rows] @ U if "left" in self.sides else U[rows]
        if "right" in self.sides:
            U = U @ bases["right"].mT
        return U.to(D.dtype)

    def _refresh_side(
        self, G: Tensor, state: dict[str, Any], side: str, *, shard: Shard | None, average: Tensor | None
    ) -> Tensor | None:
        """Replaces one basis. Returns P_new^T P_old (r, r), or None if it is the first one or stays."""
        bases = self.open(state)
        # A basis that no refresh counts is the random one of a first update that was undone: nothing to go on from.
        old = self._as_used(bases[side]) if side in bases and "refreshes" in state else None
        draw = mix_seed(self.seed, side == "left", state.get("refreshes", 0))
        G = G if side == "left" else G.mT
        share = self.schedule.share(state)
        new = self._compute(G, old, share=share, draw=draw, shard=shard, average=average)
        if new is None:
            state["failed_refreshes"] = state.get("failed_refreshes", 0) + 1
            warnings.warn(
                "a refresh failed (gradient not finite, or no convergence): the old basis stays", stacklevel=2
            )
            if old is not None:
                return None
            # Without a first gradient, a random basis serves until the next refresh.
            new = METHODS["random"].compute(G, None, rank=self.rank, share=1.0, seed=self.seed, draw=draw)
        stored = Stored.zeros(self.codec, self.basis_shape(side), device=G.device)  # contiguous, as a checkpoint has it
        stored.write(new)
        put(state, side, stored)
        return None if old is None else self._as_used(stored).mT @ old

    def _as_used(self, basis: Stored) -> Tensor:
        """The values of a basis as products use them, in the dtype of the arithmetic in the subspace."""
        return basis.read(self.dtype).to(self.wide)

    def _compute(
        self, G: Tensor, old: Tensor | None, *, share: float, draw: int, shard: Shard | None, average: Tensor | None
    ) -> Tensor | None:
        """The left basis (m, r) of G, or None if it cannot be computed."""
        if self._method.sees_gradient and not _all_finite(G, shard=shard):
            return None
        try:
            basis = self._method.compute(
                G, old, rank=self.rank, share=share, seed=self.seed, draw=draw, shard=shard, average=average
            )
        except torch.linalg.LinAlgError:
            return None
        return basis if basis.isfinite().all() else None


def _all_finite(G: Tensor, *, shard: Shard | None) -> bool:
    finite = G.isfinite().all()
    return bool(finite) if shard is None else bool(shard.sum(1 - finite.float()) == 0)


def is_spread(name: str, value: Any) -> bool:
    """Whether an entry in the state of a sharded parameter has other rows on each rank: a moment has, a basis not."""
    return torch.is_tensor(value) and value.ndim > 0 and not is_basis(name)


def is_basis(name: str) -> bool:
    """Whether the entry of a parameter's state is a basis, or a part of a packed one."""
    side, _, part = name.partition(".")
    return side in SIDES and part in ("", *Affine.PARTS)
