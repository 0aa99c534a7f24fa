"""One run in a folder: a lock that names the process and the machine, and does not outlive them.

SAVE_DIR/.running holds the owner as JSON. On one machine the kernel's lock on the file says whether the owner lives,
because it ends with the process. A folder that several machines share may not carry such locks from one to the other,
so the owner also touches the file every BEAT seconds; another machine takes the folder over after STALE seconds.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loguru import logger

from peft_pretraining.errors import UserError

NAME = ".running"
BEAT = 20.0  # seconds
STALE = 300.0  # seconds; a machine that is that late does not write either


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Owns the folder until the block ends. Raises UserError if another run does."""
    path = folder / NAME
    file, locked = _open(path)
    stop = threading.Event()
    with contextlib.ExitStack() as cleanup:  # in reverse order
        cleanup.callback(os.close, file)
        owner = _take(file, path, locked=locked)
        cleanup.callback(_release, file, path, owner)
        cleanup.callback(stop.set)
        threading.Thread(target=_beat, args=(path, stop), name="lock", daemon=True).start()
        yield


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor of the file, and whether it has the kernel's lock, which not all file systems have.

    Raises UserError if another process has it.
    """
    while True:
        locked = True
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # A record lock: unlike flock's, it is not shared with forked workers that may outlive this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = _read(file)
                os.close(file)
                raise _taken(path, owner) from None
            locked = False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file)):
                return file, locked
        os.close(file)  # the owner before has just deleted the file


def _take(file: int, path: Path, *, locked: bool) -> dict[str, Any]:
    """Writes this process into the file, and returns what it wrote.

    Raises UserError if an owner that no kernel can tell of may be alive.
    """
    owner, here = _read(file), _this_process()
    if owner:
        elsewhere = any(owner.get(key) != here[key] for key in ("host", "boot"))
        if (elsewhere or not locked) and _age(file) < STALE:
            raise _taken(path, owner, hint=f" If it is gone already, the folder is free {STALE:.0f} s after its end.")
        logger.warning(f"{path.parent} belonged to {_name(owner)}, which is gone: taken over")
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(here).encode(), 0)
    return here


def _release(file: int, path: Path, owner: dict[str, Any]) -> None:
    """Deletes the file, unless another machine has taken it over, or this is a fork of the owner."""
    if _read(file) == owner and owner["pid"] == os.getpid():
        path.unlink(missing_ok=True)


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _age(file: int) -> float:
    """Seconds since the file was touched, by the clock of the file's machine."""
    touched = os.fstat(file).st_mtime
    os.pwrite(file, b" ", os.fstat(file).st_size)
    now = os.fstat(file).st_mtime
    os.utime(file, (touched, touched))
    return now - touched


def _this_process() -> dict[str, Any]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot, "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _read(file: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(file, 4096, 0))
    except ValueError:  # empty, or written by half
        return {}
    return owner if isinstance(owner, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')} (since {owner.get('since', '?')})"


def _taken(path: Path, owner: dict[str, Any], *, hint: str = "") -> UserError:
    return UserError(
        f"{path.parent} is in use by {_name(owner)}: two runs would overwrite each other's checkpoints. Wait until it "
        f"has ended, or choose another --save_dir.{hint}"
    )
