"""Observers of a parameter's subspace: they are called around refreshes and projections, and change nothing."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from qgalore.storage.stored import Stored
from qgalore.subspace.projector import Projector


class Observer:
    """Sums the seconds that refreshes take, as the host sees them.

    They are not part of the optimizer's state: after a resume they begin at 0.
    """

    def __init__(self) -> None:
        self.refresh_seconds = 0.0
        self.refreshed: Callable[[], None] | None = None  # is called after each refresh

    @contextmanager
    def refreshing(self, projector: Projector, state: Mapping[str, Any]) -> Iterator[None]:
        """A context around a refresh of the bases in a parameter's state."""
        began = time.perf_counter()
        yield
        self.refresh_seconds += time.perf_counter() - began
        if self.refreshed is not None:
            self.refreshed()

    def projecting(self, G: Tensor, *, step: int) -> AbstractContextManager:
        """A context around a projection of G (m, n). step: number of the update, from 1."""
        return nullcontext()

    def projected(self, G: Tensor, R: Tensor, bases: Mapping[str, Stored], *, projector: Projector) -> None:
        """Called after a projection of G (m, n) to R = P^T G Q."""

    def lifting(self) -> AbstractContextManager:
        """A context around the lift, or a part of it, in eager code."""
        return nullcontext()

    def figures(self, state: Mapping[str, Any], *, projector: Projector) -> dict[str, Any] | None:
        """The figures measured in the last update, which can be read once; None if there are none."""
        return None
