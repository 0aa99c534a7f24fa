"""Long waits say how far they have come, whatever they wait for; short ones and other ranks say nothing."""

import io
import re
import sys
import threading
import time

import pytest
from support.checkpoints import logged
from support.runs import run

from peft_pretraining import progress
from peft_pretraining.data.pydocs import documents
from peft_pretraining.progress import LongWait


@pytest.fixture
def quick(monkeypatch):
    """A wait is long after a twentieth of a second."""
    for name, seconds in (("QUIET", 0.05), ("PERIOD", 0.1), ("REDRAW", 0.02)):
        monkeypatch.setattr(progress, name, seconds)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(work) -> list[str]:
    """The log lines of some work, without their seconds."""
    with logged("INFO") as lines:
        work()
    return [re.sub(r"\d+ s", "N s", line.strip()) for line in lines]


def test_a_short_wait_says_nothing():
    def short():
        with LongWait("saving"):
            pass
        counted = LongWait("first bases", total=3)
        for _ in range(3):
            counted.advance()

    assert shown(short) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_long_call_says_so_now_and_then(quick):
    """It advances nothing meanwhile, as a save or a compilation."""

    def long():
        with LongWait("saving"):
            time.sleep(0.4)

    first, *_, last = lines = shown(long)
    assert first == "saving: N s so far" and last == "saving: done after N s" and 3 <= len(lines) <= 6


def test_steps_are_counted_and_the_last_one_ends_it(quick):
    def long():
        wait = LongWait("first bases", total=2)
        time.sleep(0.2)  # it has not begun
        wait.advance()
        time.sleep(0.1)
        wait.advance()
        for _ in range(3):
            wait.advance()
        wait.close()
        time.sleep(0.2)

    assert shown(long) == ["first bases: 1 of 2, N s so far", "first bases: done after N s"]


def test_an_error_ends_it(quick):
    def failing():
        with pytest.raises(KeyError), LongWait("reading", total=5):
            time.sleep(0.1)
            raise KeyError
        time.sleep(0.2)

    assert shown(failing) == ["reading: 0 of 5, N s so far", "reading: done after N s"]


def test_other_ranks_say_nothing(quick, monkeypatch):
    monkeypatch.setenv("RANK", "1")

    def long():
        with LongWait("saving"):
            time.sleep(0.2)

    assert shown(long) == []


@pytest.mark.parametrize("total, drawn", [(4, r"reading: +25%\|.*\| 1/4 \["), (None, "reading: 00:0")])
def test_on_a_terminal_it_is_a_bar_that_goes_away(quick, monkeypatch, total, drawn):
    monkeypatch.setattr(sys, "stderr", Terminal())

    def long():
        with LongWait("reading", total=total) as wait:
            wait.advance()
            time.sleep(0.3)

    assert shown(long) == []
    text = sys.stderr.getvalue()
    assert re.search(drawn, text) and text.endswith("\r") and not text.rsplit("\r", 2)[1].strip()


def test_a_run_shows_every_wait(tiny, tmp_path, monkeypatch):
    """Of a first start and of one that goes on; the last ones are those of a compiled model and the embedded text."""
    begun = []
    begin = LongWait._begin
    monkeypatch.setattr(LongWait, "_begin", lambda wait: (begun.append(wait.what), begin(wait)))
    flags = dict(optimizer="galore_adamw", rank=8, save_every=2)
    run(tiny, tmp_path, num_training_steps=2, **flags)
    started = set(begun)
    assert started == {
        "looking at the data files", "reading validation tokens", "drawing the weights of modules", "first update",
        "first bases", "evaluating", "saving after update 2", f"writing {tmp_path / 'model'}",
    }  # fmt: skip
    begun.clear()
    run(tiny, tmp_path, num_training_steps=4, resume="auto", allow_changed="num_training_steps,warmup_steps", **flags)
    assert {"verifying checkpoint-00000002", "reading checkpoint-00000002", "first update"} <= set(begun)
    begun.clear()
    assert documents({"": tmp_path}) == [] and begun == ["reading source files"]
