"""Matrices, gradients that a subspace holds for the most part, and how far apart two results are."""

from collections.abc import Iterable

import torch

SHAPES = [(12, 20), (20, 12), (16, 16)]


def parameters(*, dtype=torch.float64, shapes=SHAPES) -> list[torch.nn.Parameter]:
    """One parameter a shape, from the global generator."""
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def gradients(steps: int, *, shapes=SHAPES) -> list[list[torch.Tensor]]:
    """A gradient a step and shape: a dominant part that turns slowly, and noise."""
    base = [torch.randn(m, 3, dtype=torch.float64) @ torch.randn(3, n, dtype=torch.float64) for m, n in shapes]
    turn = [torch.randn(m, n, dtype=torch.float64) for m, n in shapes]
    return [
        [b + 0.05 * t * step + 0.3 * torch.randn_like(b) for b, t in zip(base, turn, strict=True)]
        for step in range(steps)
    ]


def largest_difference(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    """Of any element, in float64."""
    return max((p.double() - q.double()).abs().max().item() for p, q in zip(one, other, strict=True))


def relative_error(values: torch.Tensor, exact: torch.Tensor) -> float:
    """In the Frobenius norm."""
    return ((values - exact).norm() / exact.norm()).item()
