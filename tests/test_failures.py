"""What happens to a run of several processes when one of them fails, dies, freezes or is told to stop.

The real script under torchrun, with one of tests/support/faults.py on one rank.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_distributed, run_on_two_ranks
from support.resumed_runs import digests
from support.runs import ROOT, losses, record, torchrun

from peft_pretraining import failure
from peft_pretraining.checkpoint.files import Checkpoint, complete_checkpoints

FAULTS = "tests/support/faults.py"
GALORE = dict(optimizer="galore_adamw", rank=8, update_proj_gap=2, proj_type="right", total_batch_size=8, save_every=2)
MINUTE = 60


def run_with(fault: str, flags: list[str], *, rank: int, update: int, options: tuple[str, ...] = ()):
    """torchrun with a fault on one of two ranks. It ends within a minute of it, or the test fails."""
    words = [fault, str(rank), str(update), *flags]
    return torchrun(words, processes=2, script=FAULTS, options=options, timeout=2 * MINUTE)


def root_cause(stderr: str) -> str:
    """What torchrun prints last: the process that it takes for the cause, and its message."""
    return stderr.rpartition("Root Cause (first observed failure):")[2]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("fault, rank, update, says", [
    ("data user error", 1, 3, "error: the fault of this test"),
    ("error", 1, 3, "KeyError: 'the fault of this test'"),
    ("data error", 0, 3, "KeyError: 'the fault of this test'"),
    ("start error", 1, 1, "KeyError: 'the fault of this test'"),
    ("start user error", 1, 1, "error: the fault of this test"),
    ("evaluation error", 1, 4, "KeyError: 'the fault of this test'"),
    ("kill", 0, 3, "Signal 9 (SIGKILL)"),
    ("save kill", 1, 4, "Signal 9 (SIGKILL)"),
    ("freeze", 1, 3, "another process is gone or does not answer"),
])  # fmt: skip
def test_the_message_of_the_rank_that_failed_stands_last(tiny, tmp_path, parallel, fault, rank, update, says):
    """And not that of the other, which has only lost it."""
    if fault == "save kill" and parallel == "ddp":
        rank = 0  # which saves
    flags = tiny.flags(tmp_path, parallel=parallel, eval_every=4, **GALORE)
    began = time.monotonic()
    result = run_with(fault, flags, rank=rank, update=update)
    assert result.returncode == 1
    assert time.monotonic() - began < MINUTE or fault == "freeze", (
        "torchrun waits 30 s for a frozen one to end by itself"
    )
    cause = root_cause(result.stderr)
    assert says in cause, result.stderr
    assert f"rank      : {1 - rank if fault == 'freeze' else rank} " in cause
    assert "gloo" not in cause or fault == "freeze"
    for checkpoint in complete_checkpoints(tmp_path):
        Checkpoint.open(checkpoint).verify()


def test_one_rank_cannot_read_its_data(tiny, tmp_path):
    """As above, in the tests of every change: two messages, one from the rank itself, one by torchrun."""
    result = run_with("data user error", tiny.flags(tmp_path, **GALORE), rank=1, update=3)
    assert result.returncode == 1 and "error: the fault of this test" in root_cause(result.stderr)
    lines = [line for line in result.stderr.splitlines() if "the fault of this test" in line]
    assert lines[0] == "error: the fault of this test" and len(lines) == 2
    assert "Connection closed by peer" not in root_cause(result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("fault, rank, update", [("term", 0, 3), ("term", 1, 3), ("evaluation term", 1, 4)])
def test_a_signal_to_one_rank_stops_all_and_they_save(tiny, tmp_path, parallel, fault, rank, update):
    flags = dict(parallel=parallel, eval_every=4, **GALORE | dict(save_every=100))
    result = run_with(fault, tiny.flags(tmp_path, **flags), rank=rank, update=update)
    assert "exitcode  : 75" in root_cause(result.stderr), result.stderr
    assert f"stopped after update {update}" in result.stderr
    assert complete_checkpoints(tmp_path)[-1].name == f"checkpoint-{update:08}"
    assert not record(tmp_path, "eval")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_bad_number_on_one_rank_skips_the_update_on_all(tiny, tmp_path, parallel, per_layer):
    flags = GALORE | dict(parallel=parallel, optimizer="galore_adamw" + "_per_layer" * per_layer)
    result = run_with("nan", tiny.flags(tmp_path, **flags), rank=1, update=3)
    assert result.returncode == 0, result.stderr
    (bad,) = record(tmp_path, "bad_update")
    assert bad["update"] == 3 and "model.embed_tokens.weight" in bad["parameters"]
    assert [loss is None for loss in losses(tmp_path)] == [False, False, True, False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_spike_on_one_rank_takes_all_back(tiny, tmp_path, parallel):
    flags = GALORE | dict(parallel=parallel, spike_rollback=20, num_training_steps=50, save_every=10)
    result = run_with("spike", tiny.flags(tmp_path, **flags), rank=1, update=44)
    assert result.returncode == 0, result.stderr
    (rollback,) = record(tmp_path, "rollback")
    assert (rollback["update"], rollback["to"]) == (44, 40)
    assert record(tmp_path, "end")[0]["updates"] == 50
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


@pytest.mark.slow
@pytest.mark.parametrize("parallel, rank", [("ddp", 0), ("fsdp", 0), ("fsdp", 1)])
def test_a_full_disk_under_one_rank_costs_one_checkpoint(tiny, tmp_path, parallel, rank):
    flags = tiny.flags(tmp_path, parallel=parallel, keep_last=0, **GALORE)
    result = run_with("save full", flags, rank=rank, update=4)
    assert result.returncode == 0, result.stderr
    said = f"process {rank}: No space left" if parallel == "fsdp" else "No space left"
    assert result.stderr.count("could not save") == 1 and said in result.stderr
    assert [path.name[-1] for path in complete_checkpoints(tmp_path)] == ["2", "6"]
    assert len(losses(tmp_path)) == 6


# Ranks that are killed, and a job that comes back


def assert_as_if_nothing_had_been(folder: Path, whole: Path, *, updates: int) -> None:
    """The same losses, the last of each update; the same files to the last bit; the same tokens and documents."""
    last = {line["update"]: line["loss"] for line in record(folder, "update")}
    assert list(last.values()) == losses(whole) and list(last) == list(range(1, updates + 1))
    assert digests(folder, updates) == digests(whole, updates)
    ends = [record(place, "end")[-1] for place in (folder, whole)]
    assert all(ends[0][key] == ends[1][key] for key in ("updates", "tokens_seen", "perplexity"))
    states = [json.loads((complete_checkpoints(place)[-1] / "state.json").read_text()) for place in (folder, whole)]
    assert states[0]["position"] == states[1]["position"]
    assert not list(folder.glob(".checkpoint*")), "nothing incomplete is left"


@pytest.mark.slow
@pytest.mark.parametrize("parallel, rank", [("ddp", 0), ("ddp", 1), ("fsdp", 0), ("fsdp", 1)])
def test_a_rank_that_is_killed_in_the_middle_of_a_save(tiny, tmp_path, parallel, rank):
    """Half a file is written. torchrun starts all processes again; they go on from the checkpoint before."""
    fault = "kill" if (parallel, rank) == ("ddp", 1) else "save kill"  # that rank does not save
    flags = GALORE | dict(parallel=parallel, optimizer="q_galore_adamw8bit_per_layer", rank=16, resume="auto")
    flags |= dict(weight_quant=True, weight_group_size=32, stochastic_round=True, workers=1)
    assert run_on_two_ranks(tiny.flags(tmp_path / "whole", **flags)).returncode == 0
    options = ("--max-restarts=2",)
    result = run_with(fault, tiny.flags(tmp_path / "cut", **flags), rank=rank, update=4, options=options)
    assert result.returncode == 0, result.stderr
    assert [line["update"] for line in record(tmp_path / "cut", "resume")] == [2]
    assert_as_if_nothing_had_been(tmp_path / "cut", tmp_path / "whole", updates=6)


def start_node(flags: list[str], *, port: int) -> subprocess.Popen[str]:
    """One torchrun of a job of one or two nodes, with one process, and a group of its own to be killed as a whole."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_conf=last_call_timeout=4"]
    command += ["torchrun_main.py", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it has started, as the end of a machine does."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split()[2:]
    children: dict[int, list[int]] = {}
    for pid, parent in zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True):
        children.setdefault(parent, []).append(pid)
    doomed = [process.pid]
    for pid in doomed:
        doomed += children.get(pid, [])
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_job_goes_on_with_the_node_that_is_left(tiny, tmp_path, parallel):
    """Two nodes, one of which dies: the other trains on with the whole of each update, from the last checkpoint."""
    flags = GALORE | dict(parallel=parallel, resume="auto", num_training_steps=400, save_every=20, keep_last=3)
    assert run_on_two_ranks(tiny.flags(tmp_path / "whole", **flags)).returncode == 0
    port, folder = 29511 + (parallel == "fsdp"), tmp_path / "cut"
    nodes = [start_node(tiny.flags(folder, **flags), port=port)]
    time.sleep(2)  # so that the first one holds the meeting place
    nodes.append(start_node(tiny.flags(folder, **flags), port=port))
    deadline = time.monotonic() + 2 * MINUTE
    while not complete_checkpoints(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_tree(nodes[1])
    _, said = nodes[0].communicate(timeout=2 * MINUTE)
    assert nodes[0].returncode == 0, said
    assert "the checkpoint is of 2 processes, this run of 1" in said
    last = {line["update"]: line["loss"] for line in record(folder, "update")}
    assert list(last) == list(range(1, 401))
    assert list(last.values()) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    ends = [record(place, "end")[-1] for place in (folder, tmp_path / "whole")]
    assert ends[0]["updates"] == 400 and ends[0]["tokens_seen"] == ends[1]["tokens_seen"]


# The parts


def lose_the_other() -> str:
    """Rank 1 leaves; what rank 0 then hears of an all-reduce."""
    if dist.get_rank() == 1:
        return ""
    try:
        for _ in range(100):
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        assert failure.lost_the_others(error), error
        return str(error)
    return "nothing"


def test_the_loss_of_another_process_is_told_from_other_errors():
    assert run_distributed(lose_the_other)[0] not in ("", "nothing")
    assert not failure.lost_the_others(RuntimeError("CUDA out of memory"))
    assert not failure.lost_the_others(KeyError("connection closed by peer"))
    assert failure.lost_the_others(dist.DistBackendError("NCCL error: remote process exited"))


def test_a_process_without_torchrun_says_nothing_more(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    failure.tell_torchrun("unheard")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(ZeroDivisionError):
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError as error:
            failure.report_failure(error)
    left = json.loads((tmp_path / "error.json").read_text())["message"]
    assert left["message"].endswith("ZeroDivisionError: division by zero") and left["extraInfo"]["timestamp"].isdigit()
