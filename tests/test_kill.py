"""The real script, killed at random moments and restarted until it is done: it ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.resumed_runs import INT8, LOW_RANK, digests
from support.runs import ROOT, record, run, shell, torchrun

from peft_pretraining.checkpoint.files import Checkpoint, complete_checkpoints

FLAGS = dict(optimizer="q_galore_adamw8bit_per_layer", batch_size=2, total_batch_size=4, workers=1, save_every=5)
FLAGS |= dict(resume="auto", eval_every=50, **LOW_RANK, **INT8)


def loss_of_each_update(save_dir: Path) -> list[float]:
    """The last line of an update counts; all lines of one must say the same."""
    seen: dict[int, set[float]] = {}
    for line in record(save_dir, "update"):
        seen.setdefault(line["update"], set()).add(line["loss"])
    assert all(len(values) == 1 for values in seen.values()), "an update done again has the same loss to the last bit"
    return [values.pop() for _, values in sorted(seen.items())]


def run_and_kill(command: list[str], save_dir: Path, *, rng: random.Random) -> int:
    """Starts the run and kills it and its workers a random time after its first sign of life. Returns its status."""
    lines = len((save_dir / "metrics.jsonl").read_text().splitlines()) if (save_dir / "metrics.jsonl").exists() else 0
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        log = save_dir / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) > lines + 1:
            break
        time.sleep(0.01)
    try:
        process.wait(timeout=rng.random())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def killed_until_done(tiny, tmp_path: Path, *, kills: int, updates: int) -> None:
    flags = FLAGS | dict(num_training_steps=updates)
    run(tiny, tmp_path / "whole", **flags)
    save_dir = tmp_path / "killed"
    command = [sys.executable, "torchrun_main.py", *tiny.flags(save_dir, **flags)]
    rng, killed = random.Random(0), 0
    while killed < kills:
        status = run_and_kill(command, save_dir, rng=rng)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        for checkpoint in complete_checkpoints(save_dir):
            Checkpoint.open(checkpoint).verify()
    assert killed == kills, f"the run was done after {killed} kills: it is too short for {kills}"
    result = shell(command, timeout=900)
    assert result.returncode == 0, result.stderr
    assert loss_of_each_update(save_dir) == loss_of_each_update(tmp_path / "whole")
    assert digests(save_dir, updates) == digests(tmp_path / "whole", updates)
    ends = [record(folder, "end")[-1] for folder in (save_dir, tmp_path / "whole")]
    assert ends[0]["perplexity"] == ends[1]["perplexity"] and ends[0]["tokens_seen"] == ends[1]["tokens_seen"]


def test_killed_once(tiny, tmp_path):
    killed_until_done(tiny, tmp_path, kills=1, updates=80)


@pytest.mark.slow
def test_killed_twenty_five_times(tiny, tmp_path):
    killed_until_done(tiny, tmp_path, kills=25, updates=1500)


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_was_told_to_go(tiny, tmp_path):
    """The worker gets SIGUSR1 at update 10, saves, and exits with 75; torchrun starts it again, and it goes on."""
    flags = FLAGS | dict(num_training_steps=30)
    run(tiny, tmp_path / "whole", **flags)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import torchrun_main\n"
        "from peft_pretraining.training import loop\n"
        "step = loop.train_step\n"
        "def train_step(run):\n"
        "    step(run)\n"
        "    if run.state.update == 10 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "loop.train_step = train_step\n"
        "sys.exit(torchrun_main.command_line())\n"
    )
    result = torchrun(tiny.flags(tmp_path / "told", **flags), script=str(script), options=("--max-restarts=2",))
    assert result.returncode == 0, result.stderr
    assert [line["update"] for line in record(tmp_path / "told", "resume")] == [11]
    assert loss_of_each_update(tmp_path / "told") == loss_of_each_update(tmp_path / "whole")
    assert digests(tmp_path / "told", 30) == digests(tmp_path / "whole", 30)
    events = [json.loads(line)["event"] for line in (tmp_path / "told" / "metrics.jsonl").read_text().splitlines()]
    assert events.count("start") == 2 and events[-1] == "end"
