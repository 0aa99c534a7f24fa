"""When a basis is computed anew."""

from dataclasses import dataclass
from typing import Any

MEMORY = 10  # updates that a first moment with beta1 = 0.9 remembers, 1 / (1 - beta1)


@dataclass(frozen=True)
class RefreshSchedule:
    """A refresh at the first update and then every `gap` updates, each matrix at its own time within the gap.

    gap: updates between refreshes.  offset: updates from the first refresh to the second, 1 to gap; spread over the
    matrices so that no single update refreshes them all. What is remembered, two integers, lives in the optimizer's
    state of the parameter: `refreshes` so far and the update at which the next one is due, `next_refresh`.
    """

    gap: int
    offset: int

    @property
    def share(self) -> float:
        """How far a refresh turns the basis towards the new gradient's subspace: all the way from a gap of 10 on.

        One gradient is mostly noise, and so is its subspace. The first moment remembers about 10 updates; where the
        subspace turns faster than that, nothing is ever averaged (docs/notebook.md, "Short gaps").
        """
        return min(1.0, self.gap / MEMORY)

    def __post_init__(self) -> None:
        if not 1 <= self.offset <= self.gap:
            raise ValueError(f"the offset of a refresh must lie in 1..{self.gap} (the gap), not {self.offset}")

    def due(self, state: dict[str, Any], *, step: int) -> bool:
        """Whether the basis must be computed from this update's gradient. step: 1-based."""
        return step >= state.get("next_refresh", 1)

    def record(self, state: dict[str, Any], *, step: int) -> None:
        """Notes that the basis was refreshed (or that it was tried) at this update."""
        first = "next_refresh" not in state
        state["next_refresh"] = step + (self.offset if first else self.gap)
        state["refreshes"] = state.get("refreshes", 0) + 1


def staggered_offset(index: int, *, count: int, gap: int) -> int:
    """The offset, 1..gap, of matrix `index` of `count`: evenly spread, the last one at the full gap."""
    return -(-gap * (index + 1) // count)
