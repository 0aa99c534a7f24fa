"""Stored tensors: everything that is kept between updates, weights, bases and moments, in any precision.

A `Codec` turns values into a few plain tensors, its parts, and back. A `Stored` is a codec with the parts of a tensor.
Only codecs know how values are rounded; an update reads and writes, and never asks for bits.

    codec       parts                               serves
    Plain       "": the values in their own dtype   weights, bases, moments
    Affine      codes, scale, zero                  INT8 and INT4 weights and bases
    Simulated   values (float32)                    the numbers that Affine would have, in full size
    Power       codes, scale                        first moments in 8 bits
    Log         codes, scale, steps                 second moments in 8 bits

To add a codec: a frozen dataclass with the members of `Codec`, and its row in CODECS.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qgalore.storage.affine import Affine, Simulated
from qgalore.storage.blockwise import BLOCK, Blockwise, Log, Power
from qgalore.storage.rounding import Seed, advance, round_stochastic_bfloat16

Spec = dict[str, tuple[torch.Size, torch.dtype]]  # part: shape and dtype


class Codec(Protocol):
    """One way to keep a tensor. Its fields are plain values, which describe it in a checkpoint."""

    PARTS: ClassVar[tuple[str, ...]]

    def spec(self, shape: torch.Size) -> Spec:
        """Shape and dtype of each part of a tensor of that shape."""
        ...

    def encode_(self, values: Tensor, parts: Mapping[str, Tensor], *, seed: Seed | None) -> None:
        """Writes values into parts, in place.

        values: float32 or float64.
        seed: 64 bits to round stochastically; None rounds to nearest.
        """
        ...

    def decode(self, parts: Mapping[str, Tensor], *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The values that the parts stand for."""
        ...

    def rows(self, parts: Mapping[str, Tensor], rows: slice, *, width: int) -> dict[str, Tensor]:
        """The parts of some rows of a matrix, as views. width: elements of a row."""
        ...


