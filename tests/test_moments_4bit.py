"""Moments in 4 bits: half the bytes of 8 bits, unbiased, cut and compiled as they are."""

import pytest
import torch
from support.gradients import relative_error

from qgalore.optimizer import LowRankOptimizer
from qgalore.rules.moments import MomentKind, create_moments, open_moments
from qgalore.storage import chunks
from qgalore.storage.blockwise import BLOCK, Log, Power
from qgalore.storage.stored import Stored

CODECS = pytest.mark.parametrize("codec", [Power(4), Log(4)], ids=["first", "second"])


def values_for(codec, count):
    values = torch.randn(count) * 10 ** torch.randn(count)
    return values if isinstance(codec, Power) else values.square()


def stored(codec, values, *, seed=0):
    kept = Stored.zeros(codec, values.shape, device="cpu")
    kept.write(values, seed=seed)
    return kept


@CODECS
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 1000, 2560])
def test_two_codes_share_a_byte(codec, count):
    kept = stored(codec, values_for(codec, count))
    assert kept.parts["codes"].dtype == torch.uint8 and kept.parts["codes"].numel() == -(-count // 2)
    assert kept.read(torch.float32).shape == (count,)


@CODECS
def test_what_is_a_code_stays(codec):
    once = stored(codec, values_for(codec, 1000)).read(torch.float32)
    again = stored(codec, once, seed=7).read(torch.float32)
    assert relative_error(again, once) < 1e-6


@CODECS
def test_rounding_is_unbiased(codec):
    """Of values within the span of their block."""
    values = torch.rand(BLOCK) * 0.9 + 0.1
    mean = torch.stack([stored(codec, values, seed=seed).read(torch.float32) for seed in range(4000)]).mean(0)
    assert (mean / values - 1).abs().max() < 0.05
    assert (mean / values - 1).mean().abs() < 0.002


def test_a_second_moment_never_rounds_to_zero_or_far_below_its_span():
    values = torch.logspace(-12, 0, BLOCK)
    decoded = stored(Log(4), values).read(torch.float32)
    assert decoded.min() >= 0.99 * 2.0**-14 and decoded.max() <= 1.001


@CODECS
def test_zero_stays_zero(codec):
    assert not stored(codec, torch.zeros(1000)).read(torch.float32).any()
    assert not Stored.zeros(codec, torch.Size((1000,)), device="cpu").read(torch.float32).any()


@CODECS
def test_rows_and_pieces_are_those_of_the_whole(codec, monkeypatch):
    values = values_for(codec, 32 * 128).view(32, 128)
    whole, cut = stored(codec, values, seed=5), Stored.zeros(codec, values.shape, device="cpu")
    for start in range(0, 32, 8):
        rows = cut.rows(slice(start, start + 8))
        rows.write(values[start : start + 8], seed=5)
        assert torch.equal(rows.read(torch.float32), whole.read(torch.float32)[start : start + 8])
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 2 * BLOCK)
    pieces = stored(codec, values, seed=5)
    for other in (cut, pieces):
        assert all(torch.equal(other.parts[name], part) for name, part in whole.parts.items())


def test_a_state_says_how_many_bits_it_has():
    kind = MomentKind("exp_avg", True, torch.Size((64, 128)))
    for bits, size in ((8, 64 * 128), (4, 64 * 64)):
        state = {}
        create_moments(state, [kind], bits=bits, dtype=torch.float32, device=torch.device("cpu"))
        assert state["exp_avg.codes"].numel() == size
        (moment,) = open_moments(state, [kind], dtype=torch.float32, seed=1)
        assert moment.stored.codec == Power(bits)


@pytest.mark.parametrize("settings", [dict(), dict(rank=32), dict(rank=32, lift="fira", proj_bits=4)])
def test_compiled_equals_eager(settings):
    """One update from the same gradient: but for a few codes at a rounding's edge, the same."""
    values, G = torch.randn(128, 128), torch.randn(128, 128)
    found = []
    for compile in (False, True):
        torch._dynamo.reset()
        p = torch.nn.Parameter(values.clone())
        optimizer = LowRankOptimizer([{"params": [p], "state_bits": 4, **settings}], compile=compile)
        p.grad = G.clone()
        optimizer.step()
        found.append((p.detach(), optimizer.state[p]["exp_avg.codes"], optimizer.state[p]["exp_avg_sq.codes"]))
    for ours, theirs in zip(*found, strict=True):
        assert (
            (ours != theirs).float().mean() < 0.01
            if ours.dtype == torch.uint8
            else torch.allclose(ours, theirs, atol=1e-5)
        )


def test_adam_stays_near_adam():
    """A hundred steps on noisy gradients: the way that Adam in float32 goes, with noise of a quarter of its length."""
    ends = []
    for bits in (32, 4):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(64, 128))
        optimizer = LowRankOptimizer([{"params": [p], "state_bits": bits}], lr=1e-2)
        mean = torch.randn(64, 128, generator=generator)
        for _ in range(100):
            p.grad = mean + torch.randn(64, 128, generator=generator)
            optimizer.step()
        ends.append(p.detach())
    assert relative_error(ends[1], ends[0]) < 0.35
    assert (ends[1] * ends[0]).sum() / ends[0].square().sum() == pytest.approx(1, abs=0.1)
