"""Affine group quantization: INT8 and INT4, for weights and bases.

A group is g neighbours of a row, stored as codes c (unsigned, `bits` wide), one scale s (float32) and one zero point z
(a code): value = (c - z) * s. The row's width n is a multiple of g, so there is no ragged tail, and 4-bit codes are
packed row by row, so rows may be sharded anywhere. Source: Zhang et al. 2024 (Q-GaLore, arXiv 2407.08296), section 3;
unlike there,
 - zero is always on the grid and every value of the group inside it. A zero point clamped into the codes' range decodes
   a one-signed group wrongly; clamped codes would pull the group's extremes inwards, by half of every update.
 - a grid that holds its group is kept: quantizing decoded values again changes nothing beyond float32's last bit, so
   rounding noise comes from updates alone.
 - codes are computed in float32 against the scale as stored; on bfloat16 quotients small updates vanish.
Eager and compiled code agree bit for bit: divisions are by tensors (the compiler multiplies by a constant's
reciprocal), and every product that feeds a sum is exact, so that a fused multiply-add changes nothing.

A basis (m, r) is rounded in groups along its rows: a row holds what the r directions have to do with one input or
output of the layer, and some of these matter far more than others, while the columns are all of length one. What INT4
and INT8 do to a basis is measured in docs/notebook.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgalore.storage.chunks import row_chunks
from qgalore.storage.rounding import Seed, advance, round_stochastic

# The smallest float32. Added where a quotient may vanish: it rounds subnormal numbers up and leaves all others alone.
_TINY = 2.0**-149


def group_size_for(width: int, *, at_most: int) -> int:
    """The largest divisor of `width` that is at most `at_most`; -1 makes a row one group. 5461 -> 127, 1376 -> 172.

    Raises ValueError for an `at_most` below 1 other than -1.
    """
    if at_most == -1:
        return width
    if at_most < 1:
        raise ValueError(f"a group size of {at_most} is out of range: give a number above 0, or -1 for whole rows")
    return max(size for size in range(1, min(width, at_most) + 1) if width % size == 0)


@dataclass(frozen=True)
class Affine:
    """Codes in groups along the rows of a matrix.

    bits: 8 or 4.
    group_size: g, a divisor of the row's width.
    stochastic: False rounds to nearest whatever the seed.

    The step is at most range / (2**bits - 2), where the range is that of the group's values and zero. A group that
    holds NaN or infinity gets a scale that is not finite, and so decodes to nothing finite.
    Bytes: bits / 8 an element and 5 a group.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero")
    bits: int
    group_size: int
    stochastic: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"affine codes have 4 or 8 bits, not {self.bits}")

    @classmethod
    def fitting(cls, width: int, *, bits: int, at_most: int, stochastic: bool = True) -> "Affine":
        """The codec for rows of that width, in groups of at most `at_most` elements (-1: whole rows)."""
        return cls(bits, group_size_for(width, at_most=at_most), stochastic)

    def spec(self, shape: torch.Size) -> dict[str, tuple[torch.Size, torch.dtype]]:
        m, n = shape
        groups = n // self.group_size
        codes = (m, groups, self.group_size) if self.bits == 8 else (m, -(-n // 2))
        return {
            "codes": (torch.Size(codes), torch.uint8),
            "scale": (torch.Size((m, groups)), torch.float32),
            "zero": (torch.Size((m, groups)), torch.uint8),
        }

    def shape_of(self, parts: Mapping[str, Tensor]) -> torch.Size:
        """The shape of the matrix that the parts hold."""
        m, groups = parts["scale"].shape
        return torch.Size((m, groups * self.group_size))

    def encode(self, values: Tensor, *, seed: Seed | None = None) -> dict[str, Tensor]:
        """New parts for a matrix. values: (m, n), any floating dtype. seed: None rounds to nearest."""
        spec = self.spec(values.shape)
        parts = {name: torch.empty(s, dtype=d, device=values.device) for name, (s, d) in spec.items()}
        if not values.is_meta:  # a walk through the kernels would take torch seconds for a 7B
            self.encode_(values, parts, seed=seed)
        return parts

    def encode_(self, values: Tensor, parts: Mapping[str, Tensor], *, seed: Seed | None) -> None:
        assert values.shape[1] % self.group_size == 0
        seed = seed if self.stochastic else None
        width, levels = values.shape[1], 2**self.bits - 1
        for rows in row_chunks(values.shape[0], width, device=values.device):
            noise = advance(seed, rows.start * width)
            codes, scale, zero = _quantize_rows(values[rows], self.group_size, levels=levels, seed=noise)
            parts["codes"][rows] = codes if self.bits == 8 else pack_nibbles(codes.flatten(1))
            parts["scale"][rows] = scale
            parts["zero"][rows] = zero

    def decode(self, parts: Mapping[str, Tensor], *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        codes, scale, zero = (parts[name] for name in self.PARTS)
        values = torch.empty((*scale.shape, self.group_size), dtype=dtype, device=codes.device)  # (m, n/g, g)
        for rows in row_chunks(shape[0], shape[1], device=codes.device):
            chunk = codes[rows]
            if self.bits == 4:
                chunk = unpack_nibbles(chunk, width=shape[1]).unflatten(1, (-1, self.group_size))
            steps = chunk.to(torch.float32).sub_(zero[rows].unsqueeze(-1))
            values[rows] = steps.mul_(scale[rows].unsqueeze(-1))
        return values.flatten(1)

    def rows(self, parts: Mapping[str, Tensor], rows: slice, *, width: int) -> dict[str, Tensor]:
        return {name: part[rows] for name, part in parts.items()}

    def magnitudes(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One number a group, finite exactly where all of the group is. (m, n/g)"""
        return parts["scale"]


@dataclass(frozen=True)
class Simulated(Affine):
    """The values that Affine's codes would decode to, as float32: the same numbers to the last bit, in more memory."""

    PARTS: ClassVar[tuple[str, ...]] = ("values",)

    def spec(self, shape: torch.Size) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {"values": (shape, torch.float32)}

    def shape_of(self, parts: Mapping[str, Tensor]) -> torch.Size:
        return parts["values"].shape

    def encode_(self, values: Tensor, parts: Mapping[str, Tensor], *, seed: Seed | None) -> None:
        real = Affine(self.bits, self.group_size, self.stochastic)
        spec = real.spec(values.shape)
        codes = {name: torch.empty(s, dtype=d, device=values.device) for name, (s, d) in spec.items()}
        real.encode_(values, codes, seed=seed)
        parts["values"].copy_(real.decode(codes, shape=values.shape, dtype=torch.float32))

    def decode(self, parts: Mapping[str, Tensor], *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts["values"].to(dtype, copy=True)

    def magnitudes(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["values"].unflatten(1, (-1, self.group_size)).abs().amax(-1)


def check_finite(magnitudes: Tensor, *, name: str) -> None:
    """Raises ValueError if a group held NaN or infinity. magnitudes: see Affine. Waits for the device."""
    finite = magnitudes.isfinite()
    if not finite.all():
        bad = int(finite.logical_not_().sum())
        raise ValueError(f"{name}: {bad} of {magnitudes.numel()} groups hold NaN or infinity and cannot be quantized")


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the lower half; an odd last one stands alone. (m, n) -> (m, ceil(n/2))"""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, *, width: int) -> Tensor:
    """The codes that pack_nibbles packed. (m, ceil(n/2)) uint8 -> (m, n), n = width"""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :width]


def _quantize_rows(values: Tensor, group_size: int, *, levels: int, seed: Seed | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (m, n/g, g), scale and zero (m, n/g) of some rows. levels: the highest code."""
    groups = values.to(torch.float32).unflatten(1, (-1, group_size))  # (m, n/g, g)
    scale, zero = _grid(groups, levels=levels)  # (m, n/g, 1) each
    codes = groups / scale
    codes = codes.round_() if seed is None else round_stochastic(codes, seed=seed)
    codes = codes.add_(zero).clamp_(0, levels).to(torch.uint8)  # only float32's rounding of the scale needs the clamp
    return codes, scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8)


def _grid(groups: Tensor, *, levels: int) -> tuple[Tensor, Tensor]:
    """The scale and zero point with which all values of a group, and zero, lie within the codes 0 ... levels.

    With levels - 1 steps across the range there is one to spare, so that the part below zero may be rounded up to whole
    steps; then the step shrinks until the values fit tightly on one side. (m, n/g, g) -> (m, n/g, 1) float32, twice.
    """
    low = groups.amin(-1, keepdim=True).clamp_max(0.0)
    high = groups.amax(-1, keepdim=True).clamp_min(0.0)
    half_range = high * 0.5 - low * 0.5 + _TINY  # halves: high - low may overflow
    zero = (-low / half_range * ((levels - 1) / 2)).ceil().clamp_max(levels - 1)
    scale = torch.maximum(high / (levels - zero), -low / zero.clamp_min(1.0)) + _TINY
    return scale, zero
