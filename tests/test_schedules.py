"""The learning rate's course: hand-computed values, ends, restarts, and what is refused."""

import pytest

from peft_pretraining.errors import UserError
from peft_pretraining.schedules import check_schedule, lr_ratio

RUN = dict(num_training_steps=100, warmup_steps=10, min_lr_ratio=0.1)
RESTARTS = dict(RUN, scheduler="cosine_restarts", cycle_length=30, restart_warmup_steps=5)


def course(**schedule) -> list[float]:
    """The ratios of all updates; course(...)[0] is None, so that indices are updates."""
    return [None] + [lr_ratio(update, **schedule) for update in range(1, schedule["num_training_steps"] + 1)]


def test_the_first_update_has_a_learning_rate():
    """The reference multiplies the first update by 0 and runs one too many."""
    assert lr_ratio(1, scheduler="cosine", **RUN) == 0.1
    assert lr_ratio(10, scheduler="cosine", **RUN) == 1.0


def test_linear_by_hand():
    ratios = course(scheduler="linear", **RUN)
    assert ratios[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert ratios[91] == pytest.approx(0.1 + 0.9 * 0.1)


def test_cosine_by_hand():
    ratios = course(scheduler="cosine", **RUN)
    assert ratios[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert ratios[40] == pytest.approx(0.1 + 0.9 * 0.75)  # a third of the way: (1 + cos 60 degrees) / 2


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "cosine_restarts"])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 0.3, 1.0])
def test_the_last_update_has_exactly_the_last_ratio(scheduler, min_lr_ratio):
    restarts = dict(cycle_length=33, restart_warmup_steps=5) if scheduler == "cosine_restarts" else {}
    schedule = dict(RUN, scheduler=scheduler, min_lr_ratio=min_lr_ratio, **restarts)
    assert lr_ratio(100, **schedule) == min_lr_ratio
    assert lr_ratio(150, **schedule) == min_lr_ratio  # beyond the end it stays there
    assert all(0 < ratio <= 1 for ratio in course(**schedule)[1:-1])


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_after_the_warm_up_it_only_falls(scheduler):
    ratios = course(scheduler=scheduler, **RUN)[10:]
    assert all(later < earlier for earlier, later in zip(ratios, ratios[1:], strict=False))


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_short_and_extreme_runs(scheduler):
    short = dict(scheduler=scheduler, min_lr_ratio=0.1)
    assert course(num_training_steps=1, warmup_steps=0, **short)[1:] == [0.1]
    assert course(num_training_steps=1, warmup_steps=1, **short)[1:] == [1.0]
    assert course(num_training_steps=4, warmup_steps=4, **short)[1:] == [0.25, 0.5, 0.75, 1.0]
    assert course(num_training_steps=2, warmup_steps=0, **short)[1:] == [pytest.approx(0.55), 0.1]


def test_restarts_climb_back_to_the_envelope():
    """Cycles of 30: updates 31..35 and 61..65 climb; 91..95 too, as the climb ends before update 100."""
    envelope, ratios = course(scheduler="cosine", **RUN), course(**RESTARTS)
    climbs = [range(31, 36), range(61, 66), range(91, 96)]
    for climb in climbs:
        top = envelope[climb[-1]]
        assert [ratios[update] for update in climb] == pytest.approx([top * step / 5 for step in (1, 2, 3, 4, 5)])
    outside = set(range(1, 101)).difference(*climbs)
    assert all(ratios[update] == envelope[update] for update in outside)


def test_no_restart_in_the_warm_up_or_at_the_very_end():
    assert course(**dict(RESTARTS, cycle_length=8))[:11] == course(scheduler="cosine", **RUN)[:11]
    ends_with_the_run = dict(RESTARTS, cycle_length=95)
    assert course(**ends_with_the_run) == course(scheduler="cosine", **RUN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(scheduler="cosin"), "Did you mean cosine"),
        (dict(num_training_steps=0, warmup_steps=0), "--num_training_steps 0"),
        (dict(warmup_steps=101), "--warmup_steps 101"),
        (dict(warmup_steps=-1), "--warmup_steps -1"),
        (dict(min_lr_ratio=1.5), "--min_lr_ratio 1.5"),
        (dict(min_lr_ratio=float("nan")), "--min_lr_ratio nan"),
        (dict(cycle_length=None), "needs --cycle_length"),
        (dict(cycle_length=0), "--cycle_length 0"),
        (dict(restart_warmup_steps=0), "--restart_warmup_steps 0"),
        (dict(restart_warmup_steps=30), "--restart_warmup_steps 30"),
        (dict(scheduler="linear"), "--cycle_length has no effect"),
        (dict(scheduler="cosine", cycle_length=None), "--restart_warmup_steps has no effect"),
    ],
)
def test_what_is_refused(change, said):
    with pytest.raises(UserError, match=said) as caught:
        check_schedule(**dict(RESTARTS, **change))
    assert "\n" not in str(caught.value)


def test_what_is_accepted():
    check_schedule(**RESTARTS)
    check_schedule(scheduler="linear", **RUN)
    check_schedule(scheduler="cosine", **dict(RUN, warmup_steps=100))
