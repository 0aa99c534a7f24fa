"""The memory of a deep model from two models of few layers, to the byte.

The layers of a deep model are alike. In a model of k and in one of k + 1 layers, a stretch of the program that works on
one layer (a visit: its forward pass in the second micro-batch, say) does the same; what is alive besides grows by the
same bytes with each further layer. So the peak within a visit is extrapolated along a straight line, kind by kind, and
the most of all visits is the peak of the deep model, to the byte. Visits of layers in the middle lie between those
beside them, which is checked: where it does not hold, the whole model is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qgalore.live_memory import Peak, Visit


@dataclass(frozen=True)
class MemoryPlan:
    """What a run keeps and needs, in bytes.

    held: bytes by kind between updates.
    peaks: the peak of each phase: building the model, the first update, a later one, one with refreshes, evaluation.
    """

    held: dict[str, int]
    peaks: dict[str, Peak]

    @property
    def peak(self) -> Peak:
        """The largest of the peaks."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes)


@dataclass(frozen=True)
class Trace:
    """What was alive in a run of a model of some number of layers.

    held: bytes by kind between updates.
    visits: in each phase, the peak of each visit to a layer.
    """

    held: dict[str, int]
    visits: dict[str, dict[Visit, Peak]]


def extrapolate(less: Trace, more: Trace, *, few: int, layers: int) -> MemoryPlan | None:
    """The plan of a model of `layers` from traces of `few` and `few` + 1; None where these do not fit together."""
    peaks: dict[str, Peak] = {}
    for phase, visits in less.visits.items():
        ends, others = _from_ends(visits, few), _from_ends(more.visits[phase], few + 1)
        if ends.keys() != {(place, number) for place, number in others if place != few - 2}:
            return None
        for (place, number), peak in others.items():
            around = [others.get((near, number)) for near in (few - 3, -2)]
            if place == few - 2 and any(near is None for near in around):
                return None
            if place == few - 2 and 2 * peak.bytes != sum(near.bytes for near in around if near is not None):
                return None
        further = [_along(peak, others[key], by=layers - few) for key, peak in ends.items()]
        peaks[phase] = max(further, key=lambda peak: peak.bytes)
    return MemoryPlan(_line(less.held, more.held, by=layers - few), peaks)


def _from_ends(visits: Mapping[Visit, Peak], layers: int) -> dict[tuple[int, int], Peak]:
    """Peaks by the number of the layer and of the visit; the last two layers are -2 and -1, no layer is -3."""
    names = {-1: -3, layers - 2: -2, layers - 1: -1}
    return {(names.get(visit.part, visit.part), visit.number): peak for visit, peak in visits.items()}


def _along(less: Peak, more: Peak, *, by: int) -> Peak:
    kinds = _line(less.kinds, more.kinds, by=by)
    return Peak(sum(kinds.values()), kinds, less.line)


def _line(less: Mapping[str, int], more: Mapping[str, int], *, by: int) -> dict[str, int]:
    """The bytes of each kind, `by` steps beyond `less`, where `more` is one step beyond it."""
    kinds = dict.fromkeys([*less, *more])
    return {kind: less.get(kind, 0) + by * (more.get(kind, 0) - less.get(kind, 0)) for kind in kinds}
