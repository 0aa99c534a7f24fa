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
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qgalore.subspace.projector import Projector, Refresh, has_basis


def reconstruction_error(G: Tensor, R: Tensor, *, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """||G - P R Q^T||_F / ||G||_F. () float64; NaN where G is zero or not finite.

    G: (m, n), any floating dtype.  R: P^T G Q, float32 or wider.  left, right: P^T P and Q^T Q, (r, r), R's dtype; None
    where that side is not projected.  From float32 the square is right to 1e-6: so is the error itself where it is not
    small, and one below 1e-3 means 0.
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
    """What was measured of a matrix in one update: the update's step, the time that projecting took, the projections
    in it, the figures of the first, and the basis, if it is about to learn."""

    step: int
    watch: Stopwatch
    projections: int = 0
    figures: dict[str, Tensor] = field(default_factory=dict)
    before: Tensor | None = None


@dataclass
class Notes:
    """overlap: of the last two bases, as of so many `refreshes`: a resume or a rollback may have undone them.  sample:
    of this update, if it is the matrix' turn, until it is read."""

    overlap: Tensor | None = None
    refreshes: int = 0
    sample: Sample | None = None


@dataclass(frozen=True)
class MeasuredProjector(Projector):
    """A projector with the same results that measures itself at the updates turn + 1, turn + 1 + period and so on.

    notes: no part of the optimizer's state; after a resume the overlap is unknown until the next refresh.
    """

    turn: int = 0
    period: int = 1
    notes: Notes = field(default_factory=Notes, compare=False)

    def prepare(self, G: Tensor, state: dict[str, Any], *, step: int) -> Refresh | None:
        """Projector.prepare; notes the overlap, multiplied over the sides."""
        if not self.due(state, step=step):
            return None
        old = self._read(state, like=G)
        refresh = super().prepare(G, state, step=step)
        if refresh is not None:
            new = self._read(state, like=G)
            self.notes.overlap = torch.stack([overlap(new[side], old[side]) for side in self.sides]).prod()
        self.notes.refreshes = state["refreshes"]
        return refresh

    def project(self, G: Tensor, state: dict[str, Any]) -> Tensor:
        """Projector.project; in its turn, measures the update's first projection, and the time of them all."""
        step, notes = state.get("step", 0) + 1, self.notes
        if (step - 1) % self.period != self.turn:
            notes.sample = None
            return super().project(G, state)
        if notes.sample is None or notes.sample.step != step:
            notes.sample = Sample(step, Stopwatch(G.device))
        with notes.sample.watch.lap():
            R = super().project(G, state)
        if not notes.sample.projections:
            self._measure(G, R, state, notes.sample)
        notes.sample.projections += 1
        return R

    def back(self, D: Tensor, state: dict[str, Any], *, like: Tensor) -> Tensor:
        """Projector.back; timed in its turn. Compiled code has no clock: there its time goes uncounted."""
        if torch.compiler.is_compiling() or self.notes.sample is None:
            return super().back(D, state, like=like)
        with self.notes.sample.watch.lap():
            return super().back(D, state, like=like)

    def figures(self, state: dict[str, Any], *, like: Tensor) -> dict[str, Any] | None:
        """What was measured in the last update, to be read once; None where it was not this matrix' turn.

        `reconstruction_error` and `orthonormality_error` (the larger of the two sides'), see above; `overlap` of the
        last two bases (None: not known), of one that learns before and after this update;
        `projection_seconds`, there and back; `projections` in this update: more than one are of micro-batches, and the
        reconstruction is that of the first.  like: the weight.  Waits for the device.
        """
        sample, self.notes.sample = self.notes.sample, None
        if sample is None:
            return None
        turned = self.notes.overlap if self.notes.refreshes == state.get("refreshes") else None
        if sample.before is not None:
            (after,) = self._read(state, like=like).values()
            turned = overlap(after, sample.before)
        return {
            **{name: float(figure) for name, figure in sample.figures.items()},
            "overlap": None if turned is None else float(turned),
            "projection_seconds": sample.watch.seconds(),
            "projections": sample.projections,
        }

    def _measure(self, G: Tensor, R: Tensor, state: dict[str, Any], sample: Sample) -> None:
        bases = self._read(state, like=G)
        grams = {side: P.mT @ P for side, P in bases.items()}  # (r, r)
        errors = [orthonormality_error(gram) for gram in grams.values()]
        sample.figures["reconstruction_error"] = reconstruction_error(G, R, **grams)
        sample.figures["orthonormality_error"] = torch.stack(errors).max()
        if self.learner is not None and sample.step > 1:  # the first basis does not learn yet
            (P,) = bases.values()
            sample.before = P.clone()

    def _read(self, state: dict[str, Any], *, like: Tensor) -> dict[str, Tensor]:
        """The bases there are, by side, as they are used, in float32 or wider."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return {side: self._basis(like, state, side).to(wide) for side in self.sides if has_basis(state, side)}


def measured(projectors: Mapping[Tensor, Projector]) -> dict[Tensor, Projector]:
    """The same projectors by parameter, those that do project measured in turn."""
    found = dict(projectors)
    turns = [p for p, projector in projectors.items() if projector.sides]
    for turn, p in enumerate(turns):
        period = measuring_period(len(turns), gap=projectors[p].schedule.gap)
        found[p] = MeasuredProjector(**vars(projectors[p]), turn=turn, period=period)
    return found
