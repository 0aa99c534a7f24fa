"""Checkpoints on disk: folders that are complete or absent at any moment, whatever stops the process.

    SAVE_DIR/checkpoint-00000100/       after update 100
        config.json  model.safetensors  optimizer.safetensors  rng.safetensors  state.json
        tokenizer/                      the files of the tokenizer
        manifest.json                   {"format": 2, "update": 100, "files": {name: {"bytes": n, "sha256": hex}}}

A checkpoint is written under a hidden name, synced to the disk file by file with the manifest last, and renamed. Its
hidden names, after `.checkpoint-00000100.`, are

    incomplete      being written
    replaced        complete; makes room for a new one of the same update, and counts until that has its name
    deleted         being deleted

so that no half folder ever has a checkpoint's name, and each can be told from the others after a kill.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors import SafetensorError, safe_open

from peft_pretraining.checkpoint.old_format import upgrade_progress
from peft_pretraining.checkpoint.shared_file import SharedFile
from peft_pretraining.checkpoint.tensor_file import TensorFile
from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from peft_pretraining.json_files import read_json
from peft_pretraining.progress import LongWait

FORMAT = 2
READABLE = (1, FORMAT)  # see old_format.py
MANIFEST = "manifest.json"
CONFIG, MODEL, OPTIMIZER = "config.json", "model.safetensors", "optimizer.safetensors"
RNG, STATE = "rng.safetensors", "state.json"
FILES = frozenset((CONFIG, MODEL, OPTIMIZER, RNG, STATE))
TOKENIZER = "tokenizer"  # a folder, which checkpoints of older versions do not have

Content = str | bytes | TensorFile | SharedFile
_NAME = re.compile(r"checkpoint-(\d{8,})|\.checkpoint-(\d{8,})\.replaced")
_EXTRA = re.compile(rf"{TOKENIZER}/\w[\w.-]*")
_HEADERS = 1 << 20  # bytes, more than what the files hold beside tensors and texts
ADVICE = "Resume from another checkpoint."


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


def checkpoint_folder(save_dir: Path, *, update: int) -> Path:
    """The folder of the checkpoint of that update."""
    return save_dir / f"checkpoint-{update:08d}"


def _hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")


def _update(folder: Path) -> int | None:
    """The update in a checkpoint's name; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1] or match[2]) if match else None


# Writing


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
    partial = _hidden(checkpoint_folder(save_dir, update=snapshot.update), "incomplete")

    def fill() -> None:
        for name, file in snapshot.shared.items():
            file.fill(partial / name)

    def finish() -> None:
        if world.is_main:
            read = {name: _sha256(partial / name) for name in snapshot.shared}
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
    assert all(name in FILES or _EXTRA.fullmatch(name) for name in snapshot.files) and snapshot.files.keys() >= FILES
    folder = checkpoint_folder(save_dir, update=snapshot.update)
    save_dir.mkdir(parents=True, exist_ok=True)
    tidy(save_dir)
    if shutil.disk_usage(save_dir).free < snapshot.nbytes + _HEADERS:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    partial = _hidden(folder, "incomplete")
    partial.mkdir()
    for name, file in snapshot.shared.items():
        file.create(partial / name)
    own = ((name, file) for name, file in snapshot.files.items() if not isinstance(file, SharedFile))
    return {name: _write_file(partial / name, content) for name, content in own}


def _finish(save_dir: Path, snapshot: Snapshot, *, hashes: Mapping[str, str]) -> Path:
    """Writes the manifest and gives the folder its name. Returns the folder."""
    folder = checkpoint_folder(save_dir, update=snapshot.update)
    partial = _hidden(folder, "incomplete")
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
    replaced = _hidden(folder, "replaced")
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
        if state == "replaced" and not (save_dir / name).exists() and _is_complete(path):
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
    latest = _update(newest)
    assert latest is not None
    older = [(folder, update) for folder in complete_checkpoints(save_dir) if (update := _update(folder) or 0) < latest]
    surplus = max(0, len(older) + 1 - keep_last) if keep_last else 0
    for folder, update in older[:surplus]:
        if not keep_every or update % keep_every:
            deleted = _hidden(folder, "deleted")
            os.replace(folder, deleted)
            shutil.rmtree(deleted, ignore_errors=True)


# Reading


def complete_checkpoints(save_dir: Path) -> list[Path]:
    """The folders of all complete checkpoints, oldest first: the manifest is there and the files have their sizes."""
    return [folder for folder in _candidates(save_dir) if _is_complete(folder)]


def _candidates(save_dir: Path) -> list[Path]:
    """Folders with a checkpoint's name, by update. One that was moved aside counts if no other has its name."""
    found: dict[int, Path] = {}
    for path in sorted(save_dir.glob("*checkpoint-*")):  # hidden names come first
        if (update := _update(path)) is not None and path.is_dir():
            found[update] = path
    return [found[update] for update in sorted(found)]


