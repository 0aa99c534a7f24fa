"""Optimizer moments in 8 bits: blocks of 256 elements, a tree of codes, one float32 maximum a block.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.

A code is read from its highest bit: the zeros before the first 1 are a decimal exponent, the bits after it a linear
fraction. With 8 bits, code c >= 1 whose first 1 is bit k (n = 2**k codes share it) stands for

    tree(c) = 10**(k - 7) * (0.1 + 0.9 * (c - n + 1) / n)        tree(0) = 0, tree(1) = 1e-7, tree(255) = 1

First moments spend the highest bit on the sign, and the tree has 7 bits: both signs alike, +-1e-6 to +-1, two zeros.
Second moments are stored by their square root, so that they reach down to 1e-14 of the block's largest.

Two choices differ from the publication, each of them measured (tests/test_dynamic8.py):
- Fractions end at the upper end, not in the middle, of their n intervals. So every power of ten is a code, the code is
  a concave, piecewise linear function of its value, and encoding is the minimum of one line a decade: no search, no
  table. Rounding that position up or down at random rounds the value without bias.
- Second moments by their root, rounded at random, never to zero. To nearest, a second moment beside a larger one never
  decays; one below the smallest code becomes zero, and the first moment is then divided by eps alone. The root halves
  the decades that a block must span, and it is what the direction is divided by.
First moments, too, are rounded at random: beside larger ones they would not decay either.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from qgalore.storage.rounding import Seed, random_bits

BLOCK = 256
MIN_ELEMENTS = 4096  # below, 8 bits would save nothing worth the noise
PIECE = 1 << 20  # elements worked on at a time in eager code; a multiple of BLOCK

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Dynamic8:
    """8-bit codes of a moment, in blocks along its elements in row-major order.

    signed: whether values may be negative (first moments); else a negative value counts as zero and a positive one
        never becomes zero (second moments).

    With a seed it rounds at random, so that the expected value (of the root, where unsigned) is the value itself.
    A NaN or an infinity makes its whole block decode to what is not finite.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("codes", "absmax")
    signed: bool

    def spec(self, shape: torch.Size) -> dict[str, tuple[torch.Size, torch.dtype]]:
        count = shape.numel()
        return {
            "codes": (torch.Size((count,)), torch.uint8),
            "absmax": (torch.Size((-(-count // BLOCK),)), torch.float32),
        }

    def encode_(self, values: Tensor, parts: Mapping[str, Tensor], *, seed: Seed | None, start: int) -> None:
        assert start % BLOCK == 0, "a shard begins with a block"
        flat, codes, absmax = values.float().reshape(-1), parts["codes"], parts["absmax"]
        for elements, width in _pieces(flat.numel()):
            blocks = flat[elements].view(-1, width)
            noise = 0.5 if seed is None else _noise(blocks, seed=seed, start=start + elements.start)
            new_codes, new_absmax = _encode(blocks, noise, signed=self.signed)
            codes[elements] = new_codes.view(-1)
            absmax[_blocks(elements)] = new_absmax

    def decode(self, parts: Mapping[str, Tensor], *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        codes, absmax = parts["codes"], parts["absmax"]
        points = _signed_map(codes.device) if self.signed else _unsigned_map(codes.device)
        values = torch.empty(codes.numel(), device=codes.device)
        for elements, width in _pieces(codes.numel()):
            relative = points.index_select(0, codes[elements].int()).view(-1, width)
            values[elements] = relative.mul_(absmax[_blocks(elements), None]).view(-1)
        return values.view(shape).to(dtype)


def _tree(bits: int) -> list[float]:
    """The values of the 2**bits codes, ascending from 0 to 1."""
    places = [(code, code.bit_length() - 1) for code in range(1, 1 << bits)]
    return [0.0] + [10.0 ** (k + 1 - bits) * (0.1 + 0.9 * ((code + 1) / 2**k - 1)) for code, k in places]


def _lines(bits: int) -> list[tuple[float, float]]:
    """Slope and intercept of each line of which the (fractional) code of a value in [0, 1] is the least."""
    first = (10.0 ** (bits - 1), 0.0)  # from code 0 to code 1
    slopes = [2**k / (0.9 * 10.0 ** (k + 1 - bits)) for k in range(1, bits)]
    return [first] + [(slope, 2 ** (k + 1) - 1 - 2**k / 0.9) for k, slope in enumerate(slopes, start=1)]


_LINES = {True: _lines(7), False: _lines(8)}  # by signed


def dynamic_map(*, signed: bool) -> Tensor:
    """The value of every code relative to its block's maximum. (256,) float32.

    signed: codes 0 to 127 ascend from 0 to 1, codes 128 to 255 are their negatives.  Else the 256 squares of the tree,
    ascending from 0 to 1.
    """
    if signed:
        magnitudes = torch.tensor(_tree(7), dtype=torch.float64)
        return torch.cat([magnitudes, 0.0 - magnitudes]).float()
    return torch.tensor(_tree(8), dtype=torch.float64).square().float()


@lru_cache
def _cached_map(device: torch.device, signed: bool) -> Tensor:
    return dynamic_map(signed=signed).to(device)


# Constants, or every compiled call would build the maps again. Two functions: a graph takes one constant from each.
@torch.compiler.assume_constant_result
def _signed_map(device: torch.device) -> Tensor:
    return _cached_map(device, True)


@torch.compiler.assume_constant_result
def _unsigned_map(device: torch.device) -> Tensor:
    return _cached_map(device, False)


def _pieces(count: int) -> list[tuple[slice, int]]:
    """Slices of the elements, with the width of their blocks; a last short block comes by itself.

    Eager code works through pieces of a million, so that its temporaries stay small; this changes no result.
    """
    whole = count - count % BLOCK
    step = max(whole, 1) if torch.compiler.is_compiling() else PIECE
    pieces = [(slice(start, min(start + step, whole)), BLOCK) for start in range(0, whole, step)]
    return pieces + [(slice(whole, count), count - whole)] * (whole < count)


def _blocks(elements: slice) -> slice:
    return slice(elements.start // BLOCK, -(-elements.stop // BLOCK))


def _position(x: Tensor, *, signed: bool) -> Tensor:
    """The fractional code of magnitudes in [0, 1]: between two codes, linear in the value. Same shape, float32."""
    (slope, _), *lines = _LINES[signed]
    position, line = x * slope, torch.empty_like(x)
    for slope, intercept in lines:
        torch.mul(x, slope, out=line)
        torch.minimum(position, line.add_(intercept), out=position)
    return position.clamp_(0, 127 if signed else 255)


def _encode(values: Tensor, noise: Tensor | float, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (blocks, width) uint8 and maxima (blocks,) of values (blocks, width).

    noise: same shape, uniform in [0, 1), rounds at random; 0.5 rounds to nearest.
    """
    absmax = torch.linalg.vector_norm(values, ord=math.inf, dim=1)
    x = values / absmax.clamp_min(_TINY)[:, None]
    x = x.abs_() if signed else x.clamp_min_(0).sqrt_()
    codes = _position(x, signed=signed).add_(noise).to(torch.uint8)
    if signed:
        return codes.add_(values < 0, alpha=128), absmax
    return torch.maximum(codes, values > 0), absmax  # never from positive to zero


def _noise(values: Tensor, *, seed: Seed, start: int) -> Tensor:
    """Uniform in [0, 1), 16 bits: their sum with a position below 256 is exact in float32. start: the first index."""
    bits = random_bits(values.numel(), seed=seed, start=start, device=values.device)
    return bits.bitwise_and_(0xFFFF).float().mul_(2.0**-16).view_as(values)