@dataclass(frozen=True)
class Plain:
    """Values as they are, in `dtype`. bfloat16 rounds stochastically: to nearest, every update below 1/256 is lost."""

    PARTS: ClassVar[tuple[str, ...]] = ("",)
    dtype: torch.dtype

    def spec(self, shape: torch.Size) -> Spec:
        return {"": (shape, self.dtype)}

    def encode_(self, values: Tensor, parts: Mapping[str, Tensor], *, seed: Seed | None) -> None:
        target = parts[""]
        if values is target:  # the reader has worked in place
            return
        if self.dtype == torch.bfloat16 and seed is not None:
            values = round_stochastic_bfloat16(values.float(), seed=seed)
        target.copy_(values)

    def decode(self, parts: Mapping[str, Tensor], *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[""].to(dtype)

    def rows(self, parts: Mapping[str, Tensor], rows: slice, *, width: int) -> dict[str, Tensor]:
        return {"": parts[""][rows]}


CODECS: dict[str, Any] = {"plain": Plain, "affine": Affine, "simulated": Simulated, "power": Power, "log": Log}


def describe_codec(codec: Codec) -> dict[str, Any]:
    """The codec as plain values, JSON for all but Plain: its name in CODECS and its fields."""
    (name,) = (name for name, kind in CODECS.items() if type(codec) is kind)
    return {"codec": name, **asdict(codec)}  # type: ignore[call-overload]


def build_codec(described: Mapping[str, Any]) -> Codec:
    """The inverse of describe_codec. Raises KeyError or TypeError for anything else."""
    fields = {key: value for key, value in described.items() if key != "codec"}
    return CODECS[described["codec"]](**fields)


@dataclass(frozen=True)
class Stored:
    """A tensor kept by a codec.

    parts: the plain tensors, which are written in place.
    shape: shape of the values.
    row_start: index of the first row within the whole tensor, for a shard, whose noise is that of the whole. The blocks
        of Power and Log span rows, so they can be cut at multiples of their block only.
    """

    codec: Codec
    parts: dict[str, Tensor]
    shape: torch.Size
    row_start: int = 0

    @classmethod
    def zeros(cls, codec: Codec, shape: torch.Size, *, device: torch.device | str) -> "Stored":
        """A new tensor of zeros."""
        spec = codec.spec(shape)
        return cls(codec, {name: torch.zeros(s, dtype=d, device=device) for name, (s, d) in spec.items()}, shape)

    @classmethod
    def of(cls, values: Tensor) -> "Stored":
        """A plain tensor as it is; writing writes to it."""
        return cls(Plain(values.dtype), {"": values}, values.shape)

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    def read(self, dtype: torch.dtype) -> Tensor:
        """The values in `dtype`. The result may be the stored tensor itself: only a writer may work on it in place."""
        return self.codec.decode(self.parts, shape=self.shape, dtype=dtype)

    def write(self, values: Tensor, *, seed: Seed | None = None) -> None:
        """Stores new values, in place.

        values: float32 or float64, this shape.
        seed: 64 bits from mix_seed to round stochastically; None rounds to nearest.
        """
        assert values.shape == self.shape, f"{tuple(values.shape)} is not {tuple(self.shape)}"
        self.codec.encode_(values, self.parts, seed=advance(seed, self.row_start * self.shape[1:].numel()))

    def rows(self, rows: slice) -> "Stored":
        """Some rows of a matrix: writing to them writes to it, with the noise that the whole would have there."""
        # torch 2.11 compiles neither comparisons of slices nor their `indices`.
        if rows.start is None and rows.stop is None:  # also of a tensor that has no rows
            return self
        start, stop = rows.start or 0, self.shape[0] if rows.stop is None else min(rows.stop, self.shape[0])
        width = self.shape[1:].numel()
        parts = self.codec.rows(self.parts, slice(start, stop), width=width)
        return Stored(self.codec, parts, torch.Size((stop - start, *self.shape[1:])), self.row_start + start)

    def in_blocks(self) -> "Stored | None":
        """The same tensor as rows of BLOCK elements, for arithmetic that treats all elements alike.

        Compiled code makes vectors of it, and not of blocks that lie across the rows of a matrix. None if the tensor
        has no whole number of blocks, begins within one, or has a codec with rows of its own.
        """
        count, start, parts = self.shape.numel(), self.row_start * self.shape[1:].numel(), self.parts
        if count % BLOCK or start % BLOCK or not all(part.is_contiguous() for part in parts.values()):
            return None
        if isinstance(self.codec, Blockwise):
            parts = self.codec.in_blocks(parts)
        elif isinstance(self.codec, Plain):
            parts = {"": parts[""].view(-1, BLOCK)}
        else:
            return None
        return Stored(self.codec, parts, torch.Size((count // BLOCK, BLOCK)), start // BLOCK)

    def at_start(self, seed: Seed) -> tuple["Stored", Seed]:
        """The same tensor with row_start 0, and the seed that gives it the same noise.

        A row_start would be a constant of compiled code.
        """
        moved = advance(seed, self.row_start * self.shape[1:].numel())
        assert moved is not None
        return replace(self, row_start=0), moved

    def tensors(self) -> dict[str, Tensor]:
        """The plain tensors by the names of their parts; a plain tensor's only part has the name ''."""
        return dict(self.parts)


# In a parameter's state, the parts of a stored tensor called NAME are entries NAME.PART, or NAME for the part ''.


def part_key(name: str, part: str) -> str:
    """The key of a part in a state or a checkpoint."""
    return f"{name}.{part}" if part else name


def put(state: dict[str, Any], name: str, stored: Stored) -> None:
    """Makes the parts of a stored tensor entries of a state."""
    state.update({part_key(name, part): tensor for part, tensor in stored.parts.items()})


def find(state: Mapping[str, Any], name: str, *, codec: Codec, shape: torch.Size, row_start: int = 0) -> Stored:
    """The stored tensor of that name in a state; writing to it writes the state's tensors. Raises KeyError."""
    return Stored(codec, {part: state[part_key(name, part)] for part in codec.PARTS}, shape, row_start)
