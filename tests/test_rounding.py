"""Noise from a hash, and what rounds with it."""

import math

import pytest
import torch

from qgalore.storage import rounding
from qgalore.storage.rounding import (
    advance,
    mix_seed,
    random_bits,
    round_stochastic,
    round_stochastic_bfloat16,
    seed_tensors,
)


def test_random_bits_are_the_hash_written_out():
    """The int32 arithmetic, signed and wrapping, equals the same hash in Python's unsigned integers."""
    seed = mix_seed(3, 1, 4)
    low, high, mask = seed & 0xFFFFFFFF, seed >> 32, 0xFFFFFFFF

    def expected(index: int) -> int:
        h = (index * 0x9E3779B9 + low) & mask
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
        h ^= high
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
        return h ^ (h >> 16)

    bits = [int(b) & mask for b in random_bits(1000, seed=seed)]
    assert bits == [expected(i) for i in range(1000)]


def test_every_bit_is_fair_and_streams_do_not_follow_each_other():
    count = 1 << 18
    one, two = random_bits(count, seed=mix_seed(0, 1)), random_bits(count, seed=mix_seed(0, 2))
    tolerance = 5 * 0.5 / count**0.5  # five standard deviations
    for bit in range(32):
        ones = (one >> bit & 1).double()
        assert abs(ones.mean() - 0.5) < tolerance
        for other in (two, one.roll(1)):
            assert abs((ones == (other >> bit & 1)).double().mean() - 0.5) < tolerance


def test_noise_needs_no_random_number_generator():
    before = torch.get_rng_state()
    first = random_bits(100, seed=7)
    assert torch.equal(first, random_bits(100, seed=7))
    assert torch.equal(first[:40], random_bits(40, seed=7)), "an element's noise does not depend on the others"
    assert torch.equal(before, torch.get_rng_state())


def test_a_part_of_the_noise_is_the_noise_of_the_part():
    assert torch.equal(random_bits(60, seed=advance(7, 40)), random_bits(100, seed=7)[40:])


def test_mixed_seeds_are_distinct_and_ordered():
    seeds = {mix_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_a_seed_as_tensors_makes_the_same_noise():
    for seed in (0, 7, mix_seed(1, 2), (1 << 64) - 1):
        assert torch.equal(random_bits(100, seed=seed_tensors(seed)), random_bits(100, seed=seed))
        for elements in (1, 12345, 2**33 + 5):
            moved = random_bits(100, seed=advance(seed, elements))
            assert torch.equal(random_bits(100, seed=advance(seed_tensors(seed), elements)), moved)


@pytest.mark.parametrize("rounded", [round_stochastic, round_stochastic_bfloat16])
def test_a_part_is_rounded_as_within_the_whole(rounded):
    values = torch.randn(40, 33) * 10
    whole = rounded(values.clone(), seed=7)
    assert torch.equal(rounded(values[13:].clone(), seed=advance(7, 13 * 33)), whole[13:])
    assert not torch.equal(rounded(values[13:].clone(), seed=7), whole[13:])


# Rounding


@pytest.mark.parametrize("fraction", [0.5, 0.1, 1e-2, 1e-3])
def test_stochastic_rounding_is_unbiased(fraction):
    """1 + fraction of a step between bfloat16 neighbours, 100,000 draws; to nearest would return 1 throughout."""
    step = 2.0**-7
    value = 1 + fraction * step
    rounded = round_stochastic_bfloat16(torch.full((100_000,), value), seed=mix_seed(1, 2)).double()
    assert set(rounded.unique().tolist()) <= {1.0, 1 + step}
    deviation = step * (fraction * (1 - fraction) / 100_000) ** 0.5
    assert abs(rounded.mean() - value) < 5 * deviation + 1e-9


def test_stochastic_rounding_keeps_what_needs_no_rounding():
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-130, 3e38, float("inf"), -float("inf")]).bfloat16().float()
    rounded = round_stochastic_bfloat16(exact, seed=9)
    assert torch.equal(rounded.float(), exact)
    assert round_stochastic_bfloat16(torch.tensor([float("nan")]), seed=9).isnan().all()
    assert round_stochastic_bfloat16(torch.zeros(3, 0), seed=9).shape == (3, 0)


@pytest.mark.parametrize("value", [1e-5, 0.3, 100 + 2.0**-17, -100.7, -254.99998])
def test_rounding_is_exact_over_all_the_noise_there_is(value, monkeypatch):
    """Every one of the 2^24 noise values once: the mean is the value, to 2^-24."""
    monkeypatch.setattr(rounding, "random_bits", lambda count, **_: torch.arange(count, dtype=torch.int32) << 8)
    values = torch.full((1 << 24,), value)
    exact = values[0].item()
    floor = math.floor(exact)
    rounded = round_stochastic(values, seed=0)
    up = int((rounded == floor + 1).sum())
    assert int((rounded == floor).sum()) == (1 << 24) - up
    assert abs(floor + up / 2**24 - exact) <= 2.0**-24
