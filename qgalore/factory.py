"""From a name to an optimizer: the one table that knows the names."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qgalore.grad_sync import GradSync
from qgalore.low_rank_optimizer import LowRankOptimizer
from qgalore.master_weights import MasterWeights
from qgalore.param_groups import ParameterGroup


@dataclass(frozen=True)
class Settings:
    """What a user may choose of an optimizer. None: that optimizer's own default.

    lr: step size.  weight_decay: as the optimizer defines it.  beta1, beta2: decay rates of the moments.
    rank and below: of the low-rank optimizers alone, see LowRankOptimizer.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    beta1: float | None = None
    beta2: float | None = None
    rank: int = 128
    update_proj_gap: int = 50
    galore_scale: float = 1.0
    proj_type: str = "std"
    subspace: str = "iterate"
    moments_on_refresh: str = "project"
    seed: int = 0


Builder = Callable[[Sequence[ParameterGroup], Settings, GradSync], torch.optim.Optimizer]


@dataclass(frozen=True)
class Recipe:
    """One entry of the table.

    title: what the log calls it.  low_rank: whether it projects gradients and sums them over the ranks itself.
    betas: which of Settings.beta1 and beta2 it listens to.
    """

    title: str
    build: Builder
    low_rank: bool = False
    betas: tuple[str, ...] = ("beta1", "beta2")

    def describe(self, group: ParameterGroup, settings: Settings) -> str:
        """How the parameters of this group are trained, in a few words."""
        if not (self.low_rank and group.projected):
            return f"{self.title}, full rank"
        basis = "orthogonal iteration" if settings.subspace == "iterate" else "exact SVD"
        return (
            f"{self.title}, rank {settings.rank} ({settings.proj_type}), {basis} every {settings.update_proj_gap} "
            f"updates, scale {settings.galore_scale:g}"
        )


def _named_groups(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    return [{"params": list(group.parameters), "name": group.name} for group in groups]


def _betas(settings: Settings) -> tuple[float, float]:
    return (0.9 if settings.beta1 is None else settings.beta1, 0.999 if settings.beta2 is None else settings.beta2)


def _adam(optimizer: type[torch.optim.Optimizer]) -> Builder:
    def build(groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync) -> torch.optim.Optimizer:
        options = dict(lr=settings.lr, betas=_betas(settings), weight_decay=settings.weight_decay)
        return MasterWeights.around(optimizer, _named_groups(groups), **options)

    return build


def _sgd(groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync) -> torch.optim.Optimizer:
    options = dict(lr=settings.lr, momentum=settings.beta1 or 0.0, weight_decay=settings.weight_decay)
    return MasterWeights.around(torch.optim.SGD, _named_groups(groups), **options)


def _adafactor(groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync) -> torch.optim.Optimizer:
    options = dict(lr=settings.lr, weight_decay=settings.weight_decay)
    return MasterWeights.around(torch.optim.Adafactor, _named_groups(groups), **options)


def _galore(groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync) -> torch.optim.Optimizer:
    low_rank = dict(
        rank=settings.rank,
        update_proj_gap=settings.update_proj_gap,
        scale=settings.galore_scale,
        proj_type=settings.proj_type,
        subspace=settings.subspace,
        moments_on_refresh=settings.moments_on_refresh,
    )
    named = [
        entry | low_rank if group.projected else entry
        for group, entry in zip(groups, _named_groups(groups), strict=True)
    ]
    return LowRankOptimizer(
        named,
        lr=settings.lr,
        betas=_betas(settings),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        sync=sync,
    )


OPTIMIZERS = {
    "adam": Recipe("Adam", _adam(torch.optim.Adam)),
    "adamw": Recipe("AdamW", _adam(torch.optim.AdamW)),
    "sgd": Recipe("SGD", _sgd, betas=("beta1",)),
    "adafactor": Recipe("Adafactor", _adafactor, betas=()),
    "galore_adamw": Recipe("AdamW", _galore, low_rank=True),
}

# Known to users of the reference repositories; each comes with a feature that is not here yet.
PLANNED = (
    "adam8bit",
    "adamw8bit",
    "adamw8bit_per_layer",
    "galore_adamw_per_layer",
    "galore_adamw8bit",
    "galore_adamw8bit_per_layer",
    "q_galore_adamw8bit",
    "q_galore_adamw8bit_per_layer",
    "galore_adafactor",
    "galore_lion",
    "lion",
)


def find_recipe(name: str) -> Recipe:
    """The table's entry for a name, in any case. Raises ValueError that lists the known names."""
    name = name.lower()
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    known = ", ".join(OPTIMIZERS)
    if name in PLANNED:
        raise ValueError(f"--optimizer {name} is not available in this version yet. Available: {known}.")
    close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise ValueError(f"unknown --optimizer '{name}'. {hint}Known: {known}.")


def create_optimizer(
    name: str, *, groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync | None = None
) -> torch.optim.Optimizer:
    """The optimizer of that name over these groups (see param_groups.split_parameters).

    sync: sums gradients over data-parallel ranks inside a low-rank optimizer, at rank size where it can; the others
    expect gradients that are summed already.  Raises ValueError for an unknown name or settings out of range.
    """
    return find_recipe(name).build(groups, settings, sync or GradSync())
