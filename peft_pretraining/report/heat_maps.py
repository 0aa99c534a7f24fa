"""Heat maps of the bases: how often each matrix was refreshed, and how far its subspace turned, over the run."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from peft_pretraining.report.drawing import WIDTH, Picture, drawing, whole_numbers
from peft_pretraining.report.records import RunRecord

COLUMNS = 300  # of a heat map, at most
COLOURS = "viridis"  # can be told apart by colour-blind eyes, and gets lighter in black and white, too
BINS = 60  # columns of figures that were measured of one matrix at a time


class Grid(NamedTuple):
    """A figure of every matrix in every stretch of the run."""

    names: list[str]  # of the matrices, in the order of the rows
    edges: np.ndarray  # (n + 1,) updates; a stretch lies between two of them
    values: np.ndarray  # (matrices, n); NaN where there is none


def draw_refreshes(run: RunRecord, *, name: str) -> Picture | None:
    """Refreshes per 100 updates between one evaluation and the next; None if nothing was projected."""
    grid = refresh_rates(run)
    return grid and _draw(grid, name=name, title="Refreshes per 100 updates", most=None)


def draw_overlaps(run: RunRecord, *, name: str) -> Picture | None:
    """Overlap of the last two bases, from 0 to 1; None if no overlap was measured."""
    grid = _of_details(run) or _of_evaluations(run, "overlap")
    return grid and _draw(grid, name=name, title="Overlap of the last two bases", most=1.0)


def refresh_rates(run: RunRecord) -> Grid | None:
    """Refreshes per 100 updates; None if the record has none."""
    grid = _of_evaluations(run, "refreshes")
    if grid is None:
        return None
    before = np.concatenate([np.zeros((len(grid.names), 1)), grid.values[:, :-1]], axis=1)
    return grid._replace(values=100 * (grid.values - before) / np.diff(grid.edges))


def _of_evaluations(run: RunRecord, key: str) -> Grid | None:
    """A figure of the subspaces events: a column lies between two evaluations and has the value of the later one."""
    names = _in_order({str(each.get("name")) for matrices in run.subspaces.values() for each in matrices})
    if not names:
        return None
    rows, updates = {name: row for row, name in enumerate(names)}, list(run.subspaces)
    values = np.full((len(names), len(updates)), np.nan)
    for column, matrices in enumerate(run.subspaces.values()):
        for each in matrices:
            value = each.get(key)
            if isinstance(value, (int, float)):
                values[rows[str(each.get("name"))], column] = value
    return Grid(names, np.array([0.0, *updates]), values) if updates[0] > 0 and np.isfinite(values).any() else None


def _of_details(run: RunRecord) -> Grid | None:
    """The overlaps of subspace_details events, the mean of each matrix over a sixtieth of the run."""
    found = [(update, each) for update, each in run.details.items() if isinstance(each.get("overlap"), (int, float))]
    if not found:
        return None
    names = _in_order({str(each.get("name")) for _, each in found})
    rows, bins = {name: row for row, name in enumerate(names)}, max(1, min(BINS, len(found) // len(names)))
    edges = np.linspace(0, max(run.details), bins + 1)
    sums, counts = np.zeros((len(names), bins)), np.zeros((len(names), bins))
    for update, each in found:
        place = rows[str(each.get("name"))], min(bins - 1, int(np.searchsorted(edges, update, side="left")) - 1)
        sums[place] += each["overlap"]
        counts[place] += 1
    return Grid(names, edges, np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))


def _parts(name: str) -> tuple[str, int]:
    """The kind of a matrix and its layer: ("q_proj", 3) of model.layers.3.self_attn.q_proj.weight."""
    found = re.fullmatch(r"(?:.*?\.)??(\d+)\.(?:.+\.)?(\w+)", name.removesuffix(".weight"))
    return (found[2], int(found[1])) if found else (name, 0)


def _in_order(names: set[str]) -> list[str]:
    """Kind by kind, layer by layer; kinds in the order in which a layer uses them."""
    known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    place: Callable[[str], Any] = lambda kind: (known.index(kind) if kind in known else len(known), kind)  # noqa: E731
    return sorted(names, key=lambda name: (place(_parts(name)[0]), _parts(name)[1], name))


def _draw(grid: Grid, *, name: str, title: str, most: float | None) -> Picture:
    """One row of pixels a matrix; columns as wide as their stretch of the run."""
    names, edges, values = grid
    height = 1.5 + min(3.6, max(1.4, 0.017 * len(names)))
    picture = Picture(name, title=title, height=height, margins=(0.95, 0.85, 0.52, 0.12))
    columns = min(COLUMNS, max(len(edges) - 1, 1) * 20)
    centres = edges[0] + (np.arange(columns) + 0.5) / columns * (edges[-1] - edges[0])
    pixels = values[:, np.searchsorted(edges, centres) - 1]
    with drawing():
        axes = picture.axes
        extent = (float(edges[0]), float(edges[-1]), float(len(names)), 0.0)
        highest = most if most is not None else max(float(np.nanmax(pixels)), 1e-9)
        image = axes.imshow(
            pixels, aspect="auto", interpolation="none", cmap=COLOURS, vmin=0, vmax=highest, extent=extent
        )
        axes.grid(False)
        axes.set_xlabel("updates")
        whole_numbers(axes)
        _label_rows(picture, names)
        bar = picture.figure.add_axes((1 - 0.7 / WIDTH, 0.52 / height, 0.14 / WIDTH, 1 - 0.64 / height))
        scale = picture.figure.colorbar(image, cax=bar)
        scale.outline.set_visible(False)  # type: ignore[operator]
        bar.grid(False)
    return picture


def _label_rows(picture: Picture, names: list[str]) -> None:
    """The name of each kind beside its rows, and a line between two kinds."""
    kinds = [_parts(name)[0] for name in names]
    begins = [row for row in range(len(kinds)) if row == 0 or kinds[row] != kinds[row - 1]]
    step = max(1, len(begins) // 16)
    ends = [*begins[1:], len(kinds)]
    centres = [(first + last) / 2 for first, last in zip(begins, ends, strict=True)]
    labels = [kinds[first][-14:] for first in begins]
    picture.axes.set_yticks(centres[::step], labels[::step])
    picture.axes.tick_params(axis="y", length=0)
    if len(begins) <= 16:
        for row in begins[1:]:
            picture.axes.axhline(row, color="white", linewidth=0.8)
