"""Figures of a subspace: how much of a gradient it misses, how far it has turned, and what it costs.

One matrix is measured in each update, all of them in turn. So the cost is the same small share of every update, for
every size of model; and the count of updates alone decides which matrix is measured, so a run that is repeated or
resumed measures the same. Refreshes are rare: the overlap of the bases is measured at each of them.

Bases that are packed or that learn are not orthonormal. For any P and Q, with R = P^T G Q,

    ||G - P R Q^T||^2 = ||G||^2 - <R, 2 R - (P^T P) R (Q^T Q)>

which needs no matrix of G's size.
"""

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qgalore.storage.stored import Stored
from qgalore.subspace.observer import Observer
from qgalore.subspace.projector import Projector


def reconstruction_error(G: Tensor, R: Tensor, *, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """||G - P R Q^T||_F / ||G||_F, () float64. NaN if G is zero or not finite.

    G: (m, n), any floating dtype.
    R: P^T G Q, float32 or wider.
    left, right: P^T P and Q^T Q, (r, r), R's dtype; None for a side that is not projected.
    In float32 the square is right to 1e-6, so an error below 1e-3 means 0.
    """
    rows = torch.linalg.vector_norm(G, dim=1, dtype=R.dtype)  # a float32 sum over the whole of G would lose digits
    norm = torch.linalg.vector_norm(rows, dtype=torch.float64)
    R = R / norm.to(R.dtype)  # squares of a small gradient's elements would underflow
    seen = R if left is None else left @ R
    seen = seen if right is None else seen @ right
    kept = (R * (2 * R - seen)).sum(1).sum(dtype=torch.float64)
    return (1 - kept).clamp_min(0).sqrt()


def orthonormality_error(gram: Tensor) -> Tensor:
    """||P^T P - I||_F / sqrt(r). gram: P^T P, (r, r) -> ()"""
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.matrix_norm(gram - identity) / math.sqrt(gram.shape[0])


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """The mean squared cosine of the principal angles between two spans, 0 to 1. (m, r) each -> ()

    ||new^T old||_F^2 / r of columns that are made orthonormal first, by Cholesky factors of the Gram matrices: nothing
    tall is factorized. NaN if columns depend on each other.
    """
    between = new.mT @ old  # (r, r)
    for basis in (new, old):
        factor, failed = torch.linalg.cholesky_ex(basis.mT @ basis)
        between = torch.linalg.solve_triangular(factor, between, upper=False).mT
        between = torch.where(failed == 0, between, math.nan)
    return between.square().sum() / between.shape[0]


class Stopwatch:
    """Sums the seconds of laps. On a GPU they are measured by events, so only `seconds` waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._laps = device, list[tuple[Any, Any]]()

    @contextmanager
    def lap(self) -> Iterator[None]:
        """A context whose duration counts."""
        began = self._now()
        yield
        self._laps.append((began, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self) -> float:
        """The duration of all laps so far. Waits for a GPU."""
        if self._device.type != "cuda":
            return sum(end - began for began, end in self._laps)
        for _, end in self._laps:
            end.synchronize()
        return sum(began.elapsed_time(end) / 1000 for began, end in self._laps)


def measuring_period(count: int, *, gap: int) -> int:
    """Updates between two measurements of the same one of `count` matrices.

    It has no divisor in common with the gap between refreshes, or each basis would always be measured at the same age.
    """
    return next(period for period in itertools.count(count) if math.gcd(period, gap) == 1)


@dataclass
class Sample:
    """The measurements of a matrix in one update."""

    step: int  # number of the update
    watch: Stopwatch  # time spent in projecting and lifting
    projections: int = 0  # number of projections
    figures: dict[str, Tensor] = field(default_factory=dict)  # figures of the first projection
    before: Tensor | None = None  # the basis before it learns, if it does


class Probe(Observer):
    """Measures the subspace of one matrix at the updates turn + 1, turn + 1 + period and so on."""

    def __init__(self, *, turn: int, period: int) -> None:
        super().__init__()
        self.turn, self.period = turn, period
        self._sample: Sample | None = None  # measurements of this update, if it is the matrix' turn
        self._overlap: Tensor | None = None  # overlap of the last two bases
        self._refreshes = 0  # refreshes at that time; a resume or a rollback may have undone them

    @contextmanager
    def refreshing(self, projector: Projector, state: Mapping[str, Any]) -> Iterator[None]:
        """Measures the overlap of the new bases with the old ones, multiplied over the sides."""
        old = projector.open(state)
        before = read_bases(old, projector)
        with super().refreshing(projector, state):
            yield
        new = projector.open(state)
        if any(new[side].parts[part] is not tensor for side in old for part, tensor in old[side].parts.items()):
            after = read_bases(new, projector)
            self._overlap = torch.stack([overlap(after[side], before[side]) for side in projector.sides]).prod()
        self._refreshes = state["refreshes"]

    @contextmanager
    def projecting(self, G: Tensor, *, step: int) -> Iterator[None]:
        """Measures the time of every projection in an update, if it is the matrix' turn."""
        if (step - 1) % self.period != self.turn:
            self._sample = None
            yield
            return
        if self._sample is None or self._sample.step != step:
            self._sample = Sample(step, Stopwatch(G.device))
        with self._sample.watch.lap():
            yield

    def projected(self, G: Tensor, R: Tensor, bases: Mapping[str, Stored], *, projector: Projector) -> None:
        """Measures the first projection of an update, if it is the matrix' turn."""
        sample = self._sample
        if sample is None:
            return
        if not sample.projections:
            self._measure(G.to(projector.dtype), R, read_bases(bases, projector), sample, learns=projector.learns)
        sample.projections += 1

    def _measure(self, G: Tensor, R: Tensor, bases: dict[str, Tensor], sample: Sample, *, learns: bool) -> None:
        grams = {side: P.mT @ P for side, P in bases.items()}  # (r, r)
        errors = [orthonormality_error(gram) for gram in grams.values()]
        sample.figures["reconstruction_error"] = reconstruction_error(G, R, **grams)
        sample.figures["orthonormality_error"] = torch.stack(errors).max()
        if learns and sample.step > 1:  # the first basis does not learn yet
            (P,) = bases.values()
            sample.before = P.clone()

    def lifting(self) -> AbstractContextManager:
        """Measures the time of the lift, if it is the matrix' turn."""
        return nullcontext() if self._sample is None else self._sample.watch.lap()

    def figures(self, state: Mapping[str, Any], *, projector: Projector) -> dict[str, Any] | None:
        """The figures of the last update, which can be read once; None if it was not the matrix' turn.

        reconstruction_error: see reconstruction_error.
        orthonormality_error: see orthonormality_error; the larger one of two sides.
        overlap: overlap of the last two bases, or of a learning basis before and after the update; None if unknown.
        projection_seconds: time spent in projecting and lifting.
        projections: number of projections; the other figures are those of the first one.
        Waits for the device.
        """
        sample, self._sample = self._sample, None
        if sample is None:
            return None
        turned = self._overlap if self._refreshes == state.get("refreshes") else None
        if sample.before is not None:
            (after,) = read_bases(projector.open(state), projector).values()
            turned = overlap(after, sample.before)
        return {
            **{name: float(figure) for name, figure in sample.figures.items()},
            "overlap": None if turned is None else float(turned),
            "projection_seconds": sample.watch.seconds(),
            "projections": sample.projections,
        }


def read_bases(bases: Mapping[str, Stored], projector: Projector) -> dict[str, Tensor]:
    """The values of the bases by side, as products use them, in float32 or wider."""
    return {side: basis.to(projector.wide) for side, basis in projector.read(bases).items()}


def observers(projectors: Mapping[Tensor, Projector], *, details: bool) -> dict[Tensor, Observer]:
    """An observer for each parameter. details: whether projected parameters are measured, in turn."""
    turns = [p for p, projector in projectors.items() if projector.sides] if details else []
    found: dict[Tensor, Observer] = {p: Observer() for p in projectors}
    for turn, p in enumerate(turns):
        found[p] = Probe(turn=turn, period=measuring_period(len(turns), gap=projectors[p].schedule.gap))
    return found
