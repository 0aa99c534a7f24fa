"""Writes checkpoints so that they are complete or absent at any moment, and deletes old ones; see files.py for names.

A checkpoint is written under a hidden name, synced to the disk file by file with the manifest last, and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.files import (
    EXTRA,
    FILES,
    FORMAT,
    MANIFEST,
    checkpoint_folder,
    complete_checkpoints,
    hidden,
    is_complete,
    sha256_of,
    update_of,
)
from peft_pretraining.checkpoint.shared_file import SharedFile
from peft_pretraining.checkpoint.tensor_file import TensorFile
from peft_pretraining.distributed import World

Content = str | bytes | TensorFile | SharedFile
_HEADERS = 1 << 20  # bytes, more than what the files hold beside tensors and texts


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint: copies in host memory, or the tensors of the run themselves."""

    update: int  # the update after which it was taken
    files: Mapping[str, Content]  # the content of each of FILES, and of the files in TOKENIZER

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and texts."""
        return sum(
            file.nbytes if isinstance(file, TensorFile | SharedFile) else len(_as_bytes(file))
            for file in self.files.values()
        )

    @property
    def shared(self) -> dict[str, SharedFile]:
        """The files that several processes write together."""
        return {name: file for name, file in self.files.items() if isinstance(file, SharedFile)}


def write_checkpoint(save_dir: Path, snapshot: Snapshot) -> Path:
    """Writes a checkpoint into `save_dir`, which is made if it is missing. Replaces one of the same update.

    Returns its folder, which is synced to the disk. Raises OSError; `tidy` then removes the rest.
    """
    return _finish(save_dir, snapshot, hashes=_begin(save_dir, snapshot))


def write_together(save_dir: Path, snapshot: Snapshot, *, world: World) -> Path:
    """write_checkpoint by all processes of a run, of which each has other rows of the tensors, see shared_file.py.

    snapshot: what this process has; of other files than the shared ones, what the main process has counts.
    Raises OSError on every rank if it fails on one.
    """
    hashes = _on_all(world, lambda: _begin(save_dir, snapshot) if world.is_main else {})
    partial = hidden(checkpoint_folder(save_dir, update=snapshot.update), "incomplete")

    def fill() -> None:
        for name, file in snapshot.shared.items():
            file.fill(partial / name)

    def finish() -> None:
        if world.is_main:
            read = {name: sha256_of(partial / name) for name in snapshot.shared}
            _finish(save_dir, snapshot, hashes=hashes | read)

    for step in (fill, finish):
        _on_all(world, step)
    return checkpoint_folder(save_dir, update=snapshot.update)


def _on_all(world: World, work: Callable[[], Any]) -> Any:
    """What `work` returns here, when it has ended on every rank. Raises OSError on every rank if one has failed."""
    result, problem, failed = None, None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others wait for word of it
        failed, problem = error, getattr(error, "strerror", None) or str(error) or type(error).__name__
    for rank, said in enumerate(world.gather(problem)):
        if said is not None:
            raise OSError(f"process {rank}: {said}") from failed
    return result


def _begin(save_dir: Path, snapshot: Snapshot) -> dict[str, str]:
    """Writes all files but the shared ones, which it creates, under a hidden name. Returns the checksums."""
    assert all(name in FILES or EXTRA.fullmatch(name) for name in snapshot.files) and snapshot.files.keys() >= FILES
    folder = checkpoint_folder(save_dir, update=snapshot.update)
    save_dir.mkdir(parents=True, exist_ok=True)
    tidy(save_dir)
    if shutil.disk_usage(save_dir).free < snapshot.nbytes + _HEADERS:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    partial = hidden(folder, "incomplete")
    partial.mkdir()
    for name, file in snapshot.shared.items():
        file.create(partial / name)
    own = ((name, file) for name, file in snapshot.files.items() if not isinstance(file, SharedFile))
    return {name: _write_file(partial / name, content) for name, content in own}


def _finish(save_dir: Path, snapshot: Snapshot, *, hashes: Mapping[str, str]) -> Path:
    """Writes the manifest and gives the folder its name. Returns the folder."""
    folder = checkpoint_folder(save_dir, update=snapshot.update)
    partial = hidden(folder, "incomplete")
    files = {name: {"bytes": (partial / name).stat().st_size, "sha256": sha256} for name, sha256 in hashes.items()}
    manifest = {"format": FORMAT, "update": snapshot.update, "files": files}
    _write_file(partial / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True))
    for folder_of_files in {(partial / name).parent for name in files}:
        _sync(folder_of_files)
    _put_in_place(partial, folder)
    return folder


def _write_file(path: Path, content: str | bytes | TensorFile) -> str:
    """Writes a file to the disk and returns its SHA-256."""
    if isinstance(content, TensorFile):
        return content.write(path)
    if not path.parent.exists():
        path.parent.mkdir()
    path.write_bytes(_as_bytes(content))
    _sync(path)
    return hashlib.sha256(_as_bytes(content)).hexdigest()


def _as_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _sync(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Gives a complete folder its name."""
    replaced = hidden(folder, "replaced")
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def tidy(save_dir: Path) -> None:
    """Removes the rests of unfinished saves and deletions. A checkpoint that was being replaced gets its name back.

    Call it while nothing is being written there. Raises OSError if the name cannot be given.
    """
    for path in sorted(save_dir.glob(".checkpoint-*.*")):
        name, _, state = path.name[1:].rpartition(".")
        if state == "replaced" and not (save_dir / name).exists() and is_complete(path):
            os.replace(path, save_dir / name)
        elif state in ("incomplete", "replaced", "deleted"):
            shutil.rmtree(path, ignore_errors=True)


def prune(save_dir: Path, *, newest: Path, keep_last: int, keep_every: int) -> None:
    """Deletes old complete checkpoints.

    newest: the newest checkpoint, which stays.
    keep_last: number of checkpoints to keep, `newest` included; 0 keeps all.
    keep_every: checkpoints whose update is a multiple of it stay, too; 0 for none.
    Checkpoints after `newest`, from an earlier run that got further, stay. Raises OSError.
    """
    latest = update_of(newest)
    assert latest is not None
    older = [
        (folder, update) for folder in complete_checkpoints(save_dir) if (update := update_of(folder) or 0) < latest
    ]
    surplus = max(0, len(older) + 1 - keep_last) if keep_last else 0
    for folder, update in older[:surplus]:
        if not keep_every or update % keep_every:
            deleted = hidden(folder, "deleted")
            os.replace(folder, deleted)
            shutil.rmtree(deleted, ignore_errors=True)
