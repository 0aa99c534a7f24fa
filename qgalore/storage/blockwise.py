"""Optimizer moments in 8 or 4 bits: blocks of 256 elements, codes whose steps grow with the value, a scale a block.

Blocks: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861. The two codes are ours,
for they are all arithmetic that a processor does on whole vectors: no table, no search, no logarithm.

`Power`, for first moments. A code c from -127 to 127 stands for

    sign(c) * (c / 127)**4 * maximum of the block

so neighbours differ by 3% at the maximum, 10% at a hundredth of it, 100% at 4e-9. Encoding is two square roots.

`Log`, for second moments. Code 0 is zero; with c from 1 on and n codes to an octave, c stands for

    lowest * 2**((c - 1) / n)        by straight lines between powers of two; lowest: the block's least positive value

The bits of a float32, read as an integer, are that logarithm, so encoding is a subtraction and a product. n is as large
as the span of the block allows: 63 for a factor of 16 between smallest and largest, 6 for 1e12.

Both round at random, so that the expected value is the value itself: positions are linear in the value between any two
codes (octaves begin at a code, and so do the lines). Rounded to nearest, a moment beside a larger one would never
decay. A positive second moment never becomes zero, or the first would be divided by eps alone.
docs/notebook.md compares these codes with others: error against Adam in float64, and nanoseconds.

In 4 bits, two codes share a byte, those of a block's halves. `Power` has codes from -7 to 7; neighbours differ by half
at the maximum. `Log` has 14 steps and spans a factor of 2**14 at most: smaller second moments of a block count as its
largest / 16384, which makes updates smaller, not larger.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qgalore.storage.chunks import row_chunks
from qgalore.storage.rounding import Seed, advance, random_bits

BLOCK = 256
MIN_ELEMENTS = 4096  # below, 8 bits would save nothing worth the noise
MAX_CODE = {8: 127, 4: 7}  # of Power, by bits
MAX_STEPS = {8: 254, 4: 14}  # of Log: the codes from 1 to 255 have 254 steps between them
MAX_SPAN = {8: 2.0**-48, 4: 2.0**-14}  # of Log: smaller values, relative to the block's largest, have code 1
_TINY = torch.finfo(torch.float32).tiny
_ONE = 0x3F800000  # the bits of 1.0
_OCTAVE = 2.0**23  # from the bits of a float32 to those of its double


@dataclass(frozen=True)
class Blockwise:
    """What both codecs share: codes (count,) uint8 or int8 in row-major order, and one entry a block of other parts.

    bits: 8, or 4 for two codes in a byte, uint8.
    A NaN or an infinity makes its whole block decode to what is not finite.
    """

    PARTS: ClassVar[tuple[str, ...]]
    DTYPES: ClassVar[tuple[torch.dtype, ...]]
    ZERO: ClassVar[int]  # what is added to a code so that none is negative
    bits: int = 8

    def spec(self, shape: torch.Size) -> dict[str, tuple[torch.Size, torch.dtype]]:
        count = shape.numel()
        sizes = [self._bytes(count)] + [-(-count // BLOCK)] * (len(self.PARTS) - 1)
        dtypes = self.DTYPES if self.bits == 8 else (torch.uint8, *self.DTYPES[1:])
        return {part: (torch.Size((size,)), dtype) for part, size, dtype in zip(self.PARTS, sizes, dtypes, strict=True)}

    def _bytes(self, elements: int) -> int:
        """Of the codes of so many elements from the beginning of a block."""
        return elements if self.bits == 8 else -(-elements // 2)

    def encode_(self, values: Tensor, parts: Mapping[str, Tensor], *, seed: Seed | None) -> None:
        flat = values.float().reshape(-1)
        for elements, own in self._pieces(parts, len(flat)):
            blocks = flat[elements].view(len(own["codes"]), -1)
            codes, *others = self.encode_blocks(blocks, _noise(blocks, seed=advance(seed, elements.start)))
            new = [self._pack(codes), *others]
            for part, tensor in zip(own.values(), new, strict=True):
                part.copy_(tensor)

    def decode(self, parts: Mapping[str, Tensor], *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        pieces = list(self._pieces(parts, shape.numel()))
        decoded = (self._decode_piece(own, elements.stop - elements.start) for elements, own in pieces)
        if len(pieces) == 1:  # always in compiled code, where a copy would not be made of vectors
            return next(decoded).view(shape).to(dtype)
        values = torch.empty(shape.numel(), dtype=dtype, device=parts["codes"].device)
        for (elements, _), piece in zip(pieces, decoded, strict=True):
            values[elements] = piece.view(-1)
        return values.view(shape)

    def _decode_piece(self, own: Mapping[str, Tensor], elements: int) -> Tensor:
        codes, *others = own.values()
        return self.decode_blocks(self._unpack(codes, elements // len(codes)), *(other.float() for other in others))

    def _pack(self, codes: Tensor) -> Tensor:
        """As they are kept. (blocks, width) float32 -> (blocks, width or half of it)"""
        if self.bits == 8:
            return codes  # to be converted while they are copied
        codes = (codes + self.ZERO).to(torch.uint8)
        half = -(-codes.shape[1] // 2)
        low, high = codes[:, :half], codes[:, half:]
        if high.shape[1] < half:
            high = torch.nn.functional.pad(high, (0, 1))
        return low | (high << 4)

    def _unpack(self, codes: Tensor, width: int) -> Tensor:
        """The inverse of _pack, float32."""
        if self.bits == 8:
            return codes.float()
        return torch.cat((codes & 15, codes >> 4), dim=1)[:, :width].float().sub_(self.ZERO)

    def _pieces(self, parts: Mapping[str, Tensor], count: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Ranges of `count` elements, their parts with a row for each block; a last short block comes by itself."""
        codes, *others = (parts[name] for name in self.PARTS)
        whole, width = count - count % BLOCK, self._bytes(BLOCK)
        if whole:
            table = [
                codes.view(-1)[: self._bytes(whole)].view(-1, width),
                *(other[: whole // BLOCK].view(-1, 1) for other in others),
            ]
            for rows in row_chunks(whole // BLOCK, BLOCK, device=codes.device):
                own = [part[rows] for part in table]
                yield slice(rows.start * BLOCK, rows.stop * BLOCK), dict(zip(self.PARTS, own, strict=True))
        if whole < count:
            last = [codes.view(-1)[self._bytes(whole) :].view(1, -1), *(other[-1:].view(1, 1) for other in others)]
            yield slice(whole, count), dict(zip(self.PARTS, last, strict=True))

    def in_blocks(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of whole blocks as views with a row for each of them."""
        width = self._bytes(BLOCK)
        return {name: part.view(-1, width if name == "codes" else 1) for name, part in parts.items()}

    def rows(self, parts: Mapping[str, Tensor], rows: slice, *, width: int) -> dict[str, Tensor]:
        if parts["codes"].ndim == 2:  # in blocks
            return {name: part[rows] for name, part in parts.items()}
        elements = slice(rows.start * width, rows.stop * width)
        assert elements.start % BLOCK == 0, "a shard begins with a block"
        blocks = slice(elements.start // BLOCK, -(-elements.stop // BLOCK))
        codes = slice(self._bytes(elements.start), self._bytes(elements.stop))
        return {name: part[codes if name == "codes" else blocks] for name, part in parts.items()}

    def encode_blocks(self, x: Tensor, noise: Tensor | float) -> tuple[Tensor, ...]:
        """Codes (blocks, width), float32, and the other parts (blocks, 1) of values x (blocks, width).

        noise: uniform in [0, 1), the same shape, rounds at random; 0.5 rounds to nearest.
        """
        raise NotImplementedError

    def decode_blocks(self, c: Tensor, *others: Tensor) -> Tensor:
        """The values of codes c (blocks, width), in a new tensor. others: (blocks, 1). All are given as float32."""
        raise NotImplementedError


# Compiled code computes a value again for each use, up to about 30 operations; beyond, it keeps a whole tensor in
# memory and leaves vector code. So below, nothing that comes after the noise is used twice.


@dataclass(frozen=True)
class Power(Blockwise):
    """Signed values as fourth powers of codes. See above."""

    PARTS: ClassVar[tuple[str, ...]] = ("codes", "scale")
    DTYPES: ClassVar[tuple[torch.dtype, ...]] = (torch.int8, torch.float32)
    ZERO: ClassVar[int] = 8

    def encode_blocks(self, x: Tensor, noise: Tensor | float) -> tuple[Tensor, ...]:
        maximum, top = x.abs().amax(1, keepdim=True), MAX_CODE[self.bits]
        y = x.abs().mul_(top**4 / maximum.clamp_min(_TINY))
        c = y.sqrt().sqrt_().floor_().clamp_max_(top - 1)  # c**4 <= y, but for a last bit
        square = c * c
        step = (2 * c + 1) * (2 * (square + c) + 1)  # (c + 1)**4 - c**4
        fraction = (y - square * square).div_(step).clamp_max_(1.0)
        up = (fraction - noise).ceil_()  # of (-1, 1]: 0 or 1
        return c.add_(up).mul_(x.sign()), maximum * top**-4.0

    def decode_blocks(self, c: Tensor, *others: Tensor) -> Tensor:
        (scale,) = others
        return (c * c).mul_(c * c.abs()).mul_(scale)


@dataclass(frozen=True)
class Log(Blockwise):
    """Values that are not negative by their logarithms; a negative value counts as zero. See above."""

    PARTS: ClassVar[tuple[str, ...]] = ("codes", "scale", "steps")
    DTYPES: ClassVar[tuple[torch.dtype, ...]] = (torch.uint8, torch.float32, torch.uint8)
    ZERO: ClassVar[int] = 0

    def encode_blocks(self, x: Tensor, noise: Tensor | float) -> tuple[Tensor, ...]:
        maximum, most = x.amax(1, keepdim=True), MAX_STEPS[self.bits]
        lowest = torch.maximum(_lowest_positive(x), maximum * MAX_SPAN[self.bits]).clamp_min(_TINY)
        span = ((maximum / lowest).clamp_min(1.0).view(torch.int32) - _ONE).float()
        steps = (most * _OCTAVE / span.clamp_min(_OCTAVE)).floor()
        octaves = (x / lowest).clamp_min(1.0).view(torch.int32) - _ONE
        position = octaves.float().mul_(steps / _OCTAVE)
        code = (position + noise).floor_().clamp_max_(most).add_(1).mul_(x.sign()).clamp_min_(0)
        return code, lowest + 0 * maximum, steps.to(torch.uint8)

    def decode_blocks(self, c: Tensor, *others: Tensor) -> Tensor:
        scale, steps = others
        bits = ((c - 1) * (_OCTAVE / steps.clamp_min(1.0))).to(torch.int32).add_(_ONE)
        return (bits.view(torch.float32) * c.clamp_max(1.0)).mul_(scale)


def _lowest_positive(x: Tensor) -> Tensor:
    """The smallest positive value of each row, (blocks, 1); 0 or less if there is none.

    As unsigned integers, the bits of positive floats ascend, and those of negative ones come after them; minus one, the
    bits of zero come last. The highest bit is turned because torch's integers are signed.
    """
    order = (x.view(torch.int32) - 1).bitwise_xor_(-(2**31))
    return (order.amin(1, keepdim=True).bitwise_xor_(-(2**31)) + 1).view(torch.float32)


def row_multiple(width: int) -> int:
    """Rows of that width can be cut at multiples of this number."""
    return BLOCK // math.gcd(BLOCK, width)


def _noise(values: Tensor, *, seed: Seed | None) -> Tensor | float:
    """Uniform in [0, 1), 16 bits: their sum with a position below 256 is exact in float32. Without a seed, 0.5."""
    if seed is None:
        return 0.5
    bits = random_bits(values.numel(), seed=seed, device=values.device)
    return bits.bitwise_and_(0xFFFF).float().mul_(2.0**-16).view_as(values)
