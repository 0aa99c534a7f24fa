"""Folders that are complete or absent: killed at every call to the file system, damaged, crafted, pruned."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import fail_at, logged, names, saved_updates, snapshot

from peft_pretraining.checkpoint import files
from peft_pretraining.checkpoint.atomic_write import prune, tidy, write_checkpoint
from peft_pretraining.checkpoint.files import (
    FILES,
    Checkpoint,
    complete_checkpoints,
    find_checkpoint,
    newest_sound,
    open_tensors,
)
from peft_pretraining.checkpoint.tensor_file import TensorFile
from peft_pretraining.errors import UserError


class Killed(BaseException):
    """Passes every handler, as a kill does."""


@pytest.mark.parametrize("update", [2, 3])
def test_killed_at_any_call_earlier_checkpoints_stay(update, tmp_path):
    """Update 2 replaces a checkpoint, update 3 is new; either before or after, and nothing lost in between."""
    calls, reached = 0, True
    while reached:
        calls += 1
        save_dir = tmp_path / str(calls)
        for earlier in (1, 2):
            write_checkpoint(save_dir, snapshot(earlier))
        with pytest.MonkeyPatch.context() as patch:
            log = fail_at(calls, patch, Killed())
            try:
                write_checkpoint(save_dir, snapshot(update, value=1.0))
                prune(save_dir, newest=save_dir / f"checkpoint-{update:08d}", keep_last=1, keep_every=0)
            except Killed:
                pass
        reached = len(log) >= calls
        found = saved_updates(save_dir)
        assert found in ([1, 2], [1, update], [1, 2, update], [2, update], [update])
        assert newest_sound(save_dir).folder == complete_checkpoints(save_dir)[-1] == find_checkpoint(save_dir)
        assert {path.name for path in save_dir.glob("checkpoint-*")} <= {f.name for f in complete_checkpoints(save_dir)}
        tidy(save_dir)
        assert saved_updates(save_dir) == found
        assert names(save_dir) == [f"checkpoint-{number:08d}" for number in found]
    assert calls > 20 and found == [update]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power cut after the rename could leave a checkpoint with empty files. The manifest comes last."""
    synced, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: synced.append("renamed") or replace(*paths))
    folder = write_checkpoint(tmp_path, snapshot(1))
    files = [synced.index((folder / name).stat().st_ino) for name in FILES]
    others = [folder / "manifest.json", folder, tmp_path]
    manifest, inside, outside = (synced.index(path.stat().st_ino) for path in others)
    assert max(files) < manifest < inside < synced.index("renamed") < outside


SAVING_WITHOUT_END = """
import sys
from pathlib import Path
from support.checkpoints import snapshot
from peft_pretraining.checkpoint.atomic_write import prune, write_checkpoint

save_dir, update = Path(sys.argv[1]), int(sys.argv[2])
while True:
    for value in (0.0, 1.0):
        folder = write_checkpoint(save_dir, snapshot(update, value=value))
        print(update, flush=True)
    prune(save_dir, newest=folder, keep_last=2, keep_every=0)
    update += 1
"""


