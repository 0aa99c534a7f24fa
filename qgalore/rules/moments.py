"""The moments of a parameter, or of a basis that learns, as entries of a parameter's state.

A rule declares the names and shapes of its moments, and reads and writes them as `Moment`s. Their precision is decided
here. The moments of a basis have its side before their names: `right.exp_avg`.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore.storage.blockwise import MIN_ELEMENTS, Blockwise, Log, Power, row_multiple
from qgalore.storage.rounding import Seed, mix_seed, seed_tensors
from qgalore.storage.stored import Codec, Plain, Stored, find, part_key, put
from qgalore.subspace.projector import Turn

MOMENT_POLICIES = ("project", "keep", "reset")


class MomentKind(NamedTuple):
    """One moment that a rule keeps."""

    name: str
    signed: bool  # whether it averages gradients or directions, which turn with the basis; else squares, which do not
    shape: torch.Size


@dataclass(frozen=True)
class Moment:
    """A moment in one update."""

    stored: Stored
    dtype: torch.dtype  # the dtype in which the rule reads and writes it
    seed: Seed | None  # 64 bits, for rounding

    def read(self) -> Tensor:
        """Its values, in a tensor that may be changed in place. Only `write` stores them."""
        return self.stored.read(self.dtype)

    def write(self, values: Tensor) -> None:
        self.stored.write(values, seed=self.seed)

    def rows(self, rows: slice) -> "Moment":
        """Some rows of it."""
        return replace(self, stored=self.stored.rows(rows))

    def in_blocks(self) -> "Moment | None":
        """See Stored.in_blocks."""
        stored = self.stored.in_blocks()
        return None if stored is None else replace(self, stored=stored)

    def at_start(self) -> "Moment":
        """See Stored.at_start."""
        assert self.seed is not None
        stored, seed = self.stored.at_start(self.seed)
        return replace(self, stored=stored, seed=seed)

    @property
    def row_multiple(self) -> int:
        """Rows can be cut at multiples of this number."""
        return row_multiple(self.stored.shape[-1]) if isinstance(self.stored.codec, Blockwise) else 1


def moment_codec(kind: MomentKind, *, bits: int, dtype: torch.dtype) -> Codec:
    """The codec of a moment. bits: 4, 8, or 32 for `dtype` itself (float32 or float64).

    Vectors and tensors of fewer than MIN_ELEMENTS elements have 32 bits in any case. Raises ValueError for other bits.
    """
    if bits not in (4, 8, 32):
        raise ValueError(f"moments are kept in 4, 8 or 32 bits, not {bits}")
    if bits == 32 or len(kind.shape) < 2 or kind.shape.numel() < MIN_ELEMENTS:
        return Plain(dtype)
    return Power(bits) if kind.signed else Log(bits)


def create_moments(
    state: dict[str, Any],
    kinds: Sequence[MomentKind],
    *,
    bits: int,
    dtype: torch.dtype,
    device: torch.device,
    prefix: str = "",
    whole: Sequence[MomentKind] | None = None,
) -> None:
    """Puts moments of zeros into a state.

    dtype: dtype of the gradients that they average, float32 or float64.
    whole: of a shard, the moments of the whole parameter, whose size decides their bits.
    """
    for kind, of in zip(kinds, whole or kinds, strict=True):
        codec = moment_codec(of, bits=bits, dtype=dtype)
        put(state, prefix + kind.name, Stored.zeros(codec, kind.shape, device=device))


def open_moments(
    state: dict[str, Any],
    kinds: Sequence[MomentKind],
    *,
    dtype: torch.dtype,
    seed: int,
    compiled: bool = False,
    prefix: str = "",
    row_start: int = 0,
) -> list[Moment]:
    """The moments in a state. Writing to them writes the tensors of the state.

    seed: 64 bits for this update of this parameter; each moment mixes in its name.
    compiled: whether they are for compiled code, which needs seeds as tensors.
    row_start: of a shard, its first row within the whole.
    """
    moments = []
    for kind in kinds:
        name = prefix + kind.name
        if name in state:
            codec: Codec = Plain(state[name].dtype)
        else:
            bits = 8 if state[part_key(name, "codes")].numel() == kind.shape.numel() else 4
            codec = Power(bits) if kind.signed else Log(bits)
        stored = find(state, name, codec=codec, shape=kind.shape, row_start=row_start)
        own = mix_seed(seed, zlib.crc32(name.encode()))
        moments.append(Moment(stored, dtype, seed_tensors(own) if compiled else own))
    return moments


def follow_basis(moments: Sequence[Moment], kinds: Sequence[MomentKind], turn: Turn, *, policy: str) -> None:
    """Changes the moments after a refresh has turned the basis.

    policy: `project` multiplies first moments by P_new^T P_old; `keep` changes nothing; `reset` sets all to zero.
    """
    for kind, moment in zip(kinds, moments, strict=True):
        if policy == "project" and kind.signed:
            moment.write(turn.carry(moment.read()))
        elif policy == "reset":
            moment.write(torch.zeros(kind.shape, dtype=moment.dtype, device=moment.stored.device))
