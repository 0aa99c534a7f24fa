"""Signals that ask a run to stop: the update is finished and the run saved; the exit status says that it can go on.

SIGTERM            schedulers, `kill`
SIGINT             Ctrl-C
SIGHUP             the terminal is closed; left alone where it is ignored, as nohup does
SIGUSR1, SIGUSR2   Slurm's `--signal`, as a warning before the time limit
SIGXCPU            other schedulers' limit of CPU time
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from loguru import logger

from peft_pretraining.distributed import STOP_SIGNALS

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
BY_HAND = 130  # 128 + SIGINT, the status that shells use
SAME_PRESS = 1.0  # seconds: torchrun passes Ctrl-C on to processes that have already received it from the terminal


class Interrupted(Exception):
    """The run has been saved and should end with an exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class Interruption:
    """Whether a signal has asked this process to stop, and the exit status that follows."""

    def __init__(self) -> None:
        self.requested = False
        self.status = TRY_AGAIN
        self._pressed = 0.0

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
        if not self.requested:
            self.requested = True
            again = " Press it again to leave at once." if number == signal.SIGINT else ""
            logger.warning(f"{signal.Signals(number).name}: finishing this update, then saving.{again}")
