"""Who may watch a parameter's subspace at work: told of refreshes and projections, without a part in either."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from qgalore.storage.stored import Stored
from qgalore.subspace.projector import Projector


class Observer:
    """Notes the seconds that refreshes take, as the host sees them, and nothing else.

    No part of the optimizer's state: after a resume the seconds begin at 0.
    """

    def __init__(self) -> None:
        self.refresh_seconds = 0.0

    @contextmanager
    def refreshing(self, projector: Projector, state: Mapping[str, Any]) -> Iterator[None]:
        """Around a refresh of the bases in a parameter's state."""
        began = time.perf_counter()
        yield
        self.refresh_seconds += time.perf_counter() - began

    def projecting(self, G: Tensor, *, step: int) -> AbstractContextManager:
        """Around a projection of G (m, n), a gradient or a micro-batch's. step: 1-based update."""
        return nullcontext()

    def projected(self, G: Tensor, R: Tensor, bases: Mapping[str, Stored], *, projector: Projector) -> None:
        """After a projection of G (m, n) to R = P^T G Q."""

    def lifting(self) -> AbstractContextManager | None:
        """To be put around the way back, in eager code; None where nobody wants to know."""
        return None

    def figures(self, state: Mapping[str, Any], *, projector: Projector) -> dict[str, Any] | None:
        """What was measured in the last update, to be read once; None where nothing was."""
        return None
