"""Which local files hold documents: those of a folder, a single one, or those that match a glob.

No file that looks like data is left out in silence. What cannot be read under a shard's name ends the search with an
error, because training on the rest would go unnoticed; what has no shard's name is warned of.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from loguru import logger

from peft_pretraining.data.fingerprint import list_names
from peft_pretraining.data.records import SUFFIXES, is_data
from peft_pretraining.errors import UserError

Split = Literal["train", "validation"]

PLACES = (".", "en", "data")  # in a folder: its own files, C4's layout, a data set's repository on the hub
# Endings of files that hold data in a form that cannot be read here.
FOREIGN = (".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz", ".csv", ".tsv", ".arrow", ".feather", ".npy", ".bin")
LFS = b"version https://git-lfs"


def find_files(dataset: str, *, any_name: bool = False) -> dict[Split, list[Path]]:
    """The files of each split of a local data set, sorted.

    dataset: a folder, whose files have `train` or `valid` in their names, itself or in its `en` or `data` folder; or a
        file or a glob, all of whose matches are of the split `train`.
    any_name: whether files of a folder without such names count as `train`.
    Raises UserError if there is nothing to read, or if a file that should be read cannot be.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _find_in_folder(path, any_name=any_name)
    if path.is_file() or path.is_symlink():
        matches = [path]
    else:
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if not Path(match).is_dir())
    if not matches:
        problem = "no file matches" if glob.has_magic(dataset) else "no such file or folder:"
        hint = " In a glob, write [[] for a [ in a name." if "[" in dataset else ""
        raise UserError(f"{problem} {dataset}. Give a folder, a file, a glob in quotes, or one of: c4, pydocs.{hint}")
    for match in matches:
        if not is_data(match):
            raise UserError(f"cannot read {match}: its suffix is none of {', '.join(SUFFIXES)}.")
    _check_readable(matches)
    return {"train": matches, "validation": []}


def naming_advice(folder: Path | str) -> str:
    """What to do about a folder without files for training."""
    return f"Name them like train-0.jsonl or c4-train.00000.json.gz, or give a glob such as '{folder}/*.jsonl'."


def _find_in_folder(folder: Path, *, any_name: bool) -> dict[Split, list[Path]]:
    seen: list[Path] = []
    for place in PLACES:
        entries = _entries(folder / place)
        files = [entry for entry in entries if is_data(entry)]
        validation = [file for file in files if "valid" in file.name.lower()]
        train = [file for file in files if "train" in file.name.lower() and file not in validation]
        if any_name and not (train or validation):
            train = files
        if used := [*train, *validation]:
            _check_readable(used)
            _check_left_out(folder / place, [entry for entry in entries if entry not in used])
            return {"train": train, "validation": validation}
        seen += entries
    found = f" Found: {list_names(file.name for file in seen)}." if seen else ""
    if any_name:
        raise UserError(f"{folder} holds no file that can be read ({', '.join(SUFFIXES)}).{found}")
    raise UserError(f"no train files in {folder}, or in its folders en and data.{found} {naming_advice(folder)}")


def _entries(folder: Path) -> list[Path]:
    """The files of a folder, dangling links among them. Names that begin with a dot are no shards: `._x` is macOS's."""
    try:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}).") from None
    return [entry for entry in found if not entry.name.startswith(".") and not entry.is_dir()]


def _check_readable(files: Sequence[Path]) -> None:
    """Raises UserError that names the files whose content is not there."""
    for problem, holds in _PROBLEMS.items():
        if bad := [file for file in files if holds(file)]:
            raise UserError(problem.format(files=list_names(file.name for file in bad), folder=bad[0].parent))


def _is_empty(file: Path) -> bool:
    return file.stat().st_size == 0


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(LFS)) == LFS
    except OSError:
        return False  # whoever reads it will say so, after trying again


_PROBLEMS = {  # in this order: a link to nothing has no size
    "links that lead nowhere in {folder}: {files}. Bring the files back, or take the links out.": lambda file: (
        not file.exists()
    ),
    "empty files in {folder}: {files}. Bring their content back, or take them out.": _is_empty,
    "Git LFS pointers in place of files in {folder}: {files}. Fetch them: git lfs pull.": _is_pointer,
}


def _check_left_out(folder: Path, entries: Sequence[Path]) -> None:
    """Raises UserError for shards in a form that cannot be read. Warns of other data that is not read."""
    foreign = [entry for entry in entries if entry.name.lower().endswith(FOREIGN)]
    shards = [entry for entry in foreign if "train" in entry.name.lower() or "valid" in entry.name.lower()]
    if shards:
        names = list_names(file.name for file in shards)
        raise UserError(f"shards that cannot be read: {names}. Convert them ({', '.join(SUFFIXES)}), or take them out.")
    if others := [entry.name for entry in entries if entry in foreign or is_data(entry)]:
        logger.warning(f"not read in {folder}, because neither train nor valid is in the name: {list_names(others)}")
