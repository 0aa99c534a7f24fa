"""Stateless noise and stochastic rounding.

The noise of an element is a hash of (seed, step, parameter, element): nothing draws from a random number generator
during an optimizer step. So replicas stay bit-identical, a resumed run repeats the same noise, and a shard of a
parameter rounds as it would inside the whole. Eager and compiled code get the same bits.
"""

import torch
from torch import Tensor

Seed = int | tuple[Tensor, Tensor]  # 64 bits, or their two halves as seed_tensors makes them

_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # by which neighbours' hashes differ: 2**32 over the golden ratio


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
    """The lower and the upper 32 bits as 0-d int32 tensors: torch.compile would make a Python number a constant."""
    low, high = (torch.tensor(_as_int32(half), dtype=torch.int32) for half in (seed, seed >> 32))
    return low, high


def advance(seed: Seed | None, elements: int) -> Seed | None:
    """The seed with which the noise of element i is that of element i + elements. None stays None.

    So a shard or a chunk rounds as it would inside the whole.
    """
    if seed is None or not elements:
        return seed
    step = elements * _GOLDEN
    if isinstance(seed, int):
        return (seed >> 32 << 32) | ((seed + step) & _MASK32)
    low, high = seed
    return low + _as_int32(step), high


def random_bits(count: int, *, seed: Seed, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each of `count` elements: a hash of (seed, element index).

    seed: 64 bits from mix_seed, or their seed_tensors.
    Returns (count,) int32 on `device`.

    The mixing is MurmurHash3's 32-bit finalizer (Appleby, public domain), keyed at its start and in its middle, in
    int32 arithmetic that wraps around. Its right shifts must be logical, hence the masks.
    """
    low, high = (_as_int32(seed), _as_int32(seed >> 32)) if isinstance(seed, int) else seed
    h = torch.arange(count, dtype=torch.int32, device=device)
    if torch.compiler.is_compiling():
        # It changes nothing. Without it, torch.compile takes the product for an index, which must not wrap around.
        h.bitwise_and_(0x7FFFFFFF)
    h.mul_(_as_int32(_GOLDEN)).add_(low)
    h.bitwise_xor_(h.bitwise_right_shift(16).bitwise_and_(0xFFFF)).mul_(_as_int32(0x85EBCA6B))
    h.bitwise_xor_(high)
    h.bitwise_xor_(h.bitwise_right_shift(13).bitwise_and_(0x7FFFF)).mul_(_as_int32(0xC2B2AE35))
    return h.bitwise_xor_(h.bitwise_right_shift(16).bitwise_and_(0xFFFF))


def round_stochastic(values: Tensor, *, seed: Seed) -> Tensor:
    """Rounds to whole numbers in place: up with a probability equal to the fraction (to 24 bits of it), else down.

    values: float32, any shape.
    seed: 64 bits from mix_seed.

    The fraction is compared with the noise, not added to it: a sum near 100 would keep only 17 of the bits.
    """
    noise = random_bits(values.numel(), seed=seed, device=values.device)
    noise = noise.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).view(values.shape)
    floor = values.floor()
    fraction = values.sub_(floor)  # exact
    return fraction.sub_(noise.to(torch.float32).mul_(2.0**-24)).ceil_().add_(floor)  # ceil of (-1, 1): 0 or 1


def round_stochastic_bfloat16(values: Tensor, *, seed: Seed) -> Tensor:
    """Rounds float32 to bfloat16, up or down at random, so that the expected value is the value itself.

    values: float32, any shape.
    seed: 64 bits from mix_seed.
    Returns a bfloat16 tensor of the same shape. Infinities and NaN stay what they are.

    A bfloat16 is the upper half of a float32: adding 16 random bits below the cut carries with the right probability.
    """
    noise = random_bits(values.numel(), seed=seed, device=values.device).bitwise_and_(0xFFFF)
    bits = values.contiguous().view(torch.int32) + noise.view(values.shape)
    rounded = bits.bitwise_and_(-0x10000).view(torch.float32)  # exactly representable now
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
