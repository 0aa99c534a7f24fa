"""What a parameter group of a LowRankOptimizer may set, and within which bounds. See there for the meaning."""

import math
import warnings
from typing import Any

from qgalore.rules.lifts import RESIDUALS
from qgalore.rules.moments import MOMENT_POLICIES
from qgalore.rules.rules import RULES
from qgalore.subspace.projector import PROJ_TYPES, SUBSPACE_METHODS

DEFAULTS: dict[str, Any] = dict(
    rule="adam",
    rank=None,
    update_proj_gap=200,
    scale=1.0,
    proj_type="std",
    subspace="iterate",
    threshold=None,
    growth=2.0,
    queue_size=5,
    moments_on_refresh="project",
    proj_lr=None,
    proj_reg=0.1,
    residual="none",
    decoupled=True,
    state_bits=32,
    basis_bits=None,
    basis_group_size=256,
    clip=0.0,
)


def check_group(group: dict[str, Any]) -> None:
    """Refuses settings out of range, and warns of a rank that some matrices are too small for."""
    for name, fits in _fits(group).items():
        if not fits:
            raise ValueError(f"{name} = {group[name]} is out of range")
    if group["rank"] is None:
        return
    if group["residual"] != "none" and (group["rule"] != "adam" or group["proj_type"] == "full"):
        raise ValueError("the residual is recovered with Adam's rule and one projected side only")
    if any(p.ndim != 2 for p in group["params"]):
        raise ValueError("a group with a rank may hold matrices only")
    small = [p for p in group["params"] if min(p.shape) < group["rank"]]
    if small:
        shortest = min(min(p.shape) for p in small)
        warnings.warn(
            f"rank {group['rank']} is larger than the shorter side of {len(small)} of {len(group['params'])} matrices "
            f"(the shortest: {shortest}): it is clamped there",
            stacklevel=3,
        )


def _fits(group: dict[str, Any]) -> dict[str, bool]:
    """Whether each setting is within its bounds."""
    return {
        "lr": group["lr"] >= 0,
        "weight_decay": group["weight_decay"] >= 0,
        "eps": group["eps"] >= 0,
        "betas": all(0 <= beta < 1 for beta in group["betas"]),
        "rule": group["rule"] in RULES,
        "rank": group["rank"] is None or group["rank"] >= 1,
        "update_proj_gap": group["update_proj_gap"] >= 1,
        "scale": math.isfinite(group["scale"]),
        "clip": group["clip"] >= 0,
        "state_bits": group["state_bits"] in (8, 32),
        "decoupled": group["decoupled"] or group["rank"] is None,
        "basis_bits": group["basis_bits"] in (None, 4, 8),
        "proj_type": group["proj_type"] in PROJ_TYPES,
        "subspace": group["subspace"] in SUBSPACE_METHODS,
        "proj_lr": group["proj_lr"] is None or 0 <= group["proj_lr"] < math.inf,
        "proj_reg": 0 <= group["proj_reg"] < math.inf,
        "residual": group["residual"] in RESIDUALS,
        "moments_on_refresh": group["moments_on_refresh"] in MOMENT_POLICIES,
    }
