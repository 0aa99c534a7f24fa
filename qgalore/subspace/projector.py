"""How a gradient enters a low-rank subspace and how a direction comes back out of it.

A projector holds settings only. Its tensors, the bases, live in the optimizer's state of the parameter under the keys
`left` (m, r) and `right` (n, r), or packed as `left.codes`, `left.scale`, `left.zero`, so that they are saved and
loaded like every other state. Which of the two are there is the projection's side, decided once from the shape and
`proj_type`. With none, the projector is the identity.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore.storage.affine import mix_seed
from qgalore.storage.packed_basis import LearningBasis, PackedBasis, pack_basis, unpack_basis
from qgalore.subspace.bases import (
    align,
    exact_basis,
    iterate_basis,
    orthonormalize,
    product,
    randomized_basis,
    turn_towards,
)
from qgalore.subspace.schedule import RefreshSchedule

SIDE_TYPES = ("std", "reverse_std", "left", "right", "full")


class Learner(NamedTuple):
    """How a basis learns by online PCA. rule: of update_rules.  bits: of its moments.  title: what the log calls it."""

    rule: str
    bits: int
    title: str


LEARNERS = {
    "continuous": Learner("adam", 32, "AdamW"),
    "continuous_adam8bit": Learner("adam", 8, "8-bit Adam"),
    "continuous_lion": Learner("lion", 32, "Lion"),
    "continuous_adafactor": Learner("adafactor", 32, "Adafactor"),
    "continuous_sgd": Learner("sgd", 32, "SGD"),
}
PROJ_TYPES = (*SIDE_TYPES, *LEARNERS, "random")
SUBSPACE_METHODS = ("iterate", "svd")


def projection_sides(shape: tuple[int, int], *, proj_type: str) -> tuple[str, ...]:
    """Which sides of an (m, n) gradient are projected, as the reference names them.

    std: the shorter side (the right one where m >= n), so that R keeps the longer.  reverse_std: the longer side.
    left: P^T G.  right: G Q.  full: P^T G Q.  Any other type of projection: as std.
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


class Refresh(NamedTuple):
    """What a refresh did, as maps from old coordinates to new: P_new^T P_old, (r, r); None for a side that stayed."""

    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def overlap(self) -> Tensor:
        """||P_new^T P_old||_F^2 / r in [0, 1], multiplied over the sides. ()"""
        sides = [T.square().sum() / T.shape[0] for T in self if T is not None]
        return torch.stack(sides).prod()

    def carry(self, M: Tensor) -> Tensor:
        """The part of M that the new bases see, in their coordinates. M has the shape of R."""
        if self.left is not None:
            M = self.left @ M
        if self.right is not None:
            M = M @ self.right.mT
        return M


