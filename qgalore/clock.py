"""The numbers in a parameter's state that count its updates, and how they are taken back."""

from collections.abc import Callable
from typing import Any

from qgalore.subspace import schedule


class Clock:
    """Counts the updates of a parameter, or of a basis that learns, in the state of the parameter.

        step            updates so far
        mass, mass_sq   the sums of the weights that first and second moments hold: 1 - beta**t after update t, unless a
                        reset has taken them away. Dividing by them is Adam's bias correction.

    and guards those of the schedule of refreshes (schedule.KEYS). All of them can be taken back: an update whose
    gradient was not finite has not happened. prefix: before the names, of a basis its side.
    """

    def __init__(self, prefix: str = "") -> None:
        self._step, self._mass, self._mass_sq = (prefix + name for name in ("step", "mass", "mass_sq"))
        self._keys = (self._step, self._mass, self._mass_sq, *(() if prefix else schedule.KEYS))
        self._before: dict[str, Any] | None = None

    def steps(self, state: dict[str, Any]) -> int:
        """Updates so far."""
        return state.get(self._step, 0)

    def masses(self, state: dict[str, Any]) -> tuple[float, float]:
        """mass and mass_sq."""
        return state[self._mass], state[self._mass_sq]

    def counts_moments(self, state: dict[str, Any]) -> bool:
        """Whether there are moments to be counted, from the first update on."""
        return self._mass in state

    def begin(self, state: dict[str, Any]) -> None:
        """Remembers the numbers as they are before an update. Once an update; asked again, it does nothing."""
        if self._before is None or self._before.get(self._step) != state.get(self._step):
            self._before = {key: state[key] for key in self._keys if key in state}

    def tick(
        self, state: dict[str, Any], *, betas: tuple[float, float], decay: Callable[[int], float] | None = None
    ) -> None:
        """Counts one more update.

        betas: decay rates of the moments.
        decay: gives the second moment's decay rate at update t, where it changes.
        """
        step = state[self._step] = self.steps(state) + 1
        beta1, beta2 = betas[0], decay(step) if decay else betas[1]
        state[self._mass] = beta1 * state.get(self._mass, 0.0) + 1 - beta1
        state[self._mass_sq] = beta2 * state.get(self._mass_sq, 0.0) + 1 - beta2

    def reset_mass(self, state: dict[str, Any]) -> None:
        """The moments are zero again."""
        state[self._mass] = state[self._mass_sq] = 0.0

    def undo(self, state: dict[str, Any]) -> None:
        """Puts the numbers back to where they were when this update began."""
        if self._before is None:
            return
        for key in self._keys:
            state.pop(key, None)
        state.update(self._before)

    def end(self) -> None:
        """The update is over: what it began from is forgotten."""
        self._before = None