@pytest.mark.slow
def test_killed_for_good_at_random_moments(tmp_path):
    """SIGKILL to processes that save without end. Whatever they said was saved is there, or has a successor."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    newest = 0
    for seed in range(3):
        command = [sys.executable, "-c", SAVING_WITHOUT_END, str(tmp_path), str(newest + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            said = [int(process.stdout.readline())]
            time.sleep(random.Random(seed).random() / 4)
            process.kill()
            said += [int(line) for line in process.stdout]
        found = saved_updates(tmp_path)
        assert found[-1] - said[-1] in (0, 1)
        assert find_checkpoint(tmp_path) == newest_sound(tmp_path).folder == complete_checkpoints(tmp_path)[-1]
        newest = found[-1]


def test_a_checkpoint_is_replaced_and_leftovers_go(tmp_path):
    for value in (0.0, 1.0):
        folder = write_checkpoint(tmp_path, snapshot(7, value=value))
        (tmp_path / ".checkpoint-00000003.incomplete").mkdir()
        (tmp_path / ".checkpoint-00000003.deleted").mkdir()
    write_checkpoint(tmp_path, snapshot(8))
    assert names(tmp_path) == ["checkpoint-00000007", "checkpoint-00000008"]
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], torch.ones(64))


@pytest.mark.parametrize(("keep_last", "keep_every", "left"), [
    (0, 0, [1, 2, 3, 4, 5, 6, 9]),
    (1, 0, [6, 9]),
    (3, 0, [4, 5, 6, 9]),
    (2, 2, [2, 4, 5, 6, 9]),
    (5, 0, [2, 3, 4, 5, 6, 9]),
    (8, 0, [1, 2, 3, 4, 5, 6, 9]),
])  # fmt: skip
def test_old_checkpoints_go_but_for_those_to_keep(keep_last, keep_every, left, tmp_path):
    """Update 9 is from an earlier run that got further than this one, which has just saved 6."""
    for update in (9, 1, 2, 3, 4, 5, 6):
        folder = write_checkpoint(tmp_path, snapshot(update))
    prune(tmp_path, newest=folder, keep_last=keep_last, keep_every=keep_every)
    assert saved_updates(tmp_path) == left
    assert len(names(tmp_path)) == len(left)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_named(damage, name, tmp_path):
    older, newer = (write_checkpoint(tmp_path, snapshot(update)) for update in (1, 2))
    content = bytearray((newer / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        (newer / name).unlink()
    else:
        (newer / name).write_bytes(content[: len(content) - (damage == "truncated")])
    with pytest.raises(UserError, match=f"{name}(:| is)") as error:
        Checkpoint.open(newer).verify()
    assert "\n" not in str(error.value)
    Checkpoint.open(older).verify()
    assert complete_checkpoints(tmp_path) == [older] + [newer] * (damage == "flipped")
    with logged("WARNING") as warnings:
        assert newest_sound(tmp_path).folder == older
    assert len(warnings) == 1 and newer.name in warnings[0] and name in warnings[0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_tensors_are_read_and_not_mapped(tmp_path):
    """A mapped optimizer file would be in memory twice, as a file and as tensors, until all of it is read."""
    path = tmp_path / "x.safetensors"
    TensorFile({"a": torch.arange(1000.0)}).write(path)
    with open_tensors(path) as file:
        tensor = file.get_tensor("a")
        assert str(path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(tensor, torch.arange(1000.0))


def test_a_checkpoint_hashes_what_it_reads_and_no_file_twice(tmp_path, monkeypatch):
    folder, hashed, sha256 = write_checkpoint(tmp_path, snapshot(7)), [], files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path.name) or sha256(path))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.update == 7 and checkpoint.folder == folder and hashed == []
    assert checkpoint.state == checkpoint.state == {"update": 7} and hashed == ["state.json"]
    for _ in range(2):
        with checkpoint.tensors("model.safetensors") as file:
            assert torch.equal(file.get_tensor("weight"), torch.zeros(64))
    assert hashed == ["state.json", "model.safetensors"]
    assert checkpoint.verify() is checkpoint.verify() and sorted(hashed) == sorted(FILES)


def manifest_of(files=None, **changes) -> str:
    return json.dumps({"format": 2, "update": 1, "files": files} | changes)


@pytest.mark.parametrize(("text", "message"), [
    ("", "not JSON"),
    ("\x80\x04N.", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "a JSON object is needed"),
    (manifest_of(format=3), "format 3 is unknown"),
    (manifest_of(files=[]), "must list .* but lists \\[\\]"),
    (manifest_of(files={"../secret": {}}), "lists .*../secret"),
    (manifest_of(files=dict.fromkeys([*FILES, "/etc/passwd"], {})), "lists .*/etc/passwd"),
    (manifest_of(files=dict.fromkeys(FILES, {"bytes": "1", "sha256": 0})), "size and checksum of"),
    (manifest_of(files=dict.fromkeys(FILES, 3)), "size and checksum of"),
])  # fmt: skip
def test_a_crafted_manifest_is_refused(text, message, tmp_path):
    folder = write_checkpoint(tmp_path, snapshot(1))
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        Checkpoint.open(folder).verify()
    assert complete_checkpoints(tmp_path) == [] and newest_sound(tmp_path) is None


def test_find_checkpoint_takes_a_checkpoint_or_a_run(tmp_path):
    first, second = (write_checkpoint(tmp_path, snapshot(update)) for update in (5, 123_456_789))
    assert second.name == "checkpoint-123456789"
    assert find_checkpoint(tmp_path) == second
    assert find_checkpoint(first) == first
    moved = shutil.move(first, tmp_path / "the best one")
    assert find_checkpoint(Path(moved)) == Path(moved)


def test_find_checkpoint_says_what_it_found_instead(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="only nothing"):
        find_checkpoint(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="only metrics.jsonl, model"):
        find_checkpoint(tmp_path)
    folder = write_checkpoint(tmp_path, snapshot(1))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json is missing: the checkpoint is not complete"):
        find_checkpoint(folder)
    with pytest.raises(UserError, match="no complete checkpoint is there, only checkpoint-00000001, metrics.jsonl"):
        find_checkpoint(tmp_path)


def test_a_folder_that_does_not_exist_holds_no_checkpoint(tmp_path):
    assert complete_checkpoints(tmp_path / "none") == [] and newest_sound(tmp_path / "none") is None
