import pytest
import torch

from qgalore.quantize import mix_seed, random_bits, round_stochastic_bfloat16, store_weight


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


def test_mixed_seeds_are_distinct_and_ordered():
    seeds = {mix_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert all(0 <= seed < 1 << 64 for seed in seeds)


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


def test_small_updates_of_a_bfloat16_weight_are_not_lost():
    """300 updates of 1/4000 of the weight: to nearest, none would ever register."""
    weight = torch.ones(20_000, dtype=torch.bfloat16)
    for step in range(300):
        store_weight(weight, weight.float() + 2.5e-4, seed=mix_seed(0, step))
    assert weight.float().mean().item() == pytest.approx(1.075, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_are_stored_as_they_are(dtype):
    weight, values = torch.zeros(5, dtype=dtype), torch.randn(5, dtype=dtype)
    store_weight(weight, values, seed=1)
    assert torch.equal(weight, values)
