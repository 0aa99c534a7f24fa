"""The folder of a run: where it is, that it can be written, and that no other run is in it."""

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from peft_pretraining.checkpoint.lock import only_run_in
from peft_pretraining.errors import UserError


class RunFolder:
    """The folder that --save_dir asks for. If it exists, it is taken at once, before its checkpoints are looked at."""

    def __init__(self, save_dir: str | None, *, named: str, owned: bool, cleanup: ExitStack) -> None:
        """
        named: what a folder that the run chooses itself is named after, for example the file of the model's config.
        owned: whether this process trains and is the main rank; others neither make nor take a folder.
        cleanup: gives the folder back to others.
        Raises UserError if another run is in the folder, or it cannot be written.
        """
        self.save_dir, self.named, self.owned, self.cleanup = save_dir, named, owned, cleanup
        self.taken = owned and save_dir is not None and Path(save_dir).is_dir()
        if self.taken:
            self._take(checkpoint=None)

    def path(self, *, checkpoint: Path | None) -> Path | None:
        """The folder, made and taken if it was not yet; only the main rank knows that of a new run without --save_dir.

        checkpoint: the one that the run goes on from, in whose folder it stays if it was given none.
        """
        if self.owned and not self.taken:
            return self._take(checkpoint=checkpoint)
        return Path(self.save_dir) if self.save_dir else None

    def _take(self, *, checkpoint: Path | None) -> Path:
        folder = make_save_dir(self.save_dir, model_config=self.named, checkpoint=checkpoint)
        self.cleanup.enter_context(only_run_in(folder))
        return folder


def make_save_dir(save_dir: str | None, *, model_config: str, checkpoint: Path | None = None) -> Path:
    """Makes the folder of a run and proves that it can be written. Raises UserError if it cannot.

    save_dir: --save_dir; without it, the run goes on in the folder of its checkpoint, or in a new one of its own.
    """
    if save_dir:
        folder = Path(save_dir)
    elif checkpoint is not None:
        folder = checkpoint.parent
    else:
        return _make_new(Path("checkpoints"), f"{Path(model_config).stem}-{time.strftime('%Y-%m-%d-%H-%M-%S')}")
    with _reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    return folder


def check_save_dir(folder: Path) -> None:
    """Raises UserError if make_save_dir would. Makes nothing."""
    with _reported(folder):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _make_new(parent: Path, name: str) -> Path:
    """A folder that nobody else has made: runs may start in the same second."""
    with _reported(parent / name):
        parent.mkdir(parents=True, exist_ok=True)
        for count in itertools.count(1):
            folder = parent / (f"{name}-{count}" if count > 1 else name)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
    return folder


@contextlib.contextmanager
def _reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--save_dir {folder} cannot be written ({reason}). Choose another folder.") from None
