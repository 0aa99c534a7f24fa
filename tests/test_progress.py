"""Long waits say how far they have come; short ones say nothing."""

import pytest
from support.checkpoints import logged

from peft_pretraining import progress
from peft_pretraining.progress import LongWait


def advance(count, *, total, monkeypatch, seconds):
    """The log lines of so many steps, each of which takes some seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with logged("INFO") as lines:
        shown = LongWait("first bases", total=total)
        for _ in range(count):
            now[0] += seconds
            shown.advance()
    return [line.strip() for line in lines]


def test_a_short_wait_says_nothing(monkeypatch):
    assert advance(5, total=5, monkeypatch=monkeypatch, seconds=0.3) == []


def test_a_long_wait_says_how_far_it_is_now_and_then(monkeypatch):
    lines = advance(9, total=9, monkeypatch=monkeypatch, seconds=4.0)
    assert lines == ["first bases: 1 of 9", "first bases: 4 of 9", "first bases: 7 of 9"]


def test_beyond_the_total_nothing_is_counted(monkeypatch):
    assert advance(50, total=2, monkeypatch=monkeypatch, seconds=4.0) == ["first bases: 1 of 2"]


@pytest.mark.parametrize("rank, shows", [("0", True), ("1", False)])
def test_only_the_main_process_draws(monkeypatch, rank, shows):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(progress.tqdm, "__init__", lambda self, **given: self.__dict__.update(given))
    monkeypatch.setattr(progress.tqdm, "__del__", lambda self: None)
    assert LongWait("first bases", total=3)._bar.disable == (None if shows else True)
