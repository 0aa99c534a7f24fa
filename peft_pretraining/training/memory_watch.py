"""The planned memory beside what a run has measured: after the third update, and after the first refresh of a basis."""

from collections.abc import Mapping

import torch
from loguru import logger

from peft_pretraining.training.metrics import Record
from qgalore.live_memory import Peak
from qgalore.optimizer import LowRankOptimizer

THIRD, REFRESH = "third update", "first refresh"
REFRESHES, EVALUATION = "an update with refreshes", "evaluation"  # phases of a plan that come later than the others


class MemoryWatch:
    """Records the event `memory`, twice in the life of a process.

    peaks: the planned peaks, see MemoryPlan.
    device: the device of the run. A CPU has no measured peak: what is resident there holds Python and all its packages.
    """

    def __init__(self, peaks: Mapping[str, Peak], *, device: torch.device) -> None:
        self.peaks, self.device = peaks, device
        self._waiting = [THIRD, REFRESH]
        self._updates = 0  # of this process
        self._first_bases = 0  # refreshes before the second update, which computed the first bases

    def after_update(self, record: Record, *, update: int, optimizer: torch.optim.Optimizer, evaluated: bool) -> None:
        """Looks whether one of the two has come, and records it.

        update: number of finished updates of the run.
        evaluated: whether there has been an evaluation.
        """
        if not self._waiting:
            return
        self._updates += 1
        refreshes = _refreshes(optimizer)
        if self._updates == 1:
            self._first_bases = refreshes
        refreshed = refreshes > self._first_bases
        for when, has_come in ((THIRD, self._updates >= 3), (REFRESH, refreshed)):
            if has_come and when in self._waiting:
                self._waiting.remove(when)
                self._record(record, update, when, refreshed=refreshed, evaluated=evaluated)

    def _record(self, record: Record, update: int, when: str, *, refreshed: bool, evaluated: bool) -> None:
        later = {REFRESHES: refreshed, EVALUATION: evaluated}
        planned = max(
            (peak for phase, peak in self.peaks.items() if later.get(phase, True)), key=lambda peak: peak.bytes
        )
        measured = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        record.event(
            "memory",
            update=update,
            when=when,
            planned=planned.kinds,
            planned_peak=planned.bytes,
            measured_peak=measured,
        )
        beside = "not measured on a CPU" if measured is None else f"measured {measured / 1e9:.3f} GB"
        logger.info(f"memory after the {when}: planned {planned.bytes / 1e9:.3f} GB, {beside}")


def _refreshes(optimizer: torch.optim.Optimizer) -> int:
    """Bases computed so far, in this process and before."""
    if not isinstance(optimizer, LowRankOptimizer):
        return 0
    return sum(update.state.get("refreshes", 0) for update in optimizer.updates.values())
