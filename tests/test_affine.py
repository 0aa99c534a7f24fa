"""Affine codes of 8 and 4 bits: how close they come, that small updates add up in them, and bases kept in them."""

import itertools

import pytest
import torch

from qgalore.storage.affine import Affine, Simulated, check_finite, group_size_for, pack_nibbles, unpack_nibbles
from qgalore.storage.rounding import mix_seed
from qgalore.storage.stored import Stored


def packed(values: torch.Tensor, *, bits: int = 4) -> Stored:
    """Rounded to nearest, in groups of at most 256."""
    codec = Affine.fitting(values.shape[1], bits=bits, at_most=256)
    return Stored(codec, codec.encode(values), values.shape)


def stored_bytes(stored: Stored) -> int:
    return sum(part.numel() * part.element_size() for part in stored.parts.values())


def quantized(values: torch.Tensor, *, group_size: int, bits: int = 8, seed: int | None = None):
    """Decoded values, and each element's step."""
    m, n = values.shape
    codec = Affine(bits, group_size)
    parts = codec.encode(values, seed=seed)
    codes, scale, zero = parts["codes"], parts["scale"], parts["zero"]
    assert codes.dtype == zero.dtype == torch.uint8 and scale.dtype == torch.float32
    assert codes.shape == ((m, n // group_size, group_size) if bits == 8 else (m, (n + 1) // 2))
    assert scale.shape == zero.shape == (m, n // group_size) and codec.shape_of(parts) == values.shape
    assert int(zero.max()) < 2**bits
    return codec.decode(parts, shape=values.shape, dtype=torch.float32), scale.repeat_interleave(group_size, dim=1)


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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_becomes_finite(bad, bits):
    values = torch.randn(4, 64)
    values[2, 5] = bad
    for kind, seed in itertools.product((Affine, Simulated), (None, 3)):
        codec = kind(bits, 16)
        parts = codec.encode(values, seed=seed)
        decoded = codec.decode(parts, shape=values.shape, dtype=torch.float32)
        assert not decoded[2, :16].isfinite().any()
        assert decoded.isfinite().sum() == 4 * 64 - 16, "other groups are not touched"
        with pytest.raises(ValueError, match="layer 3: 1 of 16 groups"):
            check_finite(codec.magnitudes(parts), name="layer 3")
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


def drift(values: torch.Tensor, *, update: float, updates: int) -> torch.Tensor:
    """How far INT8 weights move, as a share of `updates` times `update` of a step, in each element."""
    stored = packed(values, bits=8)
    start, delta = stored.read(torch.float32), (stored.parts["scale"] * update).repeat_interleave(256, dim=1)
    for step in range(updates):
        stored.write(stored.read(torch.float32) + delta, seed=mix_seed(1, step))
    return (stored.read(torch.float32) - start).double() / (updates * delta)


@pytest.mark.parametrize(
    "update, updates, rows",
    [
        (1e-1, 200, 128),
        (1e-2, 200, 1024),
        pytest.param(1e-3, 200, 6000, marks=pytest.mark.slow),
        (1e-4, 100, 4000),
        pytest.param(1e-5, 100, 4000, marks=pytest.mark.slow),
    ],
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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1)])
def test_smallest_matrices(shape, bits):
    codec, values = Affine(bits, max(1, shape[1])), torch.ones(shape)
    assert torch.equal(codec.decode(codec.encode(values), shape=values.shape, dtype=torch.float32), values)


@pytest.mark.parametrize("width", [0, 1, 2, 7, 256])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_nibbles_round_trip(rows, width):
    """Every row has bytes of its own: an odd one's last byte holds nothing of the next row."""
    codes = torch.randint(16, (rows, width), dtype=torch.uint8)
    nibbles = pack_nibbles(codes)
    assert nibbles.shape == (rows, (width + 1) // 2)
    assert torch.equal(unpack_nibbles(nibbles, width=width), codes)
    assert torch.equal(nibbles[:, : width // 2], codes[:, 0 : width - width % 2 : 2] + 16 * codes[:, 1::2])
    if width % 2:
        assert torch.equal(nibbles[:, -1], codes[:, -1])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m, n, groups", [(64, 1024, 4), (33, 7, 1), (3, 257, 257), (40, 5461, 43)])
def test_bits_over_8_an_element_and_5_a_group(m, n, groups, bits):
    """And half a byte for a row of an odd number of 4-bit codes."""
    codec = Affine.fitting(n, bits=bits, at_most=256)
    parts = codec.encode(torch.randn(m, n))
    assert stored_bytes(Stored(codec, parts, torch.Size((m, n)))) == m * (-(-n * bits // 8) + 5 * groups)
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == codec.spec(torch.Size((m, n)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", [None, 5])
def test_simulated_values_are_those_of_the_codes(bits, seed):
    values = torch.randn(301, 5461)
    found = []
    for kind in (Affine, Simulated):
        codec = kind(bits, 127)
        found.append(codec.decode(codec.encode(values, seed=seed), shape=values.shape, dtype=torch.float32))
    assert torch.equal(*found)


def test_without_stochastic_a_seed_changes_nothing():
    values = torch.randn(8, 64)
    for bits in (8, 4):
        nearest = Affine(bits, 32).encode(values)["codes"]
        assert torch.equal(Affine(bits, 32, stochastic=False).encode(values, seed=3)["codes"], nearest)
        assert not torch.equal(Affine(bits, 32).encode(values, seed=3)["codes"], nearest)


def test_compiled_code_agrees_bit_for_bit():
    """Eager code works in chunks of rows and compiled code at once: this also compares those."""

    def everything(values):
        four, eight = Affine(4, 127), Affine(8, 127)
        to_nearest = four.encode(values)
        at_random = eight.encode(values, seed=mix_seed(3))
        decoded = [
            four.decode(to_nearest, shape=values.shape, dtype=torch.float32),
            eight.decode(at_random, shape=values.shape, dtype=torch.bfloat16),
        ]
        unpacked = unpack_nibbles(to_nearest["codes"], width=values.shape[1])
        return *to_nearest.values(), *at_random.values(), pack_nibbles(unpacked), unpacked, *decoded

    values = torch.randn(301, 5461 // 127 * 127) * torch.logspace(-38, 37, 301).view(-1, 1)
    values[7] = 0
    assert values.numel() > 1 << 17, "several chunks"
    for eager, compiled in zip(everything(values), torch.compile(everything, fullgraph=True)(values), strict=True):
        assert torch.equal(eager, compiled)


# Bases


def orthonormal(m: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(m, r))[0]


@pytest.mark.parametrize("bits, levels", [(4, 15), (8, 255)])
@pytest.mark.parametrize("shape", [(512, 64), (33, 7), (1, 1), (3, 5), (40, 512)])
def test_every_element_comes_back_within_half_a_step(shape, bits, levels):
    P = torch.randn(shape)
    stored = packed(P, bits=bits)
    back, scale = stored.read(torch.float32), stored.parts["scale"]
    groups = P.unflatten(1, (scale.shape[1], -1)).double()
    widest = (groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)) / (levels - 1)
    assert (scale <= widest * (1 + 1e-6)).all(), "the step is no wider than it must be"
    error = (back - P).abs().unflatten(1, (scale.shape[1], -1)).amax(-1)
    assert (error <= scale * (0.5 + 1e-4)).all()


def test_two_codes_share_a_byte():
    stored = packed(orthonormal(512, 256))
    assert stored.parts["codes"].shape == (512, 128)
    assert stored_bytes(stored) == 512 * 128 + 512 * 5
    assert packed(torch.randn(3, 5)).parts["codes"].shape == (3, 3), "5 codes: a row's last byte is half empty"
    assert stored_bytes(packed(orthonormal(512, 256), bits=8)) == 512 * 256 + 512 * 5


@pytest.mark.parametrize("bits, error, overlap", [(4, 0.105, 0.990), (8, 0.0065, 0.9999)])
def test_a_basis_keeps_its_span(bits, error, overlap):
    """The figures in docs/notebook.md, with 1% to spare."""
    P = orthonormal(1376, 128)
    back = packed(P, bits=bits).read(torch.float32)
    assert (back - P).norm() / P.norm() < error
    assert (torch.linalg.qr(back)[0].mT @ P).square().sum() / 128 > overlap
    assert torch.linalg.matrix_norm(back.mT @ back - torch.eye(128), 2) < 2.2 * error


def test_rows_do_not_disturb_each_other():
    """A large row would coarsen its neighbours' grid, were the groups taken from the flattened basis."""
    P = torch.randn(64, 32)
    P[7] *= 1000
    back = packed(P).read(torch.float32)
    error = (back - P).norm(dim=1) / P.norm(dim=1)
    assert error.max() < 0.15


def test_parts_are_plain_tensors_that_save_and_load(tmp_path):
    P = orthonormal(96, 24)
    stored = packed(P)
    torch.save(stored.parts, tmp_path / "basis.pt")
    loaded = Stored(stored.codec, torch.load(tmp_path / "basis.pt", weights_only=True), stored.shape)
    assert torch.equal(loaded.read(torch.float32), stored.read(torch.float32))
    half = stored.read(torch.bfloat16)
    assert torch.equal(half, stored.read(torch.float32).bfloat16()), "rounded once, at the end"


def test_nan_stays_nan():
    P = orthonormal(16, 8)
    P[3, 4] = float("nan")
    back = packed(P).read(torch.float32)
    assert not back[3].isfinite().any()
    assert back[[0, 1, 2, 4]].isfinite().all()


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        packed(torch.randn(4, 4), bits=3)
