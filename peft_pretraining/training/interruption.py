"""Signals that ask a run to stop: the update is finished and the run saved; the exit status says that it can go on.

SIGTERM            schedulers, `kill`
SIGINT             Ctrl-C
SIGHUP             the terminal is closed; left alone where it is ignored, as nohup does
SIGUSR1, SIGUSR2   Slurm's `--signal`, as a warning before the time limit
SIGXCPU            other schedulers' limit of CPU time

A time budget that is nearly used up does the same.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from loguru import logger

from peft_pretraining.distributed import STOP_SIGNALS

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
BY_HAND = 130  # 128 + SIGINT, the status that shells use
SAME_PRESS = 1.0  # seconds: torchrun passes Ctrl-C on to processes that have already received it from the terminal


def process_start() -> float:
    """When this process was started, on the clock of time.monotonic; now, where the system does not tell.

    Importing torch takes seconds, on a network file system a minute.
    """
    try:
        since_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic()


class Interrupted(Exception):
    """The run has been saved and should end with an exit status. The message says how to go on."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Interruption:
    """Whether a signal or the time budget has asked this process to stop, and the exit status that follows."""

    def __init__(self, *, deadline: float = math.inf) -> None:
        """deadline: when the run should have saved and ended, on the clock of time.monotonic."""
        self.deadline = deadline
        self.margin = 0.0  # seconds that the rest of the run will take: one more update and a save
        self.status = TRY_AGAIN
        self._requested = False
        self._pressed = 0.0

    @property
    def requested(self) -> bool:
        """Whether to stop. Once it is True, it stays so."""
        if not self._requested and time.monotonic() + self.margin >= self.deadline:
            self._requested = True
            logger.warning(f"the time budget has {max(0, self.deadline - time.monotonic()):.1f} s left: saving")
        return self._requested

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """Takes signals as requests until the block ends. A second Ctrl-C raises KeyboardInterrupt at once."""
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._pressed and now - self._pressed > SAME_PRESS:
                raise KeyboardInterrupt
            self._pressed = self._pressed or now
            self.status = BY_HAND
        if not self._requested:
            self._requested = True
            again = " Press it again to leave at once." if number == signal.SIGINT else ""
            logger.warning(f"{signal.Signals(number).name}: finishing this update, then saving.{again}")
