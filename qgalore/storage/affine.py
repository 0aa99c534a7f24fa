"""Rounding arithmetic: the stateless noise, stochastic rounding, the affine group quantizer, two codes in a byte.

The noise of an element is a hash of (seed, step, parameter, element): nothing draws from a random number generator
during an optimizer step, so replicas stay bit-identical, a resumed run repeats the same noise, and a shard of a
parameter rounds as it would inside the whole.

A group is g neighbours of a row, stored as codes c (unsigned, `bits` wide), one scale s (float32) and one zero point z
(a code): value = (c - z) * s. The row's width is a multiple of g, so a matrix (m, n) has codes (m, n/g, g), no ragged
tail, and rows may be sharded anywhere. Source: Zhang et al. 2024 (Q-GaLore, arXiv 2407.08296), section 3; unlike there,
 - zero is always on the grid and every value of the group inside it. A zero point clamped into the codes' range decodes
   a one-signed group wrongly; clamped codes would pull the group's extremes inwards, by half of every update.
 - a grid that holds its group is kept: quantizing decoded values again changes nothing beyond float32's last bit, so
   rounding noise comes from updates alone.
 - codes are computed in float32 against the scale as stored; on bfloat16 quotients small updates vanish.
Eager and compiled code agree bit for bit: divisions are by tensors (the compiler multiplies by a constant's
reciprocal), and every product that feeds a sum is exact, so that a fused multiply-add changes nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Seed = int | tuple[Tensor, Tensor]  # 64 bits, or their halves as seed_tensors makes them

_MASK32 = 0xFFFFFFFF


def _as_int32(value: int) -> int:
    """The int32 with the same 32 bits: torch's integer tensors are signed."""
    value &= _MASK32
    return value - (1 << 32) if value >> 31 else value


def _finalize(value: int) -> int:
    """SplitMix64's finalizer (Steele et al. 2014): 64 well-mixed bits of a Python integer."""
    value &= (1 << 64) - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return value ^ (value >> 31)


def mix_seed(*parts: int) -> int:
    """One 64-bit seed from several integers, such as (seed, step, parameter index). The order counts."""
    mixed = 0x9E3779B97F4A7C15
    for part in parts:
        mixed = _finalize(mixed ^ (part & ((1 << 64) - 1))) + 0x9E3779B97F4A7C15
    return _finalize(mixed)


def seed_tensors(seed: int) -> tuple[Tensor, Tensor]:
    """The lower and the upper 32 bits as 0-d int32 tensors: as a number, a seed would be compiled in."""
    low, high = (torch.tensor(_as_int32(half), dtype=torch.int32) for half in (seed, seed >> 32))
    return low, high


