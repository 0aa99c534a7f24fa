"""From a name to an optimizer: OPTIMIZERS has a recipe for each name.

A recipe says how each kind of parameter (matrix, embedding, head, norm) is trained: the rule, the basis, the lift, the
bits of the moments. A new optimizer is a new row; the rules, bases and lifts that it names have tables of their own.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qgalore.master_weights import MasterWeights
from qgalore.optimizer import LowRankOptimizer
from qgalore.options import ProjectionOptions, Settings, declared
from qgalore.param_groups import ParameterGroup, read_ratios, split_by_rank
from qgalore.per_layer import PerLayerUpdates
from qgalore.rules.lifts import LIFTS
from qgalore.rules.rules import RULES
from qgalore.rules.skips import SKIPS
from qgalore.subspace.bases import METHODS
from qgalore.subspace.projector import LEARNERS
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates

LAZY_THRESHOLD = 0.6  # mean overlap of successive bases at which a gap grows, see docs/notebook.md
SKETCH: dict[str, Any] = dict(proj_type="std", subspace="gaussian", moments_on_refresh="keep", cos_threshold=None)


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    The options of a kind of parameter are those of options.GroupOptions, and no user changes them. A kind without
    options is trained by AdamW. For torch's own optimizers only `title` and `uses` matter.
    """

    title: str  # the optimizer's name in the log
    torch_class: type[torch.optim.Optimizer] | None = None  # torch's own optimizer, if it is one
    matrix: Mapping[str, Any] = field(default_factory=dict)
    embedding: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)
    norm: Mapping[str, Any] = field(default_factory=dict)
    projected: bool = False  # whether the gradients of matrices are projected, as the ProjectionOptions say
    state_bits: int = 32  # bits of the moments
    lazy_threshold: float | None = None  # default of cos_threshold; None for refreshes that are not lazy
    uses: tuple[str, ...] = ("beta1", "beta2")  # the options of Settings that have an effect besides projection's
    per_layer: bool = False  # whether parameters are updated inside backward

    @property
    def low_rank_engine(self) -> bool:
        """Whether a LowRankOptimizer runs it, which can sum gradients over ranks, train quantized weights and be driven
        per layer."""
        return self.torch_class is None

    @property
    def rule(self) -> str:
        """The rule of the matrices."""
        return self.matrix.get("rule", "adam")

    @property
    def rule_elsewhere(self) -> bool:
        """Whether embedding, head or norms have another rule than Adam's."""
        return any(kind.get("rule", "adam") != "adam" for kind in (self.embedding, self.head, self.norm))

    def split(self, groups: Sequence[ParameterGroup], settings: Settings) -> Sequence[ParameterGroup]:
        """The groups with the matrices split by rank. Raises ValueError if a part of --rank_ratio fits no name."""
        ratios = read_ratios(settings.rank_ratio)
        return split_by_rank(groups, ratios) if ratios and self.ranked else groups

    @property
    def ranked(self) -> bool:
        """Whether a user chooses the rank."""
        return self.projected and "rank" not in self.matrix

    def build(
        self, groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync | None
    ) -> torch.optim.Optimizer:
        if self.torch_class is not None:
            return self._build_torch(self.torch_class, groups, settings)
        return LowRankOptimizer(
            [self._group(group, settings) for group in self.split(groups, settings)],
            lr=settings.lr,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            sync=sync,
            compile=settings.compile,
            details=settings.log_details,
        )

    def _build_torch(
        self, kind: type[torch.optim.Optimizer], groups: Sequence[ParameterGroup], settings: Settings
    ) -> torch.optim.Optimizer:
        options: dict[str, Any] = dict(lr=settings.lr, weight_decay=settings.weight_decay)
        if kind is torch.optim.SGD:
            options["momentum"] = settings.beta1 or 0.0
        elif self.uses:
            options |= {"betas": _betas(settings, "adam"), "eps": settings.eps}
        return MasterWeights.around(kind, [_base_group(group, settings) for group in groups], **options)

    def _group(self, group: ParameterGroup, settings: Settings) -> dict[str, Any]:
        own = self.options_of(group, settings)
        projection = {each.name: getattr(settings, each.name) for each in declared(ProjectionOptions)}
        names = projection if self.projected else self.uses
        chosen = {name: projection[name] for name in names if name in projection} if group.kind == "matrix" else {}
        rule = own.get("rule", "adam")
        state = {"betas": _betas(settings, rule), "state_bits": self.bits_of(group, settings)}
        if "rank" in chosen:
            chosen["rank"] = _rank(group, settings)
        if group.kind == "matrix":
            chosen |= {"skip_updates": settings.skip_updates, "error_feedback": settings.error_feedback}
        return _base_group(group, settings) | state | chosen | dict(own)

    def options_of(self, group: ParameterGroup, settings: Settings) -> Mapping[str, Any]:
        """The options that this recipe has for the kind of a group. None, where AdamW trains all but the matrices."""
        elsewhere = group.kind != "matrix" and settings.embedding_optimizer == "adamw"
        return {} if elsewhere else getattr(self, group.kind)

    def bits_of(self, group: ParameterGroup, settings: Settings) -> int:
        """Bits of the moments of a group. Embedding and head may have more than the matrices; vectors have 32."""
        if all(p.ndim < 2 for p in group.parameters):
            return 32  # moment_codec decides so, too; the log needs to know
        if self.state_bits != 8:
            return self.state_bits
        return settings.embedding_state_bits if group.kind in ("embedding", "head") else settings.moments_bits

    def describe(self, group: ParameterGroup, settings: Settings, *, unprojected: str = "full rank") -> str:
        """Says in a few words how the parameters of this group are trained.

        unprojected: the words for the rank of gradients that are not projected.
        """
        matrix = group.kind == "matrix"
        bits = self.bits_of(group, settings)
        title = self.title if self.options_of(group, settings) or self.torch_class else "AdamW"
        title = f"{bits}-bit {title}" if bits != 32 else title
        if matrix and settings.matrix_lr_ratio != 1:
            title += f" at {settings.matrix_lr_ratio:g} x lr"
        if matrix and self.low_rank_engine and SKIPS[settings.skip_updates].title:
            title += f" and {SKIPS[settings.skip_updates].title}"
        if matrix and settings.error_feedback != "none":
            title += ", rounding errors fed back"
        if not (self.projected and matrix):
            return f"{title}, {unprojected}"
        own = replace(settings, **{name: value for name, value in self.matrix.items() if hasattr(settings, name)})
        packed = f"INT{own.proj_bits} " if own.proj_bits else ""
        recovered = ", residual recovered" if own.lift == "fira" else ""
        whole = self.per_layer and (_always_learns(own) or LIFTS[own.lift].needs_whole)
        summed = ", micro-batches summed at full size" if whole else ""
        basis = f"rank {_rank(group, own)} ({own.proj_type}), {packed}{_basis(own)}"
        return f"{title}, {basis}, scale {own.scale:g}{recovered}{summed}"


