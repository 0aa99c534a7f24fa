"""How far a long wait has come: a bar on a terminal, a log line now and then elsewhere, nothing for short waits."""

import os
import sys
import threading
import time

from loguru import logger
from tqdm import tqdm

QUIET = 2.0  # seconds before anything is shown
PERIOD = 10.0  # seconds between two log lines
REDRAW = 0.25  # seconds between two drawings of the bar


class LongWait:
    """Shows that something takes long. A thread does so, because what is waited for may be one call of compiled code.

        with LongWait("saving"): ...                        the seconds so far
        with LongWait("evaluating", total=40) as wait: ...  and the steps, each counted by wait.advance()

    Without `with`, it begins at the first step and ends at the last one. Only the main process of a run shows anything.
    No process may be forked meanwhile: the fork could inherit a lock that the thread holds.
    """

    def __init__(self, what: str, *, total: int | None = None) -> None:
        """what: what is waited for, the beginning of a line."""
        self.what, self.total, self.done = what, total, 0
        self._began: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> "LongWait":
        self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """Counts some more steps. After the last one, nothing happens."""
        self._begin()
        self.done += count
        if self.total is not None and self.done >= self.total:
            self.close()

    def close(self) -> None:
        """Ends it; afterwards nothing of it is on the screen. It may be called twice."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _begin(self) -> None:
        if self._began is None:
            self._began = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                self._thread.start()

    def _show(self) -> None:
        if self._ended.wait(QUIET):
            return
        if sys.stderr.isatty():
            self._draw()
        else:
            self._log()

    def _draw(self) -> None:
        form = "{desc}: {elapsed}" if self.total is None else None
        with tqdm(total=self.total, desc=self.what, leave=False, dynamic_ncols=True, bar_format=form) as bar:
            bar.start_t -= QUIET
            bar.n = self.done
            while not self._ended.wait(REDRAW):
                bar.n = self.done
                bar.refresh()

    def _log(self) -> None:
        logger.info(self._line())
        while not self._ended.wait(PERIOD):
            logger.info(self._line())
        logger.info(f"{self.what}: done after {self._seconds():.0f} s")

    def _line(self) -> str:
        steps = "" if self.total is None else f"{self.done} of {self.total}, "
        return f"{self.what}: {steps}{self._seconds():.0f} s so far"

    def _seconds(self) -> float:
        assert self._began is not None
        return time.monotonic() - self._began
