"""Updates of which the last has a gradient that is not finite."""

from typing import Any

import torch

from qgalore.optimizer import LowRankOptimizer
from qgalore.outcome import Outcome


def end_badly(
    optimizer: LowRankOptimizer, p: torch.nn.Parameter, *, updates: int, bad: float
) -> tuple[dict[str, torch.Tensor], Outcome]:
    """So many updates with random gradients, the last one with a bad element.

    Returns the state of p before the last one, and its outcome.
    """
    for update in range(updates):
        p.grad = torch.randn(p.shape)
        if update == updates - 1:
            before = as_tensors(optimizer.state[p])
            p.grad[3, 4] = bad
        optimizer.step()
        outcome = optimizer.end_update()
    return before, outcome


def as_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of the tensors and numbers of a state."""
    return {key: torch.as_tensor(value).clone() for key, value in state.items()}
