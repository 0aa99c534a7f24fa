"""What a subspace is worth: how much of a gradient it misses, how far it has turned, what it costs.

In each update one matrix is measured, all of them in turn: the cost is the same small share of every update, whatever
the size of the model, and which matrix comes when follows from the count of updates alone, so a run that is repeated or
resumed measures the same. Only refreshes, which are rare, are always asked how far they have turned a basis.

Bases that are packed or that learn are not orthonormal. For whatever is used as P and Q, with R = P^T G Q,

    ||G - P R Q^T||^2 = ||G||^2 - <R, 2 R - (P^T P) R (Q^T Q)>

which takes matrices of R's size and smaller, nothing of G's.
"""

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qgalore.storage.stored import Stored
from qgalore.subspace.observer import Observer
from qgalore.subspace.projector import Projector


def reconstruction_error(G: Tensor, R: Tensor, *, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """||G - P R Q^T||_F / ||G||_F. () float64; NaN where G is zero or not finite.

    G: (m, n), any floating dtype.
    R: P^T G Q, float32 or wider.
    left, right: P^T P and Q^T Q, (r, r), R's dtype; None where that side is not projected.
    From float32 the square is right to 1e-6: so is the error itself where it is not small; one below 1e-3 means 0.
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
    tall is factorized. NaN where columns depend on each other.
    """
    between = new.mT @ old  # (r, r)
    for basis in (new, old):
        factor, failed = torch.linalg.cholesky_ex(basis.mT @ basis)
        between = torch.linalg.solve_triangular(factor, between, upper=False).mT
        between = torch.where(failed == 0, between, math.nan)
    return between.square().sum() / between.shape[0]


class Stopwatch:
    """Seconds spent in laps: on a CPU by its clock; a GPU stamps its own time, which nobody waits for but `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._laps = device, list[tuple[Any, Any]]()

    @contextmanager
    def lap(self) -> Iterator[None]:
        """What is done inside counts."""
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
        """Of all laps so far. Waits until the GPU has come that far."""
        if self._device.type != "cuda":
            return sum(end - began for began, end in self._laps)
        for _, end in self._laps:
            end.synchronize()
        return sum(began.elapsed_time(end) / 1000 for began, end in self._laps)


def measuring_period(count: int, *, gap: int) -> int:
    """Updates between two measurements of one of `count` matrices, one of which is measured in an update.

    Without a divisor in common with the gap between refreshes: else each basis would always be seen at the same age.
    """
    return next(period for period in itertools.count(count) if math.gcd(period, gap) == 1)


@dataclass
class Sample:
    """What was measured of a matrix in one update.

    step: the update.
    watch: the time that projecting took.
    projections: how many there were.
    figures: those of the first.
    before: the basis, if it is about to learn.
    """

    step: int
    watch: Stopwatch
    projections: int = 0
    figures: dict[str, Tensor] = field(default_factory=dict)
    before: Tensor | None = None


class Probe(Observer):
    """Measures the subspace of one matrix at the updates turn + 1, turn + 1 + period and so on."""

    def __init__(self, *, turn: int, period: int) -> None:
        super().__init__()
        self.turn, self.period = turn, period
        self._sample: Sample | None = None  # of this update, if it is the matrix' turn, until it is read
        self._overlap: Tensor | None = None  # of the last two bases,
        self._refreshes = 0  # the count of refreshes at that time: a resume or a rollback may have undone them

    @contextmanager
    def refreshing(self, projector: Projector, state: Mapping[str, Any]) -> Iterator[None]:
        """Notes the overlap of the new bases with the old ones, multiplied over the sides."""
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
        """In the matrix' turn, takes the time of all projections of the update."""
        if (step - 1) % self.period != self.turn:
            self._sample = None
            yield
            return
        if self._sample is None or self._sample.step != step:
            self._sample = Sample(step, Stopwatch(G.device))
        with self._sample.watch.lap():
            yield

    def projected(self, G: Tensor, R: Tensor, bases: Mapping[str, Stored], *, projector: Projector) -> None:
        """In the matrix' turn, measures the first projection of the update."""
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

    def lifting(self) -> AbstractContextManager | None:
        """In the matrix' turn, takes the time of the way back, too."""
        return None if self._sample is None else self._sample.watch.lap()

    def figures(self, state: Mapping[str, Any], *, projector: Projector) -> dict[str, Any] | None:
        """What was measured in the last update, to be read once; None where it was not this matrix' turn.

        reconstruction_error, orthonormality_error: see above; the larger of the two sides'.
        overlap: of the last two bases; None where it is not known. Of a basis that learns: before and after the update.
        projection_seconds: into the subspace and back.
        projections: in this update. More than one are of micro-batches, and the reconstruction is that of the first.
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
    """The bases by side, as they are used: in the parameter's dtype, then in float32 or wider."""
    return {side: basis.read(projector.dtype).to(projector.wide) for side, basis in bases.items()}


def observers(projectors: Mapping[Tensor, Projector], *, details: bool) -> dict[Tensor, Observer]:
    """One observer a parameter. details: whether those that are projected are measured, in turn."""
    turns = [p for p, projector in projectors.items() if projector.sides] if details else []
    found: dict[Tensor, Observer] = {p: Observer() for p in projectors}
    for turn, p in enumerate(turns):
        found[p] = Probe(turn=turn, period=measuring_period(len(turns), gap=projectors[p].schedule.gap))
    return found