def random_bits(count: int, *, seed: Seed, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each of `count` elements: a hash of (seed, element index).

    seed: 64 bits, from mix_seed, or their seed_tensors.  start: index of the first element.
    Returns (count,) int32 on `device`.
    The mixing is MurmurHash3's 32-bit finalizer (Appleby, public domain), keyed at its start and in its middle, in
    int32 arithmetic that wraps around. Its right shifts must be logical, hence the masks.
    """
    low, high = (_as_int32(seed), _as_int32(seed >> 32)) if isinstance(seed, int) else seed
    h = torch.arange(start, start + count, dtype=torch.int32, device=device)
    h.mul_(_as_int32(0x9E3779B9)).add_(low)
    h.bitwise_xor_(h.bitwise_right_shift(16).bitwise_and_(0xFFFF)).mul_(_as_int32(0x85EBCA6B))
    h.bitwise_xor_(high)
    h.bitwise_xor_(h.bitwise_right_shift(13).bitwise_and_(0x7FFFF)).mul_(_as_int32(0xC2B2AE35))
    return h.bitwise_xor_(h.bitwise_right_shift(16).bitwise_and_(0xFFFF))


def round_stochastic_bfloat16(values: Tensor, *, seed: Seed) -> Tensor:
    """Rounds float32 to bfloat16 up or down at random, so that the expected value is the value itself.

    values: float32, any shape.  seed: 64 bits, from mix_seed.  Returns bfloat16 of the same shape.
    A bfloat16 is the upper half of a float32: adding 16 random bits below the cut carries with the right probability.
    Infinities and NaN stay what they are.
    """
    noise = random_bits(values.numel(), seed=seed, device=values.device).bitwise_and_(0xFFFF)
    bits = values.contiguous().view(torch.int32) + noise.view(values.shape)
    rounded = bits.bitwise_and_(-0x10000).view(torch.float32)  # exactly representable now
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def open_weight(weight: Any) -> Any:
    """What read_weight and store_weight work on in compiled code: a weight that is stored otherwise (Int8Weight)
    steps out of its wrapper, others are plain tensors already."""
    return weight.unwrapped() if hasattr(weight, "store_") else weight.detach()


def read_weight(weight: Any, *, dtype: torch.dtype) -> Tensor:
    """The values of a weight as an ordinary tensor. A weight that is stored otherwise (Int8Weight) decodes them."""
    return weight.dequantize(dtype) if hasattr(weight, "store_") else weight.to(dtype)


def weight_tensors(weight: Any) -> tuple[Tensor, ...]:
    """The plain tensors that hold a weight from open_weight."""
    return weight.parts if hasattr(weight, "store_") else (weight,)


def store_weight(weight: Any, values: Tensor, *, seed: Seed) -> None:
    """Writes `values` into `weight` in the way that loses no small update on average.

    weight: a parameter of any floating dtype, written in place.  values: the same shape, float32 or float64.
    seed: 64 bits, from mix_seed.  A weight that knows how to store values (Int8Weight) does so itself.
    bfloat16 rounds stochastically, because rounding to nearest drops every update below 1/256 of the weight.
    """
    if hasattr(weight, "store_"):
        weight.store_(values, seed=seed)
        return
    if weight.dtype == torch.bfloat16:
        values = round_stochastic_bfloat16(values, seed=seed)
    weight.copy_(values)


def group_size_for(width: int, *, at_most: int) -> int:
    """The largest divisor of `width` that is at most `at_most`; -1 makes a row one group. 5461 -> 127, 1376 -> 172."""
    if at_most == -1:
        return width
    if at_most < 1:
        raise ValueError(f"a group size of {at_most} is out of range: give a number above 0, or -1 for whole rows")
    return max(size for size in range(1, min(width, at_most) + 1) if width % size == 0)


def quantize_groups(
    values: Tensor, *, group_size: int, bits: int = 8, seed: Seed | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds every group of a matrix to its own affine grid.

    values: (m, n), any floating dtype.  group_size: g, a divisor of n.  bits: 8 or 4.
    seed: 64 bits of mix_seed for stochastic rounding, whose expected value is the value itself; None: to nearest.
    Returns codes (m, n/g, g) uint8, scale (m, n/g) float32, zero (m, n/g) uint8.
    The step is at most range / (2**bits - 2), the range being that of the group's values and zero. A group that holds
    NaN or infinity gets a scale that is not finite, and so decodes to nothing finite: see check_finite.
    """
    assert bits in (4, 8) and values.shape[1] % group_size == 0
    width = values.shape[1]
    parts = [
        _quantize_rows(values[rows], group_size, levels=2**bits - 1, seed=seed, start=rows.start * width)
        for rows in _row_chunks(values)
    ]
    codes, scale, zero = (torch.cat(chunks) for chunks in zip(*parts, strict=True))
    return codes, scale, zero


def _row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Ranges of rows small enough that eager temporaries stay in cache: 3.5 times faster on a CPU. (rows, ...)

    Compiled code has no temporaries, and gets all rows at once.
    """
    rows, width = matrix.shape[0], matrix[:1].numel()
    elements = 1 << 17 if matrix.device.type == "cpu" else 1 << 24
    count = rows if torch.compiler.is_compiling() else max(1, elements // max(1, width))
    for start in range(0, max(1, rows), max(1, count)):
        yield slice(start, min(start + count, rows))


def _quantize_rows(
    values: Tensor, group_size: int, *, levels: int, seed: Seed | None, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_groups of some rows. levels: the highest code.  start: index of their first element in the whole."""
    groups = values.to(torch.float32).unflatten(1, (-1, group_size))  # (m, n/g, g)
    scale, zero = _grid(groups, levels=levels)  # (m, n/g, 1) each
    codes = groups / scale
    codes = codes.round_() if seed is None else _round_stochastic(codes, seed=seed, start=start)
    codes = codes.add_(zero).clamp_(0, levels).to(torch.uint8)  # only float32's rounding of the scale needs the clamp
    return codes, scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8)


# The smallest float32. Added where a quotient may vanish: it rounds subnormal numbers up and leaves all others alone.
_TINY = 2.0**-149


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


def _round_stochastic(values: Tensor, *, seed: Seed, start: int = 0) -> Tensor:
    """Rounds up with a probability of the fraction, to 24 bits of it, else down. float32, in place.

    The fraction is compared with the noise, not added to it: a sum near 100 would keep only 17 of the bits.
    """
    noise = random_bits(values.numel(), seed=seed, start=start, device=values.device)
    noise = noise.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).view(values.shape)
    floor = values.floor()
    fraction = values.sub_(floor)  # exact
    return fraction.sub_(noise.to(torch.float32).mul_(2.0**-24)).ceil_().add_(floor)  # ceil of (-1, 1): 0 or 1


def dequantize_groups(codes: Tensor, scale: Tensor, zero: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(codes - zero) * scale, in float32, then cast. codes (m, n/g, g), scale and zero (m, n/g) -> (m, n) `dtype`."""
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in _row_chunks(codes):
        steps = codes[rows].to(torch.float32).sub_(zero[rows].unsqueeze(-1))
        values[rows] = steps.mul_(scale[rows].unsqueeze(-1))
    return values.flatten(1)


def check_finite(scale: Tensor, *, name: str) -> None:
    """Raises ValueError where a group held NaN or infinity. scale: of any shape. Waits for the device."""
    bad = scale.numel() - int(scale.isfinite().sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {scale.numel()} groups hold NaN or infinity and cannot be quantized")


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the lower half; an odd last one stands alone. uint8 (...) -> (ceil(k/2),)"""
    codes = codes.flatten()
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_nibbles(packed: Tensor, *, count: int) -> Tensor:
    """The first `count` codes that pack_nibbles packed. uint8 (ceil(count/2),) -> (count,)"""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten()[:count]
