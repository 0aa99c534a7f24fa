"""The watcher of live storages against counts by hand, and against torch's own allocator."""

import random

import pytest
import torch
from torch import nn

from benchmarks.support import allocated_at_most
from qgalore.live_memory import GRANULARITY, LiveMemory
from qgalore.storage.quantized_weight import QuantizedWeight

DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


def rounded(count, itemsize=4):
    return -(-count * itemsize // GRANULARITY) * GRANULARITY


@DEVICES
@pytest.mark.parametrize("seed", range(5))
def test_random_lives_are_counted_to_the_byte(device, seed):
    """Tensors come and go in a random order; views and results in place hold no bytes of their own."""
    draw = random.Random(seed)
    alive, expected, most = [], 0, 0
    with LiveMemory() as live:
        for _ in range(60):
            if alive and draw.random() < 0.45:
                tensor = alive.pop(draw.randrange(len(alive)))
                expected -= rounded(tensor.numel())
                del tensor
            else:
                tensor = torch.empty(draw.randrange(1, 3000), device=device)
                alive.append(tensor)
                expected += rounded(tensor.numel())
                most = max(most, expected)
                view = tensor[: len(tensor) // 2].view(-1)
                view.mul_(2.0)
                del view, tensor
            assert live.bytes == expected == sum(live.kinds.values())
    assert live.peak.bytes == most


def test_tensors_from_outside_are_not_counted():
    before = torch.ones(1000)
    with LiveMemory() as live:
        before.add_(1)
        before.view(10, 100).sum()
        assert live.bytes == 0


@DEVICES
def test_a_quantized_weight_is_the_tensors_that_hold_it(device):
    with LiveMemory() as live:
        weight = nn.Parameter(QuantizedWeight.from_float(torch.randn(64, 256, device=device), group_size=64))
        parts = weight.stored().parts.values()
        assert live.bytes == sum(rounded(part.numel(), part.itemsize) for part in parts)
        live.mark("weights", parts)
        assert live.kinds["weights"] == live.bytes


def test_marks_move_bytes_between_kinds():
    with LiveMemory() as live:
        a, b = torch.empty(1000), torch.empty(2000)
        live.mark("moments", [a, a[:10]])
        assert live.kinds["moments"] == rounded(1000) and live.kinds["activations"] == rounded(2000)
        del a, b
        assert live.bytes == 0 and not any(live.kinds.values())


def test_the_peak_begins_anew():
    with LiveMemory() as live:
        kept = torch.empty(1000)
        torch.empty(5000)
        assert live.peak.bytes == rounded(1000) + rounded(5000)
        live.restart()
        assert live.peak.bytes == rounded(1000)
        torch.empty(2000)
        assert live.peak.bytes == rounded(1000) + rounded(2000)
        del kept


@DEVICES
def test_the_peak_of_each_visit(device):
    """Two parts take turns; each has a peak of its own for every visit."""
    one, two = torch.empty(1000, device=device), torch.empty(1000, device=device)
    with LiveMemory() as live:
        live.belong(0, [one])
        live.belong(1, [two])
        a = one * 2  # noqa: F841
        torch.empty(300, device=device)
        b = two * 2
        c = one + b  # noqa: F841
        del b
        assert [tuple(visit) for visit in live.peaks] == [(-1, 0), (0, 0), (1, 0), (0, 1)]
        sizes = [rounded(1000) + rounded(300), 2 * rounded(1000), 3 * rounded(1000)]
        assert [peak.bytes for peak in live.peaks.values()] == [0, *sizes]
        assert live.peak.bytes == sizes[-1]
        live.restart()
        assert live.peak.bytes == live.bytes == 2 * rounded(1000)


def test_what_is_done_once_is_counted_each_time():
    calls = []

    def function():
        calls.append(1)
        (torch.empty(700), torch.empty(900))

    done = {}
    with LiveMemory() as live:
        kept = [torch.empty(1000)]
        live.belong(0, kept)
        for _ in range(3):
            live.restart()
            live.once("key", function, done=done, of=kept[0])
            assert live.peak.bytes == live.bytes + rounded(700) + rounded(900) == sum(live.peak.kinds.values())
            kept.append(torch.empty(500))
    assert len(calls) == 1


def test_results_that_are_remembered_are_those_of_torch():
    """The second call of an operation is not run; views are, and share their storage."""
    x = torch.empty(6, 8, device="meta", dtype=torch.bfloat16).mT
    operations = [
        lambda: x @ x.mT, lambda: x.float(), lambda: x.sum(0), lambda: torch.where(x > 0, x, 1.0), lambda: x + 1,
        lambda: torch.stack([x, x]), lambda: x.argmax(1), lambda: x.reshape(-1), lambda: x[2:].mul(2.0),
    ]  # fmt: skip
    expected = [operation() for operation in operations]
    with LiveMemory():
        for operation, twin in zip(operations * 2, expected * 2, strict=True):
            result = operation()
            assert (result.shape, result.stride(), result.dtype) == (twin.shape, twin.stride(), twin.dtype)
        assert x.T.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_without_data_the_answers_are_those_of_a_good_update():
    with LiveMemory():
        x = torch.empty(4, device="meta")
        assert bool(x.isfinite().all()) is True
        assert float(x.sum()) == 1.0 and int(x.long().sum()) == 1


@pytest.mark.parametrize("name", "add sub mul div maximum clamp_min neg sqrt abs floor sign rsub".split())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("other", [2, (3, 5), (5,), (3, 1), (2, 3, 5)])
def test_shortcuts_give_the_shape_and_dtype_of_torch(name, dtype, other):
    """Elementwise operations on the meta device are not run; their results must look as if they had been."""

    def result(device):
        x = torch.ones(3, 5, device=device, dtype=dtype)
        y = torch.ones(other, device=device, dtype=dtype) if isinstance(other, tuple) else other
        function = getattr(torch, name)
        return function(x) if name in ("neg", "sqrt", "abs", "floor", "sign") else function(x, y)

    if name in ("clamp_min", "maximum") and isinstance(other, int) == (name == "maximum"):
        pytest.skip("torch has no such operation")
    real = result("cpu")
    with LiveMemory():
        ours = result("meta")
    assert (ours.shape, ours.dtype, ours.is_contiguous()) == (real.shape, real.dtype, real.is_contiguous())


def test_it_counts_what_the_allocator_counts():
    """Forward and backward of a small network, with the profiler's record of every allocation as its twin."""

    def train():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(300, 500), nn.GELU(), nn.Linear(500, 200))
        with LiveMemory() as live:
            for _ in range(2):
                net(torch.randn(64, 300)).square().sum().backward()
        return live.peak.bytes

    most, counted = allocated_at_most(train)
    parameters = 4 * (300 * 500 + 500 + 500 * 200 + 200)
    assert most - parameters == pytest.approx(counted, rel=0.03)
