import pytest
import torch

from qgalore.optimizer import LowRankOptimizer
from qgalore.subspace.schedule import MAX_GROWTH, RefreshSchedule, staggered_offset


def refreshes(schedule: RefreshSchedule, overlaps, *, updates: int) -> list[int]:
    """The updates at which a basis is refreshed, each new one overlapping the last by the next of `overlaps`."""
    state: dict = {}
    overlaps, done = iter(overlaps), []
    for step in range(1, updates + 1):
        if schedule.due(state, step=step):
            schedule.record(state, step=step, overlap=next(overlaps) if done else None)
            done.append(step)
    assert state["refreshes"] == len(done)
    return done


def always(overlap: float):
    while True:
        yield overlap


def test_without_a_threshold_the_gap_never_changes():
    assert refreshes(RefreshSchedule(gap=10, offset=3), always(1.0), updates=45) == [1, 4, 14, 24, 34, 44]


def test_the_gap_grows_when_the_queue_is_full_and_its_mean_passes():
    """Two overlaps fill the queue: the gap doubles, the queue is cleared, and two new ones are needed to double again.

    The reference keeps the queue when it doubles, so the same old similarities double the gap once more at once.
    """
    schedule = RefreshSchedule(gap=10, offset=10, threshold=0.5, queue_size=2)
    assert refreshes(schedule, always(0.6), updates=150) == [1, 11, 21, 41, 61, 101, 141]


def test_the_next_refresh_counts_elapsed_updates():
    """The reference tests step % gap: after a change of the gap the next refresh depends on divisibility."""
    schedule = RefreshSchedule(gap=10, offset=7, threshold=0.5, queue_size=1)
    assert refreshes(schedule, always(0.6), updates=80) == [1, 8, 28, 68]


def test_a_mean_below_the_threshold_leaves_the_gap():
    schedule = RefreshSchedule(gap=5, offset=5, threshold=0.5, queue_size=3)
    assert refreshes(schedule, always(0.49), updates=40) == list(range(1, 41, 5))
    sliding = [0.0, 0.7, 0.7, 0.7]  # the queue slides: the old 0.0 leaves it
    assert refreshes(schedule, [*sliding, *[0.0] * 9], updates=42) == [1, 6, 11, 16, 21, 31, 41]


def test_the_gap_is_capped():
    schedule = RefreshSchedule(gap=3, offset=3, threshold=0.5, queue_size=1)
    done = refreshes(schedule, always(1.0), updates=1000)
    gaps = [after - before for before, after in zip(done, done[1:], strict=False)]
    assert gaps[:6] == [3, 6, 12, 24, 48, 96] and set(gaps[6:]) == {3 * MAX_GROWTH}


@pytest.mark.parametrize("wrong", [{"growth": 0.5}, {"queue_size": 0}, {"offset": 11}])
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValueError):
        RefreshSchedule(**{"gap": 10, "offset": 1, "threshold": 0.5} | wrong)


def test_refreshes_are_spread_over_the_gap():
    gap, count = 200, 28
    offsets = [staggered_offset(i, count=count, gap=gap) for i in range(count)]
    assert offsets == sorted(set(offsets)), "no two at the same update"
    assert min(offsets) >= 1 and max(offsets) == gap
    crowded = [staggered_offset(i, count=30, gap=7) for i in range(30)]
    assert max(crowded.count(offset) for offset in range(1, 8)) == 5, "30 over 7 updates: never more than 5 at once"


@pytest.mark.parametrize("turning, expected", [(False, [1, 11, 21, 41, 61, 101]), (True, list(range(1, 111, 10)))])
def test_a_still_subspace_is_left_alone_and_a_moving_one_followed(turning, expected):
    """In the optimizer: singular vectors change signs freely, and that alone must not count as movement."""
    p = torch.nn.Parameter(torch.zeros(20, 30))
    group = {"params": [p], "rank": 4, "update_proj_gap": 10, "cos_threshold": 0.6, "queue_size": 2, "subspace": "svd"}
    optimizer = LowRankOptimizer([group], lr=0.0)
    still = torch.randn(20, 4) @ torch.randn(4, 30)
    done = []
    for step in range(1, 111):
        sign = 1 if step % 2 else -1
        p.grad = torch.randn(20, 30) if turning else sign * still + 0.01 * torch.randn(20, 30)
        before = optimizer.state[p].get("refreshes", 0)
        optimizer.step()
        if optimizer.state[p]["refreshes"] > before:
            done.append(step)
    assert done == expected
