"""The sink that keeps SAVE_DIR/report.html: refreshed after evaluations, written at the end."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loguru import logger

PAGE = "report.html"
SHARE = 0.01  # of a run's time that pages drawn before its end may take
AT_LEAST = 3.0  # seconds that a page is assumed to take: the first one loads matplotlib, and a machine may be busy


class ReportSink:
    """SAVE_DIR/report.html, made of the record that another sink has written before it.

    A page that may take the pages so far above SHARE of the time since the start is not drawn: the page then waits
    for a later evaluation, or for the end, where it is always drawn. No failure to draw it stops a run.
    """

    def __init__(self, save_dir: Path) -> None:
        self.save_dir = save_dir
        self.drawn = 0  # pages so far
        self._began = time.monotonic()
        self._spent, self._longest = 0.0, AT_LEAST  # seconds that all pages took, and that one may take
        self._evaluated = self._stale = self._failed = False

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """See Sink. The event after an evaluation draws the page, so that its subspaces are on the page."""
        self._stale |= name in ("update", "eval", "end")
        if self._evaluated and name != "end":
            elapsed = time.monotonic() - self._began
            if self._spent + self._longest <= SHARE * elapsed:
                self._draw()
        self._evaluated = name == "eval"

    def close(self) -> None:
        """See Sink."""
        if self._stale:
            self._draw()
        if self.drawn:
            logger.info(f"the page of this run: {self.save_dir / PAGE}")

    def _draw(self) -> None:
        if self._failed:
            return
        began = time.monotonic()
        try:
            from peft_pretraining.report.page import write_report  # not before: matplotlib takes a second

            write_report([self.save_dir], self.save_dir / PAGE)
            self.drawn += 1
            self._stale = False
        except Exception as error:
            self._failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning(f"{self.save_dir / PAGE} could not be drawn ({reason}): training goes on without it")
        took = time.monotonic() - began
        self._spent, self._longest = self._spent + took, max(self._longest, took)


def report_sinks(*, save_dir: Path, wanted: bool) -> list[ReportSink]:
    """The sink, or none where no page is wanted or matplotlib is not installed."""
    if wanted and find_spec("matplotlib") is None:
        logger.info(f"no {PAGE}: matplotlib is not installed. Try pip install matplotlib, or say --no_report")
        return []
    return [ReportSink(save_dir)] if wanted else []