def _is_complete(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except UserError:
        return False
    return True


def newest_sound(save_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose files all have their checksums, or None. Warns of each newer one that is damaged."""
    for folder in reversed(_candidates(save_dir)):
        try:
            return Checkpoint.open(folder).verify()
        except UserError as error:
            logger.warning(f"{folder.name} is passed over: {error}")
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest complete one in it.

    Raises UserError if there is none, or if `path` is an incomplete one.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder. Name a checkpoint or a folder with checkpoints.")
    if (path / MANIFEST).exists() or _update(path) is not None:
        return Checkpoint.open(path).folder
    complete = complete_checkpoints(path)
    if complete:
        return complete[-1]
    names = sorted(entry.name for entry in path.iterdir())
    found = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "nothing"
    raise UserError(f"{path}: no complete checkpoint is there, only {found}. Name a folder with checkpoints.")


class Checkpoint:
    """A complete checkpoint to read from. Every file is hashed once, before it is read."""

    def __init__(self, folder: Path, *, update: int, files: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder, self.update = folder, update
        self._files = files
        self._verified: set[str] = set()

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads the manifest and compares the sizes of the files. Raises UserError if one is missing or differs."""
        manifest = _read_manifest(folder)
        for name, entry in manifest["files"].items():
            _check_size(folder / name, entry["bytes"])
        return cls(folder, update=manifest["update"], files=manifest["files"])

    def verify(self) -> Checkpoint:
        """Hashes the files that have not been hashed yet. Raises UserError that names a damaged one."""
        with LongWait(f"verifying {self.folder.name}"):
            for name in self._files:
                self.file(name)
        return self

    def file(self, name: str) -> Path:
        """The path of a file whose checksum is right. Raises UserError if it is not."""
        path = self.folder / name
        if name not in self._verified:
            _check_hash(path, self._files[name]["sha256"])
            self._verified.add(name)
        return path

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer; None in a checkpoint of an older version. Raises UserError if it is damaged."""
        names = [name for name in self._files if _EXTRA.fullmatch(name)]
        return [self.file(name).parent for name in names][0] if names else None

    def tensors(self, name: str) -> AbstractContextManager[Any]:
        """A safetensors file, opened; see open_tensors."""
        return open_tensors(self.file(name), advice=ADVICE)

    @cached_property
    def state(self) -> dict[str, Any]:
        """The object in state.json. Raises UserError if it is damaged."""
        state = read_json(self.file(STATE), advice=ADVICE)
        return upgrade_progress(state) if state.get("format") == 1 else state


@contextmanager
def open_tensors(path: Path, *, advice: str = "") -> Iterator[Any]:
    """A safetensors file with its header read; tensors are read one by one, and nothing is unpickled.

    advice: what to do about a damaged file. Raises UserError, also from inside the block, if it is damaged.
    """
    try:
        with _open_unmapped(path) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:  # JSON: what a file says beside its tensors
        raise UserError(f"{path}: damaged, or not a safetensors file ({error}). {advice}".rstrip()) from error


def _open_unmapped(path: Path) -> Any:
    """The file with tensors that are read, not mapped: a mapping counts as memory until the whole file is closed."""
    try:
        return safe_open(path, framework="pt", backend="pread")
    except TypeError:  # safetensors before 0.8 can only map
        return safe_open(path, framework="pt")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with an entry for each of FILES. Raises UserError if it is broken."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{path} is missing: the checkpoint is not complete. {ADVICE}")
    manifest = read_json(path, advice=ADVICE)
    if manifest.get("format") not in READABLE:
        raise UserError(f"{path}: format {manifest.get('format')!r} is unknown here; this version reads {FORMAT}.")
    if not isinstance(manifest.get("update"), int):
        raise UserError(f"{path}: the number of the update is missing. {ADVICE}")
    files = manifest.get("files")
    if not isinstance(files, dict) or {name for name in files if not _EXTRA.fullmatch(name)} != FILES:
        named = sorted(files) if isinstance(files, dict) else files
        raise UserError(f"{path}: it must list {', '.join(sorted(FILES))}, but lists {named}. {ADVICE}")
    for name, entry in files.items():
        if not isinstance(entry, dict) or [type(entry.get(key)) for key in ("bytes", "sha256")] != [int, str]:
            raise UserError(f"{path}: size and checksum of {name} are missing. {ADVICE}")
    return manifest


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing. {ADVICE}")
    if (found := path.stat().st_size) != size:
        raise UserError(f"{path}: {found:,} bytes where {size:,} were written. {ADVICE}")


def _check_hash(path: Path, sha256: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {ADVICE}") from None
    if found != sha256:
        raise UserError(f"{path}: its checksum is wrong, the file is damaged. {ADVICE}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
