"""Whether a state that was loaded is one that an update can go on from: bases and moments of its own sizes."""

from typing import Any

from qgalore.rules.moments import open_moments
from qgalore.storage.stored import Stored, part_key
from qgalore.update import ParameterUpdate


def misfit(update: ParameterUpdate) -> str | None:
    """What does not fit of the state of a parameter, such as "exp_avg (32, 8), not (32, 4)"; None if all does."""
    if not update.state:
        return None
    for each in [update] if update.learner is None else [update, update.learner]:
        told = _bases(each) or _moments(each)
        if told:
            return told
    return None


def _bases(update: ParameterUpdate) -> str | None:
    projector, state = update.projector, update.state
    try:
        found = projector.open(state)
    except KeyError as error:
        return f"no {error.args[0]}"
    missing = [side for side in projector.sides if side not in found]
    if missing and "refreshes" in state:
        return f"no basis on the {missing[0]}"
    return next((told for side, basis in found.items() if (told := _parts(side, basis))), None)


def _moments(update: ParameterUpdate) -> str | None:
    if not update.clock.counts_moments(update.state):
        return None
    start = 0 if update.shard is None else update.shard.start
    options: dict[str, Any] = dict(dtype=update.projector.wide, seed=0, prefix=update.prefix, row_start=start)
    try:
        found = open_moments(update.state, update.kinds, **options)
    except KeyError as error:
        return f"no {error.args[0]}"
    named = zip((kind.name for kind in update.kinds), found, strict=True)
    return next((told for name, moment in named if (told := _parts(name, moment.stored))), None)


def _parts(name: str, stored: Stored) -> str | None:
    for part, (shape, _) in stored.codec.spec(stored.shape).items():
        have = stored.parts[part].shape
        if have != shape:
            return f"{part_key(name, part)} {tuple(have)}, not {tuple(shape)}"
    return None
