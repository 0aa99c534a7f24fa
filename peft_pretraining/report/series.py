"""Series of numbers made fit for a picture: thinned, smoothed, averaged over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from peft_pretraining.report.records import RunRecord


class Band(NamedTuple):
    """A figure of a group against an axis: the mean of its runs, and their smallest and largest. All (n,)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thin(y: np.ndarray, *, points: int) -> np.ndarray:
    """Indices of at most `points` elements of y that look like all of them: minimum and maximum of each stretch.

    y: (n,); NaN is passed over, except in a stretch that has nothing else, so that a gap stays a gap.
    """
    if len(y) <= points:
        return np.arange(len(y))
    kept = [0, len(y) - 1]
    for stretch in np.array_split(np.arange(len(y)), max(1, points // 2 - 1)):
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite):
            kept += [finite[np.argmin(y[finite])], finite[np.argmax(y[finite])]]
        else:
            kept.append(stretch[0])
    return np.unique(kept)


def envelope(y: np.ndarray, *, stretches: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The index of the first element of each stretch of y, its minimum and its maximum. NaN where it has only NaN."""
    first = np.unique(np.linspace(0, len(y), stretches, endpoint=False).astype(int))
    low = np.fmin.reduceat(y, first)
    high = np.fmax.reduceat(y, first)
    return first, low, high


def smooth(y: np.ndarray, *, window: int) -> np.ndarray:
    """(n,) weighted mean of the `window` elements around each one, the nearest weigh most; NaN is passed over."""
    return _means(_means(y, window=window // 2 + 1), window=window // 2 + 1) if window > 1 and len(y) else y


def _means(y: np.ndarray, *, window: int) -> np.ndarray:
    """(n,) mean of the `window` (or one more) elements around each one, of fewer at the ends."""
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre = np.arange(len(y))
    first = (centre - window // 2).clip(min=0)
    last = (centre + window // 2 + 1).clip(max=len(y))
    count = counts[last] - counts[first]
    return np.divide(sums[last] - sums[first], count, out=np.full(len(y), np.nan), where=count > 0)


def axis_values(run: RunRecord, axis: str, updates: np.ndarray) -> np.ndarray:
    """Where updates lie on an axis: "update", "tokens_seen" or "seconds". An evaluation lies at its update."""
    if axis == "update" or not len(run.updates["update"]):
        return updates
    known = np.isfinite(run.updates[axis])
    return np.interp(updates, run.updates["update"][known], run.updates[axis][known]) if known.any() else updates


def band_of(runs: Sequence[RunRecord], key: str, *, axis: str, evals: bool = False, window: int = 1) -> Band | None:
    """A figure of the updates, or of the evaluations, that all runs have come to; None if there are none.

    Runs without any are left out, so that a seed that has just begun does not hide the others.
    """
    tables = [(run, run.evals if evals else run.updates) for run in runs]
    tables = [(run, table) for run, table in tables if np.isfinite(table[key]).any()]
    if not tables:
        return None
    common = tables[0][1]["update"]
    for _, table in tables[1:]:
        common = np.intersect1d(common, table["update"])
    if not len(common):
        return None
    values = np.stack([smooth(table[key], window=window)[np.isin(table["update"], common)] for _, table in tables])
    x = np.mean([axis_values(run, axis, common) for run, _ in tables], axis=0)
    return Band(x, values.mean(0), values.min(0), values.max(0))


def window_of(runs: Sequence[RunRecord]) -> int:
    """Over how many updates lines are averaged: a fortieth of the longest run, an odd number."""
    return max((len(run.updates["update"]) for run in runs), default=0) // 80 * 2 + 1


def visible(lines: Sequence[np.ndarray], *, skip: float, outliers: float) -> tuple[float, float] | None:
    """The range of values worth seeing, a little more than they need; None if there is nothing finite.

    skip: share of the longest line that does not count at the beginning of each, where a loss falls from its height;
        of a short line, at most half.
    outliers: share of the values, the largest ones, that does not count.
    """
    skipped = int(skip * max(map(len, lines), default=0))
    shown = [line[min(skipped, len(line) // 2) :] for line in lines]
    values = np.concatenate([line[np.isfinite(line)] for line in shown]) if shown else np.array([])
    if not len(values):
        return None
    low, high = float(values.min()), float(np.quantile(values, 1 - outliers))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
