"""Checkpoints written on the side: training goes on whatever becomes of them."""

import errno
import os
import shutil
import threading
from collections import namedtuple

import pytest
from support.checkpoints import fail_at, logged, names, saved_updates, snapshot

from peft_pretraining.checkpoint import writer as checkpoint_module
from peft_pretraining.checkpoint.atomic_write import write_checkpoint
from peft_pretraining.checkpoint.files import complete_checkpoints
from peft_pretraining.checkpoint.writer import CheckpointWriter

NO_SPACE = os.strerror(errno.ENOSPC)


def test_saves_are_kept_as_told(tmp_path):
    writer = CheckpointWriter(tmp_path / "run", keep_last=2, keep_every=3)
    assert writer.wait() is None and writer.last is None
    for update in range(1, 8):
        writer.save(snapshot(update))
    assert writer.wait() == writer.last == tmp_path / "run" / "checkpoint-00000007"
    assert saved_updates(tmp_path / "run") == [3, 6, 7]
    assert CheckpointWriter(tmp_path / "run").last == writer.last


def test_save_returns_before_the_checkpoint_is_written_and_the_next_one_waits(tmp_path, monkeypatch):
    """The first write is held up until the main thread says so; the second begins when it has ended."""
    released, log = threading.Event(), []

    def slow_write(save_dir, snapshot):
        log.append(f"begin {snapshot.update}")
        assert released.wait(timeout=60)
        folder = write_checkpoint(save_dir, snapshot)
        log.append(f"end {snapshot.update}")
        return folder

    monkeypatch.setattr(checkpoint_module, "write_checkpoint", slow_write)
    writer = CheckpointWriter(tmp_path)
    writer.save(snapshot(1))
    assert not list(tmp_path.iterdir())
    threading.Timer(0.05, released.set).start()
    writer.save(snapshot(2))
    writer.wait()
    assert log == ["begin 1", "end 1", "begin 2", "end 2"]


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("update", [1, 2])
def test_a_full_disk_at_any_call_costs_one_checkpoint_at_most(update, forever, tmp_path):
    """Each call that touches the disk fails in turn, once or from then on; update 1 replaces what there is."""
    save_dir, call, reached, failures = tmp_path, 0, True, 0
    while reached:
        call += 1
        save_dir = tmp_path / str(call)
        older = write_checkpoint(save_dir, snapshot(1))
        writer = CheckpointWriter(save_dir)
        with pytest.MonkeyPatch.context() as patch, logged("ERROR") as errors:
            log = fail_at(call, patch, OSError(errno.ENOSPC, NO_SPACE), forever=forever)
            writer.save(snapshot(update, value=1.0))
            folder = writer.wait()
            reached = len(log) >= call
        failures += folder is None
        assert len(errors) == (folder is None)
        assert writer.last == complete_checkpoints(save_dir)[-1]
        assert saved_updates(save_dir)[0] == 1
        if errors:
            assert f"could not save {save_dir}/checkpoint-0000000{update} ({NO_SPACE}): training goes on" in errors[0]
            assert f"the last complete checkpoint is {writer.last}" in errors[0]
            assert not list(save_dir.glob(".*.incomplete"))
        writer.save(snapshot(3))
        assert writer.wait() == writer.last == save_dir / "checkpoint-00000003"
        assert names(save_dir)[0] == older.name and not list(save_dir.glob(".*"))
    assert failures > 10


def test_every_failing_save_says_so(tmp_path):
    """The folder is a file: nothing was ever saved."""
    (tmp_path / "run").touch()
    writer = CheckpointWriter(tmp_path / "run")
    with logged("ERROR") as errors:
        for update in (1, 2):
            writer.save(snapshot(update))
            assert writer.wait() is None
    assert len(errors) == 2 and "checkpoint-00000002 (File exists)" in errors[1]
    assert "there is no complete checkpoint yet" in errors[1]


def test_a_save_without_room_fails_before_it_writes(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(snapshot(2).nbytes))
    write = fail_at(-1, monkeypatch, AssertionError())
    with logged("ERROR") as errors:
        writer = CheckpointWriter(tmp_path)
        writer.save(snapshot(2))
        assert writer.wait() is None
    assert NO_SPACE in errors[0] and "write_tensors" not in write and not list(tmp_path.iterdir())


def test_what_cannot_be_deleted_is_no_failed_save(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoint_module, "prune", refuse)
    writer = CheckpointWriter(tmp_path, keep_last=1)
    with logged("WARNING") as messages:
        writer.save(snapshot(1))
        assert writer.wait() == writer.last is not None
    assert len(messages) == 1 and "could not be deleted (Permission denied)" in messages[0]
