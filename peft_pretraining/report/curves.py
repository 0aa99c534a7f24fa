"""Pictures of what a run does as it goes on: lines against updates, tokens or time, one line or band a group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from peft_pretraining.report.drawing import (
    MARKERS,
    NUMBERS,
    VARIABLES,
    Picture,
    colour,
    dashes,
    drawing,
    whole_numbers,
)
from peft_pretraining.report.groups import Group
from peft_pretraining.report.series import Band, axis_values, band_of, envelope, thin, visible, window_of

POINTS = 1500  # of a line, at most; lines of several groups share three times as many
AXES = {"update": "updates", "tokens_seen": "tokens", "seconds": "training time"}
INCIDENT_MARKS = {"bad update": "x", "bad documents": "d", "rollback": "v", "resume": "|"}


@dataclass(frozen=True)
class Curve:
    """A figure that is drawn against an axis.

    key: its name among the updates, or with `evals` among the evaluations.
    raw: whether to average over updates, with each one drawn faintly behind the line where one run is shown.
    fitted: whether the vertical axis leaves out the height that the figure falls from in the first tenth.
    """

    key: str
    title: str
    label: str
    evals: bool = False
    raw: bool = True
    fitted: bool = False
    from_zero: bool = False


LOSS = Curve("loss", "Training loss", "loss, nats a token", fitted=True)
PERPLEXITY = Curve("perplexity", "Validation perplexity", "validation perplexity", evals=True, fitted=True)
SCORE = Curve("score", "Score", "score on the first split", evals=True)
LEARNING_RATE = Curve("lr", "Learning rate", "learning rate", raw=False, from_zero=True)
GRAD_NORM = Curve("grad_norm", "Gradient norm", "gradient norm")
SPEED = Curve("tokens_per_second", "Tokens a second", "tokens a second", from_zero=True)


def draw_curve(curve: Curve, groups: Sequence[Group], *, axis: str = "update") -> Picture | None:
    """The picture of a curve; None if no run has such a figure."""
    window = 1 if curve.evals or not curve.raw else window_of([run for group in groups for run in group.runs])
    bands = [(group, band_of(group.runs, curve.key, axis=axis, evals=curve.evals, window=window)) for group in groups]
    drawn = [(group, band) for group, band in bands if band is not None]
    if not drawn:
        return None
    single = len(groups) == 1 and len(groups[0].runs) == 1
    picture = Picture(f"{curve.key}-{axis}", title=f"{curve.title} against {AXES[axis]}")
    unit, shown = _unit(axis, [band for _, band in drawn])
    points = min(POINTS, 3 * POINTS // len(drawn))
    with drawing():
        if single and window > 1:
            _draw_raw(picture, groups[0], curve, axis=axis, unit=unit)
        for group, band in drawn:
            _draw_band(picture, group, band, unit=unit, points=points, marked=curve.evals)
        _fit(picture, curve, groups, [band for _, band in drawn])
        if single and curve.key == "loss":
            _mark_incidents(picture, groups[0], axis=axis, unit=unit)
        picture.axes.set_xlabel(shown)
        picture.axes.set_ylabel(curve.label)
        picture.axes.yaxis.set_label_coords(-0.16, 0.5)  # the same place in every picture, clear of the numbers
        whole_numbers(picture.axes)
        picture.axes.set_xlim(0, 1.02 * (max(float(band.x[-1]) for _, band in drawn) / unit or 1.0))
    return picture


def _draw_raw(picture: Picture, group: Group, curve: Curve, *, axis: str, unit: float) -> None:
    run = group.runs[0]
    x, y = axis_values(run, axis, run.updates["update"]) / unit, run.updates[curve.key]
    if len(y) <= POINTS:
        picture.axes.plot(x, y, color=colour(group.number), alpha=0.4, linewidth=0.7)
        return
    first, low, high = envelope(y, stretches=POINTS // 4)
    picture.axes.fill_between(x[first], low, high, step="post", color=colour(group.number), alpha=0.3, linewidth=0)


def _draw_band(picture: Picture, group: Group, band: Band, *, unit: float, points: int, marked: bool) -> None:
    kept = thin(band.mean, points=points)
    x, c = band.x[kept] / unit, colour(group.number)
    marks: dict[str, Any] = {"marker": MARKERS[group.number % len(MARKERS)], "markersize": 4} if marked else {}
    if marked and len(kept) > 25:
        marks["markevery"] = len(kept) // 20
    if len(kept) == 1:
        marks |= {"marker": MARKERS[group.number % len(MARKERS)]}
    if len(group.runs) > 1:
        picture.axes.fill_between(x, band.low[kept], band.high[kept], color=c, alpha=0.22, linewidth=0)
    picture.axes.plot(x, band.mean[kept], color=c, linestyle=dashes(group.number), **marks)


def _fit(picture: Picture, curve: Curve, groups: Sequence[Group], bands: Sequence[Band]) -> None:
    """The range and the scale of the vertical axis."""
    axes = picture.axes
    lines = [line for band in bands for line in (band.low, band.high)]
    if len(groups) == 1 and len(groups[0].runs) == 1 and not curve.evals:
        lines.append(groups[0].runs[0].updates[curve.key])
    seen = visible(lines, skip=0.1 if curve.fitted else 0.0, outliers=0.0 if curve is GRAD_NORM else 0.002)
    if seen is None:
        return
    low, high = seen
    least = min(float(np.nanmin(line)) for line in lines if np.isfinite(line).any())
    if curve.from_zero:
        axes.set_ylim(0, high)
    elif least > 0 and high / least > (8 if curve.evals else 20):
        axes.set_yscale("log")
        axes.set_ylim(least / 1.1, high * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / least < 200 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(NUMBERS)


def _mark_incidents(picture: Picture, group: Group, *, axis: str, unit: float) -> None:
    """A mark at the upper edge for each bad update, rollback and resume."""
    run = group.runs[0]
    for kind, mark in INCIDENT_MARKS.items():
        updates = np.array([incident.update for incident in run.incidents if incident.kind == kind][:500], dtype=float)
        if len(updates):
            picture.axes.plot(
                axis_values(run, axis, updates) / unit,
                np.full(len(updates), 1.04),
                linestyle="",
                marker=mark,
                markersize=7,
                markerfacecolor="none",
                color=VARIABLES["ink"],
                transform=picture.axes.get_xaxis_transform(),
                clip_on=False,
            )


def _unit(axis: str, bands: Sequence[Band]) -> tuple[float, str]:
    """What numbers on an axis are divided by, and its label."""
    if axis != "seconds":
        return 1.0, AXES[axis]
    longest = max((float(band.x[-1]) for band in bands), default=0.0)
    for size, name in ((2 * 86400, "days"), (2 * 3600, "hours"), (2 * 60, "minutes")):
        if longest > size:
            return size / 2, f"{AXES[axis]}, {name}"
    return 1.0, f"{AXES[axis]}, seconds"
