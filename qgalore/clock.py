"""The counts of a parameter's updates in its state."""

from collections.abc import Callable
from typing import Any

from qgalore.subspace import schedule


class Clock:
    """Counts the updates of a parameter, or of a basis that learns, in the state of the parameter.

        step            number of updates so far
        mass, mass_sq   the sums of the weights that first and second moments hold: 1 - beta**t after update t if there
                        was no reset. Dividing by them is Adam's bias correction.

    It can undo them, and the counts of the schedule of refreshes (schedule.KEYS): an update whose gradient was not
    finite does not count.
    """

    def __init__(self, prefix: str = "") -> None:
        """prefix: comes before the names; the side of a basis."""
        self._step, self._mass, self._mass_sq = (prefix + name for name in ("step", "mass", "mass_sq"))
        self._keys = (self._step, self._mass, self._mass_sq, *(() if prefix else schedule.KEYS))
        self._before: dict[str, Any] | None = None

    def steps(self, state: dict[str, Any]) -> int:
        return state.get(self._step, 0)

    def masses(self, state: dict[str, Any]) -> tuple[float, float]:
        return state[self._mass], state[self._mass_sq]

    def counts_moments(self, state: dict[str, Any]) -> bool:
        """Whether there are moments: from the first update on."""
        return self._mass in state

    def begin(self, state: dict[str, Any]) -> None:
        """Remembers the counts as they are before an update. Another call within the update does nothing."""
        if self._before is None or self._before.get(self._step) != state.get(self._step):
            self._before = {key: state[key] for key in self._keys if key in state}

    def tick(
        self, state: dict[str, Any], *, betas: tuple[float, float], decay: Callable[[int], float] | None = None
    ) -> None:
        """Counts one more update.

        betas: decay rates of the moments.
        decay: the second moment's decay rate as a function of the update, for a rule that changes it.
        """
        step = state[self._step] = self.steps(state) + 1
        beta1, beta2 = betas[0], decay(step) if decay else betas[1]
        state[self._mass] = beta1 * state.get(self._mass, 0.0) + 1 - beta1
        state[self._mass_sq] = beta2 * state.get(self._mass_sq, 0.0) + 1 - beta2

    def reset_mass(self, state: dict[str, Any]) -> None:
        state[self._mass] = state[self._mass_sq] = 0.0

    def undo(self, state: dict[str, Any]) -> None:
        """Puts the counts back to where they were before this update."""
        if self._before is None:
            return
        for key in self._keys:
            state.pop(key, None)
        state.update(self._before)

    def end(self) -> None:
        """Ends the update, which can then not be undone."""
        self._before = None
