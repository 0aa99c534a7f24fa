"""One run in a folder, whatever becomes of the runs before it."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.checkpoints import logged
from support.runs import ROOT

import torchrun_main
from peft_pretraining.checkpoint import lock, run_folder
from peft_pretraining.checkpoint.lock import NAME, STALE, only_run_in
from peft_pretraining.errors import UserError

HOLD = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from peft_pretraining.checkpoint.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)  # a worker that outlives its run
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that owns tmp_path until its input ends."""
    started = []

    def start(*more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path), *more]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def refusal(folder) -> str:
    with pytest.raises(UserError) as error, only_run_in(folder):
        pass
    return str(error.value)


def taken_over(folder) -> list[str]:
    with logged("WARNING") as messages, only_run_in(folder):
        assert json.loads((folder / NAME).read_text())["pid"] == os.getpid()
    assert not (folder / NAME).exists()
    return messages


def test_a_second_process_is_refused_by_name(tmp_path, hold):
    first = hold()
    said = refusal(tmp_path)
    assert f"in use by process {first.pid} on " in said and "choose another --save_dir" in said and "\n" not in said
    first.communicate()
    assert not (tmp_path / NAME).exists() and taken_over(tmp_path) == []


@pytest.mark.parametrize("more", [[], ["fork"]], ids=["alone", "with a worker that lives on"])
def test_a_lock_ends_with_its_process(tmp_path, hold, more):
    """Killed, it leaves its name behind, and the next one says so."""
    first = hold(*more)
    first.kill()
    first.wait()
    (message,) = taken_over(tmp_path)
    assert f"belonged to process {first.pid}" in message and "taken over" in message


def owned_by(folder, *, age: float, **owner) -> None:
    (folder / NAME).write_text(json.dumps(owner))
    os.utime(folder / NAME, (time.time() - age,) * 2)


def test_another_machine_is_believed_while_its_heart_beats(tmp_path):
    owned_by(tmp_path, age=STALE - 60, pid=7, host="other", boot="b", since="noon")
    for _ in range(2):  # looking does not make it young
        assert "in use by process 7 on other (since noon)" in refusal(tmp_path)
    owned_by(tmp_path, age=STALE + 60, pid=7, host="other", boot="b", since="noon")
    assert len(taken_over(tmp_path)) == 1


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with only_run_in(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        for _ in range(200):
            if (tmp_path / NAME).stat().st_mtime > 0:
                break
            time.sleep(0.02)
        assert (tmp_path / NAME).stat().st_mtime > 0


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Then a living owner is told by its heart, on this machine, too."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with only_run_in(tmp_path):
        assert f"process {os.getpid()}" in refusal(tmp_path)
    assert taken_over(tmp_path) == []
    owned_by(tmp_path, age=STALE + 60, **lock._this_process())
    assert len(taken_over(tmp_path)) == 1


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_half_a_lock_is_none(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    assert taken_over(tmp_path) == []


def test_a_run_owns_its_folder_and_a_look_does_not(tiny, tmp_path, hold, capsys):
    """Training is refused while another process owns the folder, before anything is read; a dry run is not."""
    first = hold()
    assert torchrun_main.command_line(tiny.flags(tmp_path)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"process {first.pid}" in line
    assert torchrun_main.command_line(tiny.flags(tmp_path, dry_run=True)) == 0
    first.communicate()
    assert torchrun_main.command_line(tiny.flags(tmp_path)) == 0
    assert not (tmp_path / NAME).exists()
    with only_run_in(tmp_path):
        assert torchrun_main.command_line(["--eval_only", "--continue_from", str(tmp_path)]) == 0


def test_a_run_that_is_refused_gives_its_folder_back(tiny, tmp_path):
    assert torchrun_main.command_line(tiny.flags(tmp_path, tokenizer="no/such.model")) == 2
    assert not (tmp_path / NAME).exists()


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda text: "now")
    names = [str(run_folder.make_save_dir(None, model_config="configs/llama_9m.json")) for _ in range(3)]
    assert names == [f"checkpoints/llama_9m-now{suffix}" for suffix in ("", "-2", "-3")]
