"""Checkpoints of a few bytes, files in them that somebody has changed, and file systems that fail."""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from loguru import logger

from peft_pretraining.checkpoint import tensor_file
from peft_pretraining.checkpoint.atomic_write import Snapshot
from peft_pretraining.checkpoint.files import FILES, Checkpoint, complete_checkpoints
from peft_pretraining.checkpoint.tensor_file import TensorFile

WATCHED = [
    (os, "mkdir"),
    (os, "open"),
    (os, "fsync"),
    (os, "replace"),
    (os, "rmdir"),
    (os, "unlink"),
    (io, "open"),
    (tensor_file, "write_tensors"),
]


def snapshot(update: int, *, value: float = 0.0) -> Snapshot:
    """All files of a checkpoint, which know their update."""
    tensors = TensorFile({"weight": torch.full((64,), value)})
    files = {name: tensors if name.endswith("safetensors") else json.dumps({"update": update}) for name in FILES}
    return Snapshot(update, files)


def saved_updates(save_dir: Path) -> list[int]:
    """The updates of the complete checkpoints, each of which must be sound."""
    return [Checkpoint.open(folder).verify().state["update"] for folder in complete_checkpoints(save_dir)]


def names(save_dir: Path) -> list[str]:
    """Of all that lies in a folder."""
    return sorted(path.name for path in save_dir.iterdir())


class Bomb:
    """A pickle of it, read, makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def replace_file(folder: Path, name: str, content: bytes, *, vouched: bool = True) -> None:
    """Puts other bytes in a checkpoint file's place; the manifest vouches for them: who can write one can the other."""
    (folder / name).write_bytes(content)
    if vouched:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))


def fail_at(call: int, monkeypatch, error: BaseException, *, forever: bool = False) -> list[str]:
    """Makes the `call`-th of the calls that touch the file system raise, before it does anything. Returns their log.

    forever: all those after it that would write raise, too, as on a full disk.
    """
    log: list[str] = []

    def watched(name, original):
        def wrapper(*args, **kwargs):
            log.append(name)
            if len(log) == call or (forever and len(log) > call and name in ("mkdir", "write_tensors", "fsync")):
                raise error
            return original(*args, **kwargs)

        return wrapper

    for module, name in WATCHED:
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    return log


@contextlib.contextmanager
def logged(level: str) -> Iterator[list[str]]:
    """The messages of that level and above, while this is open."""
    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}", level=level)
    try:
        yield messages
    finally:
        logger.remove(sink)
