"""When a basis is refreshed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MEMORY = 10  # updates that a first moment with beta1 = 0.9 remembers, 1 / (1 - beta1)
KEYS = ("refreshes", "next_refresh", "gap", "overlap", "overlaps")  # what a schedule keeps in the state of a parameter
MAX_GROWTH = 32  # times the first gap: a subspace that starts to move again is noticed


@dataclass(frozen=True)
class RefreshSchedule:
    """A refresh at the first update and then every `gap` updates, each matrix at its own time within the gap.

    gap: updates between refreshes.
    offset: updates from the first refresh to the second, from 1 to gap; spread over the matrices, so that no single
        update refreshes them all.

    It is lazy if a `threshold` is given (Zhang et al. 2024, Q-GaLore, section 3.2): once the mean overlap of the last
    `queue_size` pairs of successive bases reaches it, the gap is multiplied by `growth` and the queue cleared, up to
    MAX_GROWTH times the first gap. The overlap, ||P_new^T P_old||_F^2 / r in [0, 1], is the mean squared cosine of the
    principal angles: it does not depend on signs or rotations of the basis vectors.

    Its counts are in the optimizer's state of the parameter: `refreshes` so far, the update at which the next
    one is due, `next_refresh`, and, if it is lazy, the last `overlap`, the queue of `overlaps` and the present `gap`.
    """

    gap: int
    offset: int
    threshold: float | None = None
    growth: float = 2.0
    queue_size: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.offset <= self.gap:
            raise ValueError(f"the offset of a refresh must lie in 1..{self.gap} (the gap), not {self.offset}")
        if self.growth < 1 or self.queue_size < 1:
            raise ValueError("a lazy gap must grow by a factor of at least 1, over a queue of at least 1 overlap")

    @property
    def lazy(self) -> bool:
        return self.threshold is not None

    def share(self, state: Mapping[str, Any]) -> float:
        """How far a refresh turns the basis towards the new gradient's subspace: all the way from a gap of 10 on.

        One gradient is mostly noise, and so is its subspace. The first moment remembers about 10 updates; where the
        subspace turns faster than that, nothing is ever averaged (docs/notebook.md, "Short gaps").
        """
        return min(1.0, state.get("gap", self.gap) / MEMORY)

    def due(self, state: Mapping[str, Any], *, step: int) -> bool:
        """Whether the basis must be computed from this update's gradient. step: 1-based."""
        return step >= state.get("next_refresh", 1)

    def record(self, state: dict[str, Any], *, step: int, overlap: float | None) -> None:
        """Counts a refresh, or a failed one, at this update.

        overlap: overlap of the new basis with the old one; None if there was no old one or it was not computed.
        """
        gap = state.get("gap", self.gap)
        if self.threshold is not None and overlap is not None:
            state["overlap"] = overlap
            gap = self._grow(state, gap, overlap)
        first = "next_refresh" not in state
        state["next_refresh"] = step + (self.offset if first else gap)
        state["refreshes"] = state.get("refreshes", 0) + 1

    def _grow(self, state: dict[str, Any], gap: int, overlap: float) -> int:
        assert self.threshold is not None
        overlaps = [*state.get("overlaps", []), overlap][-self.queue_size :]
        if len(overlaps) == self.queue_size and sum(overlaps) / self.queue_size >= self.threshold:
            gap, overlaps = min(round(gap * self.growth), self.gap * MAX_GROWTH), []
        state["gap"], state["overlaps"] = gap, overlaps
        return gap


def staggered_offset(index: int, *, count: int, gap: int) -> int:
    """The offset, 1..gap, of matrix `index` of `count`: evenly spread, the last one at the full gap."""
    return -(-gap * (index + 1) // count)
