"""The moments of a parameter, or of a basis that learns, as entries of a parameter's state.

A rule names its moments and says what shape each has. In which precision they are kept is decided here; the rule reads
and writes them as `Moment`s. Those of a basis have its side before their names: `right.exp_avg`.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore.storage.dynamic8 import MIN_ELEMENTS, Dynamic8
from qgalore.storage.rounding import Seed, mix_seed, seed_tensors
from qgalore.storage.stored import Codec, Plain, Stored, find, put
from qgalore.subspace.projector import Turn

MOMENT_POLICIES = ("project", "keep", "reset")


class MomentKind(NamedTuple):
    """One moment that a rule keeps.

    signed: an average of gradients or directions, which turns with the basis; else of squares, which cannot.
    shape: of its tensor.
    """

    name: str
    signed: bool
    shape: torch.Size


@dataclass(frozen=True)
class Moment:
    """A moment in one update: what a rule reads and writes, in `dtype`, whatever it is kept in.

    seed: 64 bits, for the rounding of what is written.
    """

    stored: Stored
    dtype: torch.dtype
    seed: Seed | None

    def read(self) -> Tensor:
        """Its values. The tensor may be worked on in place; only `write` makes that count."""
        return self.stored.read(self.dtype)

    def write(self, values: Tensor) -> None:
        """Stores new values."""
        self.stored.write(values, seed=self.seed)


def moment_codec(kind: MomentKind, *, bits: int, dtype: torch.dtype) -> Codec:
    """How a moment is kept. bits: 8, or 32 for `dtype` itself (float32 or float64).

    Vectors, and tensors of fewer than MIN_ELEMENTS elements, are not packed. Raises ValueError for other bits.
    """
    if bits not in (8, 32):
        raise ValueError(f"moments are kept in 8 or 32 bits, not {bits}")
    if bits == 32 or len(kind.shape) < 2 or kind.shape.numel() < MIN_ELEMENTS:
        return Plain(dtype)
    return Dynamic8(kind.signed)


def create_moments(
    state: dict[str, Any],
    kinds: Sequence[MomentKind],
    *,
    bits: int,
    dtype: torch.dtype,
    device: torch.device,
    prefix: str = "",
) -> None:
    """Puts moments of zeros into a state. dtype: of the gradients that they average, float32 or float64."""
    for kind in kinds:
        codec = moment_codec(kind, bits=bits, dtype=dtype)
        put(state, prefix + kind.name, Stored.zeros(codec, kind.shape, device=device))


def open_moments(
    state: dict[str, Any],
    kinds: Sequence[MomentKind],
    *,
    dtype: torch.dtype,
    seed: int,
    compiled: bool = False,
    prefix: str = "",
) -> list[Moment]:
    """The moments in whatever form the state holds them; writing to them writes the state's tensors.

    seed: of this update of this parameter, the same for all its moments: each mixes in its name.
    compiled: whether compiled code will work on them, which needs seeds as tensors.
    """
    moments = []
    for kind in kinds:
        name = prefix + kind.name
        codec: Codec = Plain(state[name].dtype) if name in state else Dynamic8(kind.signed)
        stored = find(state, name, codec=codec, shape=kind.shape)
        own = mix_seed(seed, zlib.crc32(name.encode()))
        moments.append(Moment(stored, dtype, seed_tensors(own) if compiled else own))
    return moments


def follow_basis(moments: Sequence[Moment], kinds: Sequence[MomentKind], turn: Turn, *, policy: str) -> None:
    """What becomes of the moments when the basis turns.

    policy: `project` carries first moments over by P_new^T P_old; `keep` leaves all as they are; `reset` zeroes all.
    """
    for kind, moment in zip(kinds, moments, strict=True):
        if policy == "project" and kind.signed:
            moment.write(turn.carry(moment.read()))
        elif policy == "reset":
            moment.write(torch.zeros(kind.shape, dtype=moment.dtype, device=moment.stored.device))
