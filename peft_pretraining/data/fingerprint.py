"""A cheap hash of each data file, to find out after a resume whether the data is still the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from peft_pretraining.progress import LongWait

EDGE = 64 * 2**10  # bytes hashed at either end of a file
MAX_NAMES = 3  # in one message


def fingerprint_files(files: Sequence[Path]) -> dict[str, str]:
    """Size and hash of the first and last EDGE bytes of each file, by its name relative to their common folder.

    A file that cannot be read is left out, so that it counts as missing.
    """
    folder = os.path.commonpath([path.parent.resolve() for path in files]) if files else ""
    found = {}
    with LongWait("looking at the data files", total=len(files)) as progress:
        for path in files:
            with contextlib.suppress(OSError):
                found[Path(os.path.relpath(path.parent.resolve() / path.name, folder)).as_posix()] = _digest(path)
            progress.advance()
    return found


def describe_change(saved: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """One line that names the files changed, missing or added since; None if there is none, or one is unknown."""
    if not saved or not now:
        return None
    kinds = {
        "changed": [name for name in saved if name in now and now[name] != saved[name]],
        "missing": [name for name in saved if name not in now],
        "added": [name for name in now if name not in saved],
    }
    return "; ".join(f"{kind}: {list_names(names)}" for kind, names in kinds.items() if names) or None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(file.read(EDGE), digest_size=16)
        file.seek(max(0, size - EDGE))
        digest.update(file.read(EDGE))
    return f"{size}-{digest.hexdigest()}"


def list_names(names: Iterable[str]) -> str:
    """The first MAX_NAMES names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - MAX_NAMES
    return ", ".join(ordered[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
