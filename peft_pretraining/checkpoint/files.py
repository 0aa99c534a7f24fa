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

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors import SafetensorError, safe_open

from peft_pretraining.checkpoint.old_format import upgrade_progress
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

_NAME = re.compile(r"checkpoint-(\d{8,})|\.checkpoint-(\d{8,})\.replaced")
EXTRA = re.compile(rf"{TOKENIZER}/\w[\w.-]*")
ADVICE = "Resume from another checkpoint."


def checkpoint_folder(save_dir: Path, *, update: int) -> Path:
    """The folder of the checkpoint of that update."""
    return save_dir / f"checkpoint-{update:08d}"


def hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")


def update_of(folder: Path) -> int | None:
    """The update in a checkpoint's name; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1] or match[2]) if match else None


def complete_checkpoints(save_dir: Path) -> list[Path]:
    """The folders of all complete checkpoints, oldest first: the manifest is there and the files have their sizes."""
    return [folder for folder in checkpoint_folders(save_dir) if is_complete(folder)]


def checkpoint_folders(save_dir: Path) -> list[Path]:
    """Folders with a checkpoint's name, by update. One that was moved aside counts if no other has its name."""
    found: dict[int, Path] = {}
    for path in sorted(save_dir.glob("*checkpoint-*")):  # hidden names come first
        if (update := update_of(path)) is not None and path.is_dir():
            found[update] = path
    return [found[update] for update in sorted(found)]


def is_complete(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except UserError:
        return False
    return True


def newest_sound(save_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose files all have their checksums, or None. Warns of each newer one that is damaged."""
    for folder in reversed(checkpoint_folders(save_dir)):
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
    if (path / MANIFEST).exists() or update_of(path) is not None:
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
        names = [name for name in self._files if EXTRA.fullmatch(name)]
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
    if not isinstance(files, dict) or {name for name in files if not EXTRA.fullmatch(name)} != FILES:
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
        found = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {ADVICE}") from None
    if found != sha256:
        raise UserError(f"{path}: its checksum is wrong, the file is damaged. {ADVICE}")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
