"""How far a long wait has come: a bar on a terminal, a log line now and then elsewhere, nothing for short waits."""

import os
import time

from loguru import logger
from tqdm import tqdm

QUIET = 2.0  # seconds before anything is shown
PERIOD = 10.0  # seconds between two log lines


class LongWait:
    """Counts to `total` and then ends by itself. Only the main process of a run shows anything.

    what: what is waited for, the beginning of a line.
    """

    def __init__(self, what: str, *, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        shown = None if os.environ.get("RANK", "0") == "0" else True  # None: on a terminal
        self._bar = tqdm(total=total, desc=what, delay=QUIET, leave=False, disable=shown, dynamic_ncols=True)
        self._next_line = time.monotonic() + QUIET

    def advance(self, count: int = 1) -> None:
        """Counts some more; beyond the total, nothing happens."""
        if self.done >= self.total:
            return
        self.done += count
        self._bar.update(count)
        if self._bar.disable and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PERIOD
            logger.info(f"{self.what}: {self.done} of {self.total}")
        if self.done >= self.total:
            self._bar.close()
