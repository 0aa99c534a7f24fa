"""The checkpoints that are written into a run's folder, in the background while training goes on."""

import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loguru import logger

from peft_pretraining.checkpoint.atomic_write import Snapshot, prune, tidy, write_checkpoint, write_together
from peft_pretraining.checkpoint.files import checkpoint_folder, complete_checkpoints
from peft_pretraining.distributed import World


class CheckpointWriter:
    """Writes checkpoints into `save_dir`, in the background if training goes on.

    A save that fails is reported, never raised: hours of training are worth more than one checkpoint.
    """

    def __init__(self, save_dir: Path, *, keep_last: int = 0, keep_every: int = 0) -> None:
        """
        keep_last: how many checkpoints stay; 0 keeps all.
        keep_every: checkpoints whose update is a multiple of it stay in any case; 0 for none.
        """
        self.save_dir, self.keep_last, self.keep_every = save_dir, keep_last, keep_every
        self.last = self._newest()  # the newest complete checkpoint, or None
        self.seconds: float | None = None  # what the last save took; None before the first
        self._saved: Path | None = None
        self._thread: threading.Thread | None = None

    def save(
        self,
        snapshot: Snapshot,
        *,
        in_background: bool = True,
        write: Callable[[Path, Snapshot], Path] | None = None,
    ) -> None:
        """Writes a checkpoint, after the last save has ended. In the background, it returns at once.

        The background needs a snapshot whose tensors were copied, see take_snapshot.
        write: writes it; None for write_checkpoint.
        """
        self.wait()
        self._saved, write = None, write or write_checkpoint
        if not in_background:
            self._write(snapshot, write)
            return
        self._thread = threading.Thread(target=self._write, args=(snapshot, write), name="checkpoint")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is under way in the background."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> Path | None:
        """Waits for the last save. Returns its folder; None if it failed or there was none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._saved

    def _write(self, snapshot: Snapshot, write: Callable[[Path, Snapshot], Path]) -> None:
        began = time.monotonic()
        try:
            self._saved = self.last = write(self.save_dir, snapshot)
            self.seconds = time.monotonic() - began
        except Exception as error:  # any other would end the thread unheard
            self._give_up(checkpoint_folder(self.save_dir, update=snapshot.update), error)
            return
        try:
            prune(self.save_dir, newest=self._saved, keep_last=self.keep_last, keep_every=self.keep_every)
        except OSError as error:
            logger.warning(f"an old checkpoint in {self.save_dir} could not be deleted ({error.strerror or error})")

    def _give_up(self, folder: Path, error: Exception) -> None:
        """Removes what was written of a checkpoint and says what there is instead."""
        with contextlib.suppress(OSError):
            tidy(self.save_dir)
        self.last = self._newest()
        kept = f"the last complete checkpoint is {self.last}" if self.last else "there is no complete checkpoint yet"
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        logger.error(f"could not save {folder} ({reason}): training goes on; {kept}")

    def _newest(self) -> Path | None:
        complete = complete_checkpoints(self.save_dir)
        return complete[-1] if complete else None


def save_together(writer: CheckpointWriter | None, snapshot: Snapshot, *, save_dir: Path, world: World) -> None:
    """Has all processes write a checkpoint, see write_together. writer: that of the main process, which reports."""
    write = partial(write_together, world=world)
    if writer is not None:
        writer.save(snapshot, in_background=False, write=write)
        return
    with contextlib.suppress(OSError):  # the main process says so
        write(save_dir, snapshot)
