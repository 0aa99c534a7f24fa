"""--time_budget: the run saves and ends in time, as after a signal, and goes on to the last bit."""

import math
import time

import pytest
from support.checkpoints import logged
from support.command_line import flags_refusal, parse
from support.ranks import run_on_two_ranks
from support.resumed_runs import checkpoint
from support.runs import losses, run, shell

import torchrun_main
from peft_pretraining.cli.flags import parse_duration
from peft_pretraining.training import interruption, loop
from peft_pretraining.training.interruption import Interruption


@pytest.mark.parametrize("text, seconds", [
    ("3h", 10_800), ("90m", 5400), ("45s", 45), ("1h30m", 5400), ("2:30:00", 9000), ("1d12h", 129_600), ("0:00:07", 7),
    ("100:00:00", 360_000), ("1H5S", 3605),
])  # fmt: skip
def test_times_are_understood(text, seconds):
    assert parse_duration(text) == parse("--time_budget", text).time_budget == seconds


@pytest.mark.parametrize(
    "text", ["", "3", "h", "3h 5m", "30m1h", "2:30", "2:60:00", "0s", "0:00:00", "-1h", "1.5h", "inf"]
)
def test_other_times_are_refused(text):
    assert "is not a time such as 3h, 90m, 1h30m, 45s or 2:30:00" in flags_refusal(f"--time_budget={text}")


def test_it_stops_before_the_deadline_by_the_margin(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    stop = Interruption(deadline=100.0)
    stop.margin = 30.0
    with logged("WARNING") as lines:
        for now[0] in (0.0, 69.9):
            assert not stop.requested
        now[0] = 70.0
        assert stop.requested
        stop.margin, now[0] = 0.0, 71.0
        assert stop.requested, "it stays so"
    assert [line.strip() for line in lines] == ["the time budget has 30.0 s left: saving"] and stop.status == 75
    assert not Interruption().requested


def end_soon(run, *, margins: list[float]) -> None:
    """Uses the budget up after update 3."""
    if run.state.update == 3:
        run.interruption.deadline = time.monotonic() + 1e-3
    margins.append(run.interruption.margin)


def test_a_run_ends_well_and_goes_on_to_the_last_bit(tiny, tmp_path, monkeypatch):
    """With status 75; the margin is an estimate before the first save, then what that save took."""
    flags = dict(num_training_steps=8, optimizer="galore_adamw", rank=8, save_every=2)
    run(tiny, tmp_path / "whole", **flags)
    step, margins = loop.train_step, []
    monkeypatch.setattr(loop, "train_step", lambda run: (step(run), end_soon(run, margins=margins)))
    cut = tiny.flags(tmp_path / "cut", **flags, time_budget="1h")
    assert torchrun_main.command_line(cut) == 75
    assert len(losses(tmp_path / "cut")) == 4 and checkpoint(tmp_path / "cut", 4).is_dir()
    assert len(margins) == 4 and all(0 < margin < 60 for margin in margins)
    assert torchrun_main.command_line([*cut, "--resume", "auto", "--time_budget", "2h"]) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_budget_shorter_than_an_update_still_gets_one_done(tiny, tmp_path):
    """So a job that is started again and again gets on."""
    cut = tiny.flags(tmp_path, num_training_steps=2, time_budget="1s", resume="auto")
    assert [torchrun_main.command_line(cut, began=-math.inf) for _ in range(2)] == [75, 75]
    assert len(losses(tmp_path)) == 2


def test_an_evaluation_ends_with_the_budget(tiny, tmp_path, monkeypatch):
    def evaluate(*args, stop, **kwargs):
        monkeypatch.setattr(interruption.time, "monotonic", lambda: math.inf)
        return None if stop() else pytest.fail("the budget is over")

    monkeypatch.setattr("peft_pretraining.training.report.evaluate", evaluate)
    assert torchrun_main.command_line(tiny.flags(tmp_path, eval_every=2, time_budget="1h")) == 75
    assert checkpoint(tmp_path, 2).is_dir()


def test_two_ranks_agree(tiny, tmp_path):
    result = run_on_two_ranks(tiny.flags(tmp_path, num_training_steps=100_000, time_budget="3s"))
    done = len(losses(tmp_path))
    assert result.returncode == 75 and 0 < done < 100_000 and checkpoint(tmp_path, done).is_dir(), result.stderr
    assert "Traceback" not in result.stderr


def test_it_counts_from_the_start_of_the_process():
    """In one that has waited for half a second before it asks."""
    code = "import time; time.sleep(0.5); from peft_pretraining.training.interruption import process_start; print({})"
    ask = code.format("time.monotonic() - process_start()")
    began = time.monotonic()
    result = shell(["python", "-c", ask])
    assert 0.5 <= float(result.stdout) <= time.monotonic() - began + 0.05, result.stderr