def _rank(group: ParameterGroup, settings: Settings) -> int:
    """The rank of a group, at least 1 for any ratio of a rank that is one."""
    return max(min(settings.rank, 1), round(settings.rank * group.rank_ratio))


def _always_learns(settings: Settings) -> bool:
    """Whether bases learn from every gradient, not from that of a refresh alone."""
    averages = METHODS[settings.subspace].averages and settings.proj_type != "random"
    return averages or settings.proj_type in LEARNERS


def _basis(settings: Settings) -> str:
    if settings.proj_type in LEARNERS:
        return f"online PCA by {LEARNERS[settings.proj_type].title}"
    method = METHODS["random" if settings.proj_type == "random" else settings.subspace]
    lazy = ", lazily" if settings.cos_threshold is not None and method.sees_gradient else ""
    return f"{method.title} every {settings.update_proj_gap} updates{lazy}"


def _base_group(group: ParameterGroup, settings: Settings) -> dict[str, Any]:
    ratio = settings.matrix_lr_ratio if group.kind == "matrix" else 1.0
    return {"params": list(group.parameters), "name": group.name, "lr": settings.lr * ratio, "lr_ratio": ratio}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group of an optimizer made here; that of the matrices is lr * matrix_lr_ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def _betas(settings: Settings, rule: str) -> tuple[float, float]:
    beta1, beta2 = RULES[rule].betas
    return (beta1 if settings.beta1 is None else settings.beta1, beta2 if settings.beta2 is None else settings.beta2)


def _everywhere(title: str, rule: str = "adam", *, decoupled: bool = True, **recipe: Any) -> Recipe:
    """A recipe with one rule for all kinds of parameters."""
    options = {"rule": rule, "decoupled": decoupled}
    return Recipe(title, matrix=options, embedding=options, head=options, norm=options, **recipe)


