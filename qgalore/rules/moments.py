"""The moments of a parameter, or of a basis that learns, as entries of a parameter's state.

Beside the tensors, whose names a Rule knows, there are three numbers: `step`, the updates so far, and `mass` and
`mass_sq`, see update_rules. Those of a basis have its side before their names: `right.exp_avg`, `right.step`.
"""

from typing import Any

import torch
from torch import Tensor

from qgalore.rules.rules import Rule
from qgalore.storage.dynamic8 import Moment, create_moment, open_moment
from qgalore.subspace.projector import Refresh

MOMENT_POLICIES = ("project", "keep", "reset")


def create_moments(state: dict[str, Any], rule: Rule, *, like: Tensor, bits: int, prefix: str = "") -> None:
    """Moments of zeros, and the sums of their weights. like: the gradient.  bits: 8 or 32, see create_moment."""
    for kind in rule.moments(like.shape):
        create_moment(state, prefix + kind.name, like=_shaped(like, kind.shape), bits=bits)
    state.update({prefix + "mass": 0.0, prefix + "mass_sq": 0.0})


def open_moments(
    state: dict[str, Any], rule: Rule, *, like: Tensor, seed: int, compiled: bool = False, prefix: str = ""
) -> list[Moment]:
    """The moments, in whatever precision they are kept, as the rule wants them. See open_moment for the keywords."""
    return [
        open_moment(
            state,
            prefix + kind.name,
            like=_shaped(like, kind.shape),
            signed=kind.signed,
            seed=seed,
            compiled=compiled,
        )
        for kind in rule.moments(like.shape)
    ]


def count_update(state: dict[str, Any], rule: Rule, *, betas: tuple[float, float], prefix: str = "") -> None:
    """One more update: the number of them, and the sums of the weights that the moments will hold after it."""
    step = state[prefix + "step"] = state.get(prefix + "step", 0) + 1
    beta1, beta2 = betas[0], rule.decay(step) if rule.decay else betas[1]
    state[prefix + "mass"] = beta1 * state[prefix + "mass"] + 1 - beta1
    state[prefix + "mass_sq"] = beta2 * state[prefix + "mass_sq"] + 1 - beta2


def follow_basis(state: dict[str, Any], rule: Rule, change: Refresh, *, like: Tensor, policy: str, seed: int) -> None:
    """What becomes of the moments when the basis changes: project | keep | reset, see LowRankOptimizer.

    like: R.  seed: to round them with, another one than in the update.
    """
    moments = open_moments(state, rule, like=like, seed=seed)
    if policy == "project":
        for kind, moment in zip(rule.moments(like.shape), moments, strict=True):
            if kind.signed:
                moment.copy_(change.carry(moment.dequantize()))
    elif policy == "reset":
        for kind, moment in zip(rule.moments(like.shape), moments, strict=True):
            moment.copy_(like.new_zeros(kind.shape))
        state["mass"] = state["mass_sq"] = 0.0


def _shaped(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of that shape, of the dtype and on the device of another one; its values do not matter."""
    return like if shape == like.shape else like.new_empty(shape)