@dataclass(frozen=True)
class Projector:
    """The projection of one parameter's gradient.

    sides: of `left`, `right`; none is the identity, for any shape.  rank: columns of each basis.
    method: `iterate` (randomized start, then one warm orthogonal iteration a refresh), `svd` (exact, every time) or
        `random` (of the gradient nothing but the shape; another one at every refresh).
        At gaps too short for the moments, a refresh goes only part of the way (RefreshSchedule.share), unless random.
    learner: how the basis learns after the first refresh, which then is the last; None: it is refreshed.
    seed: 64 bits, decides the randomized start and the random bases.  bits: 4 or 8 to pack the bases, in groups of at
    most group_size elements; None keeps them in the gradient's dtype.
    """

    sides: tuple[str, ...] = ()
    rank: int = 0
    method: str = "iterate"
    learner: Learner | None = None
    schedule: RefreshSchedule = RefreshSchedule(gap=1, offset=1)
    seed: int = 0
    bits: int | None = None
    group_size: int = 256

    def due(self, state: dict[str, Any], *, step: int) -> bool:
        """Whether `prepare` will compute bases."""
        if not self.sides or (self.learner is not None and "refreshes" in state):
            return False
        return self.schedule.due(state, step=step)

    @property
    def sees_gradient(self) -> bool:
        """Whether bases are computed from the gradient, the whole of it."""
        return bool(self.sides) and self.method != "random"

    def prepare(self, G: Tensor, state: dict[str, Any], *, step: int) -> Refresh | None:
        """Brings the bases up to date with G, where a refresh is due. G (m, n).

        Returns how the coordinates changed, or None where the bases are as before (or are the first ones).
        A gradient that is not finite, or a factorization that fails, leaves the old
        basis in place, counts in `failed_refreshes` and warns.
        """
        if not self.due(state, step=step):
            return None
        changes = {side: self._refresh_side(G, state, side) for side in self.sides}
        refresh = Refresh(**changes) if any(T is not None for T in changes.values()) else None
        # Only a lazy schedule reads the overlap back from the device.
        overlap = float(refresh.overlap) if refresh is not None and self.schedule.lazy else None
        self.schedule.record(state, step=step, overlap=overlap)
        return refresh

    def _refresh_side(self, G: Tensor, state: dict[str, Any], side: str) -> Tensor | None:
        """Replaces one basis. Returns P_new^T P_old (r, r), or None where it is the first one or stays as it was."""
        wide = torch.promote_types(G.dtype, torch.float32)
        old = self._basis(G, state, side).to(wide) if has_basis(state, side) else None
        new: Tensor | None
        if self.method == "random":
            new = self._random_basis(G, side, state)
        else:
            new = self._new_basis(G if side == "left" else G.mT, old, state)
        if new is None:
            state["failed_refreshes"] = state.get("failed_refreshes", 0) + 1
            warnings.warn(
                "a refresh failed (gradient not finite, or no convergence): the old basis stays", stacklevel=2
            )
            if old is not None:
                return None
            new = self._random_basis(G, side, state)
        self._keep(new, G, state, side)
        return None if old is None else self._basis(G, state, side).to(wide).mT @ old

    def _keep(self, basis: Tensor, G: Tensor, state: dict[str, Any], side: str) -> None:
        """Stores a basis: in the gradient's dtype, or packed to `bits`."""
        if self.bits is None:
            # Row by row, as a checkpoint gives it back: products of another layout differ in the last bit.
            state[side] = basis.to(G.dtype).contiguous()
        else:
            packed = pack_basis(basis, bits=self.bits, group_size=self.group_size)
            state.update({f"{side}.{name}": part for name, part in packed._asdict().items()})

    def _basis(self, G: Tensor, state: dict[str, Any], side: str) -> Tensor:
        """The basis as stored, in the gradient's dtype. (m, r) on the left, (n, r) on the right"""
        if self.bits is None:
            return state[side]
        packed = PackedBasis(*(state[f"{side}.{name}"] for name in PackedBasis._fields))
        return unpack_basis(packed, shape=self.basis_shape(G.shape, side), dtype=G.dtype)

    def basis_shape(self, shape: torch.Size, side: str) -> tuple[int, int]:
        """(m, r) on the left and (n, r) on the right, for a gradient of that shape."""
        return shape[0 if side == "left" else 1], self.rank

    def bases(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """The part of a parameter's state that `project` and `back` read."""
        return {name: value for name, value in state.items() if is_basis(name)}

    def open_basis(self, state: dict[str, Any], side: str, *, shape: torch.Size) -> Tensor | LearningBasis:
        """The basis for one who will read_weight and store_weight it. shape: of the gradient."""
        if self.bits is None:
            return state[side]
        parts = tuple(state[f"{side}.{name}"] for name in PackedBasis._fields)
        return LearningBasis(parts, self.basis_shape(shape, side), self.bits, self.group_size)

    def _new_basis(self, G: Tensor, old: Tensor | None, state: dict[str, Any]) -> Tensor | None:
        """The left basis (m, r) for this G, or None where it cannot be computed."""
        if not G.isfinite().all():
            return None
        try:
            basis = self._compute(G, old, state)
        except torch.linalg.LinAlgError:
            return None
        return basis if basis.isfinite().all() else None

    def _compute(self, G: Tensor, old: Tensor | None, state: dict[str, Any]) -> Tensor:
        """By the chosen method; where the gap is short, part of the way from the old basis."""
        share = self.schedule.share(state)
        if old is None:
            first = exact_basis if self.method == "svd" else partial(randomized_basis, seed=self.seed)
            return first(G, rank=self.rank)
        if self.method == "iterate":
            basis = iterate_basis(G, old)
        else:
            basis = exact_basis(G, rank=self.rank)
            basis = align(basis, basis=old) if share < 1 else basis
        return turn_towards(basis, basis=old, share=share) if share < 1 else basis

    def _random_basis(self, G: Tensor, side: str, state: dict[str, Any]) -> Tensor:
        """An orthonormal basis drawn from the seed, the side and the refreshes so far; G says how many rows it has.

        Also where the very first gradient was useless, until the next refresh.
        """
        shape, wide = self.basis_shape(G.shape, side), torch.promote_types(G.dtype, torch.float32)
        seed = mix_seed(self.seed, side == "left", state.get("refreshes", 0))
        generator = torch.Generator(G.device).manual_seed(seed % (1 << 63))
        return orthonormalize(torch.randn(shape, generator=generator, device=G.device, dtype=wide))

    def allocate(self, state: dict[str, Any], *, like: Tensor) -> None:
        """Stores bases of zeros, to be counted. like: the weight, for its shape, dtype and device."""
        for side in self.sides:
            self._keep(torch.zeros(self.basis_shape(like.shape, side), device=like.device), like, state, side)

    def projected_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of R for a gradient of that shape."""
        if not self.sides:
            return tuple(shape)
        m, n = shape
        return self.rank if "left" in self.sides else m, self.rank if "right" in self.sides else n

    def project(self, G: Tensor, state: dict[str, Any]) -> Tensor:
        """R = P^T G Q, in float32 or wider. (m, n) -> (r or m, r or n). The products run in G's dtype."""
        R = G
        if "left" in self.sides:
            R = self._basis(G, state, "left").mT @ R
        if "right" in self.sides:
            R = R @ self._basis(G, state, "right")
        return R.to(torch.promote_types(G.dtype, torch.float32))

    def back(self, D: Tensor, state: dict[str, Any], *, like: Tensor) -> Tensor:
        """P D Q^T: the direction in the full space, in D's dtype. (r or m, r or n) -> (m, n). Changes nothing.

        like: the gradient or the weight, for its shape and for the dtype of the products.
        """
        if "left" in self.sides:
            D = product(self._basis(like, state, "left"), D)
        if "right" in self.sides:
            D = product(self._basis(like, state, "right"), D.mT).mT
        return D


def has_basis(state: dict[str, Any], side: str) -> bool:
    """Whether the optimizer's state of a parameter holds a basis for that side, packed or not."""
    return side in state or f"{side}.codes" in state


def is_basis(name: str) -> bool:
    """Whether an entry of a parameter's state is a basis or a part of a packed one. The moments of a basis are not."""
    side, _, part = name.partition(".")
    return side in ("left", "right") and part in ("", *PackedBasis._fields)
