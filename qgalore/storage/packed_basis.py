"""Bases of a gradient's subspace in 4 or 8 bits, as plain tensors for the optimizer's state.

A basis (m, r) is rounded in groups along its rows: a row holds what the r directions have to do with one
input or output of the layer, and some of these matter far more than others, while the columns are all of length one.
A scale that only neighbours in a row share follows that; groups of the flattened basis mix rows wherever r < 256.
Source: Zhang et al. 2024, Q-GaLore, arXiv 2407.08296, section 3 (projection matrices in INT4).

What it does to an orthonormal basis, in groups of at most 256. `error` is ||P' - P||_F / ||P||_F, `norm` the spectral
norm of P'^T P' - I, `mean` its Frobenius norm / sqrt(r), `overlap` how much of P's span is left in that of P',
||orth(P')^T P||_F^2 / r. P is the Q of a Gaussian matrix, seed 0; `uneven`: its rows scaled by exp(N(0, 1)) before.

    rows     m     r  bits  bytes/element  error   norm  mean   overlap
    even     512    64   4      0.578      0.094   0.11  0.051  0.9924
    even    1376   128   4      0.539      0.104   0.10  0.047  0.9904
    even    2048   256   4      0.520      0.113   0.13  0.058  0.9890
    even    4096   512   4      0.520      0.113   0.13  0.059  0.9889
    even    2048   256   8      1.020      0.006   0.01  0.003  1.0000
    uneven   512    64   4      0.578      0.096   0.19  0.087  0.9944
    uneven  1376   128   4      0.539      0.109   0.24  0.096  0.9926
    uneven  2048   256   4      0.520      0.120   0.33  0.112  0.9916
    uneven  4096   512   4      0.520      0.116   0.31  0.107  0.9921
    uneven  2048   256   8      1.020      0.007   0.02  0.006  1.0000

The flattened basis in groups of 256 instead, 512 x 64 in 4 bits: 0.520 bytes an element, errors 0.113 and, uneven,
0.158; by columns, 0.113 and 0.175.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore.storage.affine import (
    Seed,
    dequantize_groups,
    group_size_for,
    pack_nibbles,
    quantize_groups,
    unpack_nibbles,
)


class PackedBasis(NamedTuple):
    """codes: uint8, (ceil(m * r / 2),) with two to a byte for 4 bits, (m, r/g, g) for 8.  scale: (m, r/g) float32.
    zero: (m, r/g) uint8."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def pack_basis(values: Tensor, *, bits: int = 4, group_size: int = 256, seed: Seed | None = None) -> PackedBasis:
    """Rounds a basis to 4 or 8 bits.

    values: (m, r), any floating dtype.  group_size: the groups' largest size; -1 makes a row one group.
    seed: 64 bits, to round stochastically, as a basis must that moves in small steps; None: to nearest.
    Takes bits/8 bytes an element and 5 a group. NaN in a group makes all of it NaN.
    """
    if bits not in (4, 8):
        raise ValueError(f"a basis is kept in 4 or 8 bits, not {bits}")
    size = group_size_for(values.shape[1], at_most=group_size)
    codes, scale, zero = quantize_groups(values, group_size=size, bits=bits, seed=seed)
    return PackedBasis(pack_nibbles(codes) if bits == 4 else codes, scale, zero)


def unpack_basis(packed: PackedBasis, *, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The basis that pack_basis packed. shape: its (m, r).  Returns (m, r) `dtype`, not quite orthonormal."""
    codes, scale, zero = packed
    groups = (*scale.shape, shape[1] // scale.shape[1])  # (m, r/g, g)
    if codes.ndim == 1:
        codes = unpack_nibbles(codes, count=shape[0] * shape[1]).view(groups)
    return dequantize_groups(codes, scale, zero, dtype=dtype)


@dataclass(frozen=True)
class LearningBasis:
    """A packed basis as quantize.read_weight and store_weight see a weight: small steps add up, by stochastic rounding.

    parts: those of a PackedBasis, written in place.  shape: (m, r).  bits, group_size: as in pack_basis.
    """

    parts: tuple[Tensor, ...]
    shape: tuple[int, int]
    bits: int
    group_size: int

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values. (m, r) `dtype`"""
        return unpack_basis(PackedBasis(*self.parts), shape=self.shape, dtype=dtype)

    def store_(self, values: Tensor, *, seed: Seed) -> None:
        """Rounds new values, with new scales and zero points. values: (m, r)."""
        packed = pack_basis(values, bits=self.bits, group_size=self.group_size, seed=seed)
        for part, new in zip(self.parts, packed, strict=True):
            part.copy_(new)
