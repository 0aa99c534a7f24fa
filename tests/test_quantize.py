import math

import pytest
import torch

from qgalore.storage import affine as quantize
from qgalore.storage.affine import (
    check_finite,
    dequantize_groups,
    group_size_for,
    mix_seed,
    pack_nibbles,
    quantize_groups,
    random_bits,
    round_stochastic_bfloat16,
    store_weight,
    unpack_nibbles,
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


# The affine group quantizer


def quantized(values: torch.Tensor, *, group_size: int, bits: int = 8, seed: int | None = None):
    """Decoded values, and each element's step."""
    codes, scale, zero = quantize_groups(values, group_size=group_size, bits=bits, seed=seed)
    assert codes.dtype == zero.dtype == torch.uint8 and scale.dtype == torch.float32
    assert codes.shape == (values.shape[0], values.shape[1] // group_size, group_size)
    assert int(codes.max()) < 2**bits and int(zero.max()) < 2**bits
    return dequantize_groups(codes, scale, zero), scale.repeat_interleave(group_size, dim=1)


@pytest.mark.parametrize("width, size", [(5461, 127), (1376, 172), (11008, 256), (4096, 256), (100, 100), (257, 1)])
def test_group_size_is_the_largest_divisor(width, size):
    assert group_size_for(width, at_most=256) == size
    assert group_size_for(width, at_most=-1) == width


@pytest.mark.parametrize("size", [0, -2])
def test_impossible_group_sizes_are_refused(size):
    with pytest.raises(ValueError, match="out of range"):
        group_size_for(64, at_most=size)


ROW = torch.linspace(-1, 1, 32)
GROUPS = {
    "ordinary": ROW,
    "positive": ROW + 1.5,
    "negative": ROW - 1.5,
    "far from zero": ROW * 1e-3 + 5,
    "far below zero": ROW * 1e-3 - 5,
    "constant": torch.full((32,), 0.3),
    "constant, negative": torch.full((32,), -0.3),
    "zero": torch.zeros(32),
    "one element": torch.eye(32)[5] * 7,
    "barely negative": ROW.clamp_min(-1e-6),
    "barely positive": ROW.clamp_max(1e-6),
    "huge": ROW * 3e38,
    "huge, positive": ROW.abs() * 1e38,
    "tiny": ROW * 1e-38,
    "subnormal": ROW * 1e-41,
    "the smallest": torch.eye(32)[5] * 2.0**-149,
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", GROUPS)
def test_any_group_decodes_within_half_a_step(name, bits):
    """Reference code clamps zero points into the codes' range, and decodes one-signed groups with 50% error."""
    values = GROUPS[name].view(1, -1)
    low, high = min(values.double().min().item(), 0), max(values.double().max().item(), 0)
    step = max((high - low) / (2**bits - 2) * (1 + 1e-6), 0) + 2 * 2.0**-149
    for seed, steps in ((None, 0.5), (3, 1.0)):
        decoded, scale = quantized(values, group_size=32, bits=bits, seed=seed)
        assert (scale <= step).all()
        assert ((decoded.double() - values.double()).abs() <= steps * scale.double() * (1 + 1e-4)).all()
        assert (decoded[values == 0] == 0).all(), "zero is on every grid"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_becomes_finite(bad):
    values = torch.randn(4, 64)
    values[2, 5] = bad
    for seed in (None, 3):
        codes, scale, zero = quantize_groups(values, group_size=16, seed=seed)
        decoded = dequantize_groups(codes, scale, zero)
        assert not decoded[2, :16].isfinite().any()
        assert decoded.isfinite().sum() == 4 * 64 - 16, "other groups are not touched"
        with pytest.raises(ValueError, match="layer 3: 1 of 16 groups"):
            check_finite(scale, name="layer 3")
    check_finite(torch.ones(3), name="fine")


@pytest.mark.parametrize("fraction", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_group_rounding_is_unbiased(fraction):
    """100,000 draws at a fraction of a step above code 100 of 255."""
    codes = torch.full((1000, 102), 100 + fraction)
    codes[:, 0], codes[:, 1] = 0, 255
    step = 0.01
    decoded, scale = quantized((codes - 120) * step, group_size=102, seed=mix_seed(5))
    assert scale.max().item() == pytest.approx(step)
    mean = decoded[:, 2:].double().mean().item() / step + 120
    deviation = (fraction * (1 - fraction) / 100_000) ** 0.5
    assert abs(mean - 100 - fraction) < 5 * deviation + 1.5e-5  # float32 cannot say 100.00001 more exactly


@pytest.mark.parametrize("value", [1e-5, 0.3, 100 + 2.0**-17, -100.7, -254.99998])
def test_rounding_is_exact_over_all_the_noise_there_is(value, monkeypatch):
    """Every one of the 2^24 noise values once: the mean is the value, to 2^-24."""
    monkeypatch.setattr(quantize, "random_bits", lambda count, **_: torch.arange(count, dtype=torch.int32) << 8)
    values = torch.full((1 << 24,), value)
    exact = values[0].item()
    floor = math.floor(exact)
    rounded = quantize._round_stochastic(values, seed=0)
    up = int((rounded == floor + 1).sum())
    assert int((rounded == floor).sum()) == (1 << 24) - up
    assert abs(floor + up / 2**24 - exact) <= 2.0**-24


def drift(values: torch.Tensor, *, update: float, updates: int) -> torch.Tensor:
    """How far INT8 weights move, as a share of `updates` times `update` of a step, in each element."""
    parts = quantize_groups(values, group_size=256)
    start, delta = dequantize_groups(*parts), (parts[1] * update).repeat_interleave(256, dim=1)
    for step in range(updates):
        parts = quantize_groups(dequantize_groups(*parts) + delta, group_size=256, seed=mix_seed(1, step))
    return (dequantize_groups(*parts) - start).double() / (updates * delta)


@pytest.mark.parametrize(
    "update, updates, rows",
    [(1e-1, 200, 128), (1e-2, 200, 1024), (1e-3, 200, 6000), (1e-4, 100, 4000), (1e-5, 100, 4000)],
)
def test_small_updates_of_int8_weights_are_not_lost(update, updates, rows):
    """To nearest, all of the drift is lost below half a step. Less than 1% may be, besides what chance explains."""
    moved = drift(torch.randn(rows, 256), update=update, updates=updates).mean().item()
    chance = (updates * update * rows * 256) ** -0.5  # one standard deviation
    assert abs(moved - 1) < max(0.01, 4 * chance)


def test_a_groups_extremes_drift_with_the_others():
    """A grid that ends where the group ends, but with zero rounded, clamps them: half of their drift is lost."""
    values = torch.randn(8192, 256)
    moved = drift(values, update=0.1, updates=20)
    for extreme in (values.argmax(1, keepdim=True), values.argmin(1, keepdim=True)):
        assert moved.gather(1, extreme).mean().item() == pytest.approx(1, abs=0.03)


def test_no_update_adds_no_noise():
    """A grid that holds its values is found again, so only updates cause rounding noise."""
    decoded, scale = quantized(torch.randn(1000, 256), group_size=256, seed=mix_seed(1))
    again, _ = quantized(decoded, group_size=256, seed=mix_seed(2))
    moved = (again - decoded).abs() > 0.5 * scale
    assert moved.double().mean() < 1e-5
    assert ((again - decoded).abs()[~moved] < 1e-4 * scale[~moved]).all()


def test_a_part_of_the_noise_is_the_noise_of_the_part():
    assert torch.equal(random_bits(60, seed=7, start=40), random_bits(100, seed=7)[40:])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1)])
def test_smallest_matrices(shape):
    codes, scale, zero = quantize_groups(torch.ones(shape), group_size=max(1, shape[1]))
    assert torch.equal(dequantize_groups(codes, scale, zero), torch.ones(shape))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 256])
def test_nibbles_round_trip(count):
    codes = torch.randint(16, (count,), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.numel() == (count + 1) // 2
    assert torch.equal(unpack_nibbles(packed, count=count), codes)


def test_compiled_code_agrees_bit_for_bit():
    """Eager code works in chunks of rows and compiled code at once: this also compares those."""

    def everything(values):
        to_nearest = quantize_groups(values, group_size=127, bits=4)
        at_random = quantize_groups(values, group_size=127, seed=mix_seed(3))
        packed = pack_nibbles(to_nearest[0])
        unpacked = unpack_nibbles(packed, count=values.numel())
        return *to_nearest, *at_random, packed, unpacked, dequantize_groups(*at_random, dtype=torch.bfloat16)

    values = torch.randn(301, 5461 // 127 * 127) * torch.logspace(-38, 37, 301).view(-1, 1)
    values[7] = 0
    assert values.numel() > 1 << 17, "several chunks"
    for eager, compiled in zip(everything(values), torch.compile(everything, fullgraph=True)(values), strict=True):
        assert torch.equal(eager, compiled)