def _recipes() -> dict[str, Recipe]:
    """The table. Every recipe of a LowRankOptimizer exists per layer as well, except adam8bit."""
    torchs = {
        "adam": Recipe("Adam", torch.optim.Adam),
        "adamw": Recipe("AdamW", torch.optim.AdamW),
        "sgd": Recipe("SGD", torch.optim.SGD, uses=("beta1",)),
        "adafactor": Recipe("Adafactor", torch.optim.Adafactor, uses=()),
    }
    ours = {
        "adamw8bit": _everywhere("AdamW", state_bits=8),
        "lion": _everywhere("Lion", "lion"),
        "galore_adamw": _everywhere("AdamW", projected=True),
        "galore_adamw8bit": _everywhere("AdamW", projected=True, state_bits=8),
        "galore_adafactor": _everywhere("Adafactor", "adafactor", projected=True, uses=("beta1",)),
        "galore_lion": _everywhere("Lion", "lion", projected=True),
        "apollo": Recipe("APOLLO", matrix=SKETCH | {"lift": "apollo"}, projected=True),
        "apollo_mini": Recipe("APOLLO-Mini", matrix=SKETCH | {"rank": 1, "lift": "apollo_mini"}, projected=True),
        "muon": Recipe("Muon", matrix={"rule": "muon"}),
        "muon8bit": Recipe("Muon", matrix={"rule": "muon"}, state_bits=8),
        "galore_muon": Recipe("Muon", matrix={"rule": "muon"}, projected=True),
        "scale": Recipe(
            "SCALE", matrix={"rule": "scale"}, embedding={"rule": "scale_embedding"}, head={"rule": "scale_head"}
        ),
        "foam": Recipe("FOAM", matrix={"rule": "foam"}, uses=("beta1", "beta2", "scale")),
        "foam3": Recipe("FOAM", matrix={"rule": "foam3"}, uses=("beta1", "beta2", "scale")),
        "q_galore_muon8bit": Recipe(
            "Muon", matrix={"rule": "muon"}, projected=True, state_bits=8, lazy_threshold=LAZY_THRESHOLD
        ),
        "q_galore_adamw8bit": _everywhere("AdamW", projected=True, state_bits=8, lazy_threshold=LAZY_THRESHOLD),
    }
    per_layer = {f"{name}_per_layer": replace(recipe, per_layer=True) for name, recipe in ours.items()}
    adam8bit = _everywhere("Adam", state_bits=8, decoupled=False)
    return torchs | {"adam8bit": adam8bit} | ours | per_layer


OPTIMIZERS = _recipes()


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, in upper or lower case. Raises ValueError that lists the known names."""
    name = name.lower()
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    known = ", ".join(OPTIMIZERS)
    close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise ValueError(f"unknown optimizer '{name}'. {hint}Known: {known}.")


def create_optimizer(
    name: str, *, groups: Sequence[ParameterGroup], settings: Settings, sync: GradSync | None = None
) -> torch.optim.Optimizer:
    """Builds the optimizer of that name.

    groups: the parameters by kind, see param_groups.split_parameters.
    sync: sums gradients over data-parallel ranks inside a LowRankOptimizer, at rank size if possible. torch's own
        optimizers expect gradients that are summed already.
    Raises ValueError for an unknown name or settings out of range.
    """
    return find_recipe(name).build(groups, settings, sync)


def create_updates(
    name: str,
    *,
    optimizer: torch.optim.Optimizer,
    sync: GradSync,
    accumulation: int = 1,
    clip: float = 0.0,
    accumulation_dtype: torch.dtype | None = None,
    accumulate_on_host: bool = False,
) -> WholeModelUpdates | PerLayerUpdates:
    """The object that applies an optimizer's updates, inside backward if the name ends in `_per_layer`, else after it.

    accumulation: backward passes, one for each micro-batch, in an update.
    clip: maximum norm of all gradients together, or of each parameter's if per layer; 0 for no limit.
    accumulation_dtype: dtype of sums over micro-batches; None for the dtype of the parameter.
    accumulate_on_host: whether updates inside backward keep these sums in host memory.
    """
    if find_recipe(name).per_layer:
        assert isinstance(optimizer, LowRankOptimizer)
        return PerLayerUpdates(
            optimizer, accumulation=accumulation, dtype=accumulation_dtype, clip=clip, on_host=accumulate_on_host
        )
    dtype = accumulation_dtype if accumulation > 1 else None
    return WholeModelUpdates(optimizer, sync=sync, accumulation=accumulation, clip=clip, dtype=dtype)
