"""The picture of memory: bytes by kind, and the plan's peak beside the peak that was measured."""

from collections.abc import Sequence
from typing import Any

from peft_pretraining.report.drawing import HEIGHT, Picture, colour, drawing
from peft_pretraining.report.groups import Group
from peft_pretraining.report.records import RunRecord

PLANNED_PEAK, MEASURED_PEAK = "peak, planned", "peak, measured"


def draw_memory(groups: Sequence[Group]) -> Picture | None:
    """A bar for each kind and group, that of a group's first run; None if no run has recorded any memory."""
    found = [(group, memory_of(group.runs[0])) for group in groups]
    kinds = list(dict.fromkeys(kind for _, memory in found for kind in memory))
    kinds = [kind for kind in kinds if "peak" not in kind] + [k for k in (PLANNED_PEAK, MEASURED_PEAK) if k in kinds]
    kinds = [kind for kind in kinds if any(memory.get(kind) for _, memory in found)]
    if not kinds:
        return None
    shown = [(group, memory) for group, memory in found if memory]
    most = max(value for _, memory in shown for value in memory.values())
    height = max(HEIGHT, 0.7 + len(kinds) * (0.16 + 0.15 * len(shown)))
    picture = Picture("memory", title="Memory by kind", height=height, margins=(1.3, 0.8, 0.12, 0.1))
    with drawing():
        axes, thick = picture.axes, 0.8 / len(shown)
        for place, (group, memory) in enumerate(shown):
            for row, kind in enumerate(kinds):
                if kind in memory:
                    y = row - 0.4 + (place + 0.5) * thick
                    edge = colour(group.number)
                    fill = "none" if kind == PLANNED_PEAK else edge
                    axes.barh(y, memory[kind], height=0.9 * thick, edgecolor=edge, linewidth=1, facecolor=fill)
                    axes.text(memory[kind] + 0.01 * most, y, size_of(memory[kind]), va="center", fontsize=9.5)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_xlim(0, 1.02 * most)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
    return picture


def memory_of(run: RunRecord) -> dict[str, float]:
    """Bytes by kind: those of the plan at its peak, with both peaks, else those kept between updates."""
    planned = fullest_plan(run)
    by_kind = planned["planned"] if planned else (run.end or {}).get("kept_bytes")
    memory = {kind: float(size) for kind, size in (by_kind or {}).items() if isinstance(size, (int, float)) and size}
    if planned:
        memory[PLANNED_PEAK] = float(planned["planned_peak"])
        measured = [event["measured_peak"] for event in run.memory if _is_size(event.get("measured_peak"))]
        if measured:
            memory[MEASURED_PEAK] = float(max(measured))
    return memory


def fullest_plan(run: RunRecord) -> dict[str, Any] | None:
    """The memory event with the largest peak in its plan."""
    events = [
        each for each in run.memory if isinstance(each.get("planned"), dict) and _is_size(each.get("planned_peak"))
    ]
    return max(events, key=lambda event: event["planned_peak"], default=None)


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def size_of(size: float) -> str:
    """Bytes in words: 3.2 GB of 1e9 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
    return f"{size:.0f} bytes"
