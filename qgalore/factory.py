"""From a name to an optimizer: the one table that knows the names."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qgalore.master_weights import MasterWeights
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import ParameterGroup
from qgalore.per_layer import PerLayerUpdates
from qgalore.rules.rules import RULES
from qgalore.subspace.projector import LEARNERS
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates


@dataclass(frozen=True)
class Settings:
    """What a user may choose of an optimizer. None: that optimizer's own default.

    lr: step size.  matrix_lr_ratio: that of the attention and MLP matrices over lr.  weight_decay: as the optimizer
    defines it.  beta1, beta2: decay rates of the moments.
    rank and below: of our own optimizers alone, see LowRankOptimizer. proj_bits: of the bases, None for the gradient's
    dtype.  cos_threshold, gamma_proj, queue_size: of the lazy refresh.  embedding_state_bits: of the moments of
    embedding and head where the others have 8.  compile: whether updates run compiled.  log_details: whether subspaces
    are measured.
    """

    lr: float = 1e-3
    matrix_lr_ratio: float = 1.0
    weight_decay: float = 0.0
    beta1: float | None = None
    beta2: float | None = None
    rank: int = 128
    update_proj_gap: int = 50
    galore_scale: float = 1.0
    proj_type: str = "std"
    subspace: str = "iterate"
    moments_on_refresh: str = "project"
    proj_lr: float | None = None
    proj_reg: float = 0.1
    residual: str = "none"
    proj_bits: int | None = None
    proj_group_size: int = 256
    cos_threshold: float | None = None
    gamma_proj: float = 2.0
    queue_size: int = 5
    embedding_state_bits: int = 8
    seed: int = 0
    compile: bool = False
    log_details: bool = False


Builder = Callable[[Sequence[ParameterGroup], Settings, GradSync], torch.optim.Optimizer]


@dataclass(frozen=True)
class Recipe:
    """One entry of the table.

    title: what the log calls it.  low_rank: whether it projects gradients.  ours: whether it is a LowRankOptimizer,
    which sums gradients over the ranks itself, may have INT8 weights and may be driven per layer.  per_layer: whether
    it is.  rule: of update_rules, where it is ours.  state_bits: of its moments.  betas: which of Settings.beta1 and
    beta2 it listens to.  lazy: the threshold of the lazy refresh where the user names none; None: not lazy.
    """

    title: str
    build: Builder
    low_rank: bool = False
    ours: bool = False
    per_layer: bool = False
    rule: str = "adam"
    state_bits: int = 32
    betas: tuple[str, ...] = ("beta1", "beta2")
    lazy: float | None = None

    def describe(self, group: ParameterGroup, settings: Settings, *, unprojected: str = "full rank") -> str:
        """How the parameters of this group are trained, in a few words. unprojected: what is said of their rank where
        their gradients are not projected."""
        bits = _state_bits(group, self.state_bits, settings)
        title = f"{bits}-bit {self.title}" if bits != 32 else self.title
        if group.projected and settings.matrix_lr_ratio != 1:
            title += f" at {settings.matrix_lr_ratio:g} x lr"
        if not (self.low_rank and group.projected):
            return f"{title}, {unprojected}"
        packed = f"INT{settings.proj_bits} " if settings.proj_bits else ""
        recovered = ", residual recovered" if settings.residual != "none" else ""
        whole = ", micro-batches summed at full size" if settings.proj_type in LEARNERS and self.per_layer else ""
        return (
            f"{title}, rank {settings.rank} ({settings.proj_type}), {packed}{_basis(settings)}, "
            f"scale {settings.galore_scale:g}{recovered}{whole}"
        )


def _basis(settings: Settings) -> str:
    """How the bases of projected matrices come about."""
    if settings.proj_type == "random":
        return f"random bases every {settings.update_proj_gap} updates"
    if settings.proj_type in LEARNERS:
        return f"online PCA by {LEARNERS[settings.proj_type].title}"
    method = "orthogonal iteration" if settings.subspace == "iterate" else "exact SVD"
    lazy = ", lazily" if settings.cos_threshold is not None else ""
    return f"{method} every {settings.update_proj_gap} updates{lazy}"


def _named_groups(groups: Sequence[ParameterGroup], settings: Settings) -> list[dict[str, Any]]:
    """What torch's optimizers are given. `lr_ratio` is for whoever sets the learning rate: see `set_lr`."""
    ratios = [settings.matrix_lr_ratio if group.projected else 1.0 for group in groups]
    return [
        {"params": list(group.parameters), "name": group.name, "lr": settings.lr * ratio, "lr_ratio": ratio}
        for group, ratio in zip(groups, ratios, strict=True)
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group of an optimizer made here; the matrices' is matrix_lr_ratio of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def _betas(settings: Settings, rule: str = "adam") -> tuple[float, float]:
    beta1, beta2 = RULES[rule].betas
    return (beta1 if settings.beta1 is None else settings.beta1, beta2 if settings.beta2 is None else settings.beta2)


def _adam(optimizer: type[torch.optim.Optimizer]) -> Builder:
    def build(groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync) -> torch.optim.Optimizer:
        options = dict(lr=settings.lr, betas=_betas(settings), weight_decay=settings.weight_decay)
        return MasterWeights.around(optimizer, _named_groups(groups, settings), **options)

    return build


def _sgd(groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync) -> torch.optim.Optimizer:
    options = dict(lr=settings.lr, momentum=settings.beta1 or 0.0, weight_decay=settings.weight_decay)
    return MasterWeights.around(torch.optim.SGD, _named_groups(groups, settings), **options)


def _adafactor(groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync) -> torch.optim.Optimizer:
    options = dict(lr=settings.lr, weight_decay=settings.weight_decay)
    return MasterWeights.around(torch.optim.Adafactor, _named_groups(groups, settings), **options)


def _state_bits(group: ParameterGroup, bits: int, settings: Settings) -> int:
    """Bits of the moments of a group: those of embedding and head may be kept at a higher precision."""
    if all(p.ndim < 2 for p in group.parameters):
        return 32  # create_moment would see to it; said here, so that the log says so, too
    return max(bits, settings.embedding_state_bits) if group.name in ("embedding", "head") else bits


def _ours(title: str, *, rule: str = "adam", low_rank: bool = False, state_bits: int = 32, decoupled: bool = True,
          **recipe: Any) -> Recipe:  # fmt: skip
    """The entry of a LowRankOptimizer, with or without projections."""

    def build(groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync) -> torch.optim.Optimizer:
        named = [
            entry
            | {"rule": rule, "decoupled": decoupled, "state_bits": _state_bits(group, state_bits, settings)}
            | (_projection(settings) if low_rank and group.projected else {})
            for group, entry in zip(groups, _named_groups(groups, settings), strict=True)
        ]
        return LowRankOptimizer(
            named,
            lr=settings.lr,
            betas=_betas(settings, rule),
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            sync=sync,
            compile=settings.compile,
            details=settings.log_details,
        )

    return Recipe(title, build, low_rank=low_rank, ours=True, rule=rule, state_bits=state_bits, **recipe)


def _projection(settings: Settings) -> dict[str, Any]:
    """What a projected group of a LowRankOptimizer is given."""
    return dict(
        rank=settings.rank,
        update_proj_gap=settings.update_proj_gap,
        scale=settings.galore_scale,
        proj_type=settings.proj_type,
        subspace=settings.subspace,
        moments_on_refresh=settings.moments_on_refresh,
        proj_lr=settings.proj_lr,
        proj_reg=settings.proj_reg,
        residual=settings.residual,
        basis_bits=settings.proj_bits,
        basis_group_size=settings.proj_group_size,
        threshold=settings.cos_threshold,
        growth=settings.gamma_proj,
        queue_size=settings.queue_size,
    )


LAZY_THRESHOLD = 0.6  # mean overlap of successive bases, see docs/notebook.md


def _recipes() -> dict[str, Recipe]:
    """The table. Whatever is ours exists per layer, too, but for Adam's coupled weight decay."""
    torchs = {
        "adam": Recipe("Adam", _adam(torch.optim.Adam)),
        "adamw": Recipe("AdamW", _adam(torch.optim.AdamW)),
        "sgd": Recipe("SGD", _sgd, betas=("beta1",)),
        "adafactor": Recipe("Adafactor", _adafactor, betas=()),
    }
    ours = {
        "adamw8bit": _ours("AdamW", state_bits=8),
        "lion": _ours("Lion", rule="lion"),
        "galore_adamw": _ours("AdamW", low_rank=True),
        "galore_adamw8bit": _ours("AdamW", low_rank=True, state_bits=8),
        "galore_adafactor": _ours("Adafactor", rule="adafactor", low_rank=True, betas=("beta1",)),
        "galore_lion": _ours("Lion", rule="lion", low_rank=True),
        "q_galore_adamw8bit": _ours("AdamW", low_rank=True, state_bits=8, lazy=LAZY_THRESHOLD),
    }
    per_layer = {f"{name}_per_layer": replace(recipe, per_layer=True) for name, recipe in ours.items()}
    adam8bit = _ours("Adam", state_bits=8, decoupled=False)
    return torchs | {"adam8bit": adam8bit} | ours | per_layer


OPTIMIZERS = _recipes()


def find_recipe(name: str) -> Recipe:
    """The table's entry for a name, in any case. Raises ValueError that lists the known names."""
    name = name.lower()
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    known = ", ".join(OPTIMIZERS)
    close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise ValueError(f"unknown --optimizer '{name}'. {hint}Known: {known}.")


def create_updates(
    name: str,
    *,
    optimizer: torch.optim.Optimizer,
    sync: GradSync,
    accumulation: int = 1,
    clip: float = 0.0,
    accumulation_dtype: torch.dtype | None = None,
) -> WholeModelUpdates | PerLayerUpdates:
    """What makes an update of `accumulation` backward passes, after the last or inside each, as the name says.

    clip: largest norm, of all gradients or per parameter; 0: no limit.  accumulation_dtype: of sums over micro-batches.
    """
    if find_recipe(name).per_layer:
        assert isinstance(optimizer, LowRankOptimizer)
        return PerLayerUpdates(optimizer, accumulation=accumulation, dtype=accumulation_dtype, clip=clip)
    return WholeModelUpdates(optimizer, sync=sync, clip=clip, dtype=accumulation_dtype if accumulation > 1 else None)


def create_optimizer(
    name: str, *, groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync | None = None
) -> torch.optim.Optimizer:
    """The optimizer of that name over these groups (see param_groups.split_parameters).

    sync: sums gradients over data-parallel ranks inside a low-rank optimizer, at rank size where it can; the others
    expect gradients that are summed already.  Raises ValueError for an unknown name or settings out of range.
    """
    return find_recipe(name).build(groups, settings, sync or GradSync())
