"""Every option of the optimizers, declared once: default, range, unit, meaning, and where it has an effect.

A dataclass field made by `option` is an option. Parameter groups take their defaults and checks from it; the command
line takes its flags, its warnings about flags without effect, and its documentation.
"""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qgalore.param_groups import read_ratios
from qgalore.rules.lifts import LIFTS
from qgalore.rules.moments import MOMENT_POLICIES
from qgalore.rules.rules import RULES
from qgalore.rules.skips import SKIPS
from qgalore.subspace.bases import METHODS
from qgalore.subspace.projector import PROJ_TYPES

FEEDBACKS = ("none", "eco")  # what becomes of the rounding error of a weight
SUBSPACE_METHODS = ("iterate", "svd", "average")  # what --subspace may name; others come with a proj_type or a recipe
RESIDUALS = ("none", "fira")  # what --residual may name; other lifts come with a recipe


class Range(NamedTuple):
    """The values that an option may have."""

    fits: Callable[[Any], bool]  # whether it may have this value
    words: str  # the range in an error message: "it must ..."


def between(least: int, most: int) -> Range:
    """Numbers from `least` to `most`."""
    return Range(lambda value: least <= value <= most, f"must lie between {least} and {most}")


def at_least(least: float) -> Range:
    """Finite numbers, not below `least`."""
    words = "must be 0 or more" if least == 0 else f"must be at least {least:g}"
    return Range(lambda value: least <= value < math.inf, words)


ABOVE_0 = Range(lambda value: 0 < value < math.inf, "must be above 0")
DECAY_RATE = Range(lambda value: 0 <= value < 1, "must lie in [0, 1)")
SHARE = Range(lambda value: 0 <= value <= 1, "must lie in [0, 1]")
GROUP_SIZE = Range(lambda value: value >= 1 or value == -1, "must be above 0, or -1")


def _reads(text: str) -> bool:
    try:
        return bool(read_ratios(text))
    except ValueError:
        return False


RATIOS = Range(_reads, "must be parts of names with factors above 0, such as q_proj=0.5,down_proj=2")


def one_of(*values: Any) -> Range:
    """One of a few numbers."""
    return Range(lambda value: value in values, f"must be {' or '.join(map(str, values))}")


@dataclass(frozen=True)
class Option:
    """The meaning of an option; its name, type and default are those of the field."""

    help: str
    unit: str = ""  # the unit of the value, or its kind
    section: str = ""  # its heading in a list of options
    choices: Collection[str] | None = None  # possible words; a table counts as it is when a value is checked
    range: Range | None = None  # possible numbers
    flag: str | None = None  # name on a command line; None for the name of the field
    flag_choices: tuple[str, ...] | None = None  # possible words on a command line; None for `choices`
    parse: Callable[[str], Any] | None = None  # turns the text of a flag into a value; None for the field's type
    shown: str | None = None  # the default in words, if it depends on something
    needs: tuple[str, ...] = ()  # conditions without which it has no effect; a warning names the first that fails
    may_change: bool = False  # whether a resumed run may have another value
    required: bool = False  # whether a command line must have it

    def problem(self, value: Any) -> str | None:
        """Says what is wrong with a value; None if it is in range. The value None stands for the default."""
        if value is None:
            return None
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        return self.range.words if self.range is not None and not self.range.fits(value) else None


def option(default: Any, help: str, **known: Any) -> Any:
    """A dataclass field that is an option. The keywords are those of Option."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **known)})


class Declared(NamedTuple):
    """An option with the name, annotation and default of its field."""

    name: str
    annotation: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """Its name on a command line."""
        return self.option.flag or self.name


def declared(holder: type) -> Iterator[Declared]:
    """The options of a dataclass, in order."""
    for field in dataclasses.fields(holder):
        if "option" in field.metadata:
            yield Declared(field.name, field.type, field.default, field.metadata["option"])


# fmt: off

OPTIMIZER = "the method, the learning rate and its schedule"
PROJECTION = "low-rank projection, for optimizers that project gradients"
QUANTIZATION = "weights, bases, moments and sums in fewer bits"


@dataclass(frozen=True)
class ProjectionOptions:
    """How the gradients of a group of matrices are projected. A group without a `rank` is not projected."""

    rank: int = option(128, "columns of each basis, or rank of each adapter with --peft; at most the shorter side of "
        "a matrix", unit="COLUMNS", section=PROJECTION, range=at_least(1), needs=("rank",))
    update_proj_gap: int = option(50, "updates from one refresh of a basis to the next", unit="UPDATES",
        section=PROJECTION, range=at_least(1), needs=("projected",))
    scale: float = option(1.0, "factor on the update of the projected matrices", unit="FACTOR", section=PROJECTION,
        range=ABOVE_0, flag="galore_scale", needs=("scaled",))
    proj_type: str = option("std", "what is projected. std: the shorter side of a matrix; reverse_std: the longer; "
        "auto: the one of these that keeps fewer bytes, mostly the longer; left, right: that side; full: both. The "
        "shorter side also with continuous (the basis learns by online PCA with AdamW, or with the optimizer in the "
        "name) and random (the basis is drawn)", section=PROJECTION, choices=PROJ_TYPES, needs=("projected",))
    subspace: str = option("iterate", "how a basis is computed. iterate: warm orthogonal iteration; svd: exact "
        "singular vectors at every refresh; average: warm orthogonal iteration with the average over all updates, "
        "which needs the whole gradient of each, and one projected side", section=PROJECTION, choices=METHODS,
        flag_choices=SUBSPACE_METHODS, needs=("projected", "computed"))
    moments_on_refresh: str = option("project", "what happens to the moments at a refresh. project: the first moment "
        "is carried into the new basis; keep: both stay as they are (the reference); reset: both become zero",
        section=PROJECTION, choices=MOMENT_POLICIES, needs=("projected", "refreshed"))
    lift: str = option("none", "fira: add what the projection leaves out of the gradient to the update, scaled like "
        "the rest; only for AdamW and Muon", section=PROJECTION, choices=LIFTS, flag="residual", flag_choices=RESIDUALS,
        needs=("projected",))
    proj_lr: float | None = option(None, "step size of online PCA; it follows the schedule of the learning rate",
        unit="RATE", section=PROJECTION, range=at_least(0), shown="1 / --update_proj_gap",
        needs=("projected", "learns"))
    proj_reg: float = option(0.1, "weight of the distance of a learning basis from an orthonormal one; Online "
        "Subspace Descent's paper has 0.1, its code 0", unit="FACTOR", section=PROJECTION, range=at_least(0),
        needs=("projected", "learns"))
    cos_threshold: float | None = option(None, "overlap of successive bases, from 0 to 1, at which a basis counts as "
        "still and its gap grows", unit="OVERLAP", section=PROJECTION, range=SHARE,
        shown="0.6 for q_galore, else no gap ever grows", needs=("projected", "sided"))
    gamma_proj: float = option(2.0, "factor by which the gap of a still basis grows", unit="FACTOR",
        section=PROJECTION, range=at_least(1), needs=("projected", "sided", "lazy"))
    queue_size: int = option(5, "refreshes whose mean overlap is compared with --cos_threshold", unit="REFRESHES",
        section=PROJECTION, range=at_least(1), needs=("projected", "sided", "lazy"))
    proj_bits: int | None = option(None, "bits of an element of a basis, 8 or 4", unit="BITS", section=QUANTIZATION,
        range=one_of(4, 8), shown="4", needs=("projected", "packed"))
    proj_group_size: int = option(256, "largest number of elements in a row of a basis that share a scale; -1: the "
        "whole row", unit="ELEMENTS", section=QUANTIZATION, range=GROUP_SIZE, needs=("projected", "packed"))


@dataclass(frozen=True)
class GroupOptions:
    """The options of a parameter group of a LowRankOptimizer besides ProjectionOptions."""

    rule: str = option("adam", "how gradients become directions", choices=RULES)
    state_bits: int = option(32, "bits of the moments, 4, 8 or 32", range=one_of(4, 8, 32))
    decoupled: bool = option(True, "whether weight decay is decoupled; if not, it is added to the gradient")
    correct_bias: bool = option(True, "whether moments are divided by the sums of their weights, as in Adam")
    skip_updates: str = option("none", "skip, magma: a coin decides in each update whether a weight moves; see "
        "rules.skips", choices=SKIPS)
    clip: float = option(0.0, "maximum norm of the gradient of each parameter, as projected; 0: no limit",
        range=at_least(0))
    lr: float = option(1e-3, "step size", range=at_least(0))
    weight_decay: float = option(0.0, "weight decay, see `decoupled`", range=at_least(0))
    error_feedback: str = option("none", "eco: the first moment takes the rounding error of the weight in",
        choices=FEEDBACKS)
    eps: float = option(1e-8, "added to Adam's divisor", range=at_least(0))


@dataclass(frozen=True)
class Settings(ProjectionOptions):
    """The options that a user of `create_optimizer` chooses."""

    lr: float = option(1e-4, "peak learning rate", unit="RATE", section=OPTIMIZER, range=ABOVE_0)
    matrix_lr_ratio: float = option(1.0, "learning rate of the attention and MLP matrices, divided by --lr; where "
        "they are projected, --galore_scale multiplies it", unit="RATIO", section=OPTIMIZER, range=ABOVE_0)
    weight_decay: float = option(0.0, "weight decay, decoupled from the gradient; adam, adam8bit and sgd add it to "
        "the gradient", unit="RATE", section=OPTIMIZER, range=at_least(0))
    beta1: float | None = option(None, "decay rate of the first moment; the momentum of sgd", unit="RATE",
        section=OPTIMIZER, range=DECAY_RATE, shown="0.9; 0 for sgd", needs=("beta1",))
    beta2: float | None = option(None, "decay rate of Adam's second moment and of Lion's momentum", unit="RATE",
        section=OPTIMIZER, range=DECAY_RATE, shown="0.999; 0.99 for lion", needs=("beta2",))
    embedding_optimizer: str = option("own", "what trains embedding, head and norms. own: the optimizer itself, as its "
        "paper does; adamw: AdamW, as galore_adamw and muon do, so that optimizers differ in the matrices alone",
        section=OPTIMIZER, choices=("own", "adamw"), needs=("elsewhere",))
    skip_updates: str = option("none", "skip (SkipUpdate): in each update a coin decides for each attention and MLP "
        "matrix whether it moves, twice as far; magma: the same, as far as its gradient agrees with its momentum",
        section=OPTIMIZER, choices=SKIPS, needs=("skips",))
    error_feedback: str = option("none", "eco: what quantized attention and MLP weights lose by rounding goes into the "
        "first moment, and so into later updates; for adamw8bit", section=QUANTIZATION, choices=FEEDBACKS)
    rank_ratio: str | None = option(None, "factors on --rank by parts of names, such as q_proj=0.5,down_proj=2; where "
        "several parts fit a name, the last one counts", unit="PART=FACTOR,...", section=PROJECTION, range=RATIOS,
        shown="none", needs=("ranked",))
    moments_bits: int = option(8, "bits of the moments of an optimizer that keeps them in 8 bits, 8 or 4; of embedding "
        "and head see --embedding_state_bits", unit="BITS", section=QUANTIZATION, range=one_of(4, 8),
        needs=("moments8",))
    embedding_state_bits: int = option(8, "bits of the moments of embedding and head, 8 or 32, where all other "
        "moments have 8", unit="BITS", section=QUANTIZATION, range=one_of(8, 32), needs=("moments8",))
    eps: float = 1e-8
    seed: int = 0
    compile: bool = False
    log_details: bool = option(False, "record how much of the gradient a subspace misses, how far its basis has "
        "turned and what it costs, for one matrix per update in turn", section=PROJECTION, needs=("projected",),
        may_change=True)


# fmt: on


GROUP_OPTIONS: dict[str, Declared] = {
    each.name: each for holder in (ProjectionOptions, GroupOptions) for each in declared(holder)
}
_DEFAULTS = {name: each.default for name, each in GROUP_OPTIONS.items()} | {"rank": None}
# Keys that torch, its schedulers or `create_optimizer` put into groups. An update does not use them.
_PASSIVE = ("params", "param_names", "name", "betas", "lr_ratio", "peak_lr", "initial_lr", "foreach", "fused")
# Options of the reference packages' groups and of torch's optimizers that would change an update, each with the only
# value that is supported.
_REFUSED = {
    "maximize": False,
    "amsgrad": False,
    "capturable": False,
    "differentiable": False,
    "dim": 2,
    "saddle": False,
}


def complete_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group with every option set and checked.

    Raises ValueError for an unknown key, a value out of range, and options that exclude each other. Warns if the rank
    is above the shorter side of some matrices.
    """
    group = _understood(group)
    for name in group:
        if name not in GROUP_OPTIONS and name not in _PASSIVE:
            raise ValueError(_unknown(name))
    group = _DEFAULTS | group
    for name, each in GROUP_OPTIONS.items():
        if problem := each.option.problem(group[name]):
            raise ValueError(f"{name} = {group[name]} is out of range: it {problem}")
    group["betas"] = tuple(group.get("betas") or RULES[group["rule"]].betas)
    if any(DECAY_RATE.fits(beta) is False for beta in group["betas"]):
        raise ValueError(f"betas = {group['betas']} is out of range: each {DECAY_RATE.words}")
    group.setdefault("peak_lr", group["lr"])  # a learning basis follows lr / peak_lr
    if any(p.is_complex() for p in group["params"]):
        raise ValueError("complex parameters are not supported: torch.view_as_real gives a real view of one")
    if RULES[group["rule"]].matrices_only and any(p.ndim != 2 for p in group["params"]):
        raise ValueError(f"a group with the rule {group['rule']} may hold matrices only")
    _check_feedback(group)
    _check_projection(group)
    if SKIPS[group["skip_updates"]].remembers and not has_momentum(group["rule"]):
        raise ValueError(
            f"skip_updates '{group['skip_updates']}' compares each gradient with a momentum of its size, which the "
            f"rule {group['rule']} does not keep"
        )
    return group


def has_momentum(rule: str) -> bool:
    """Whether the first moment of a rule averages gradients, or directions, and is of their size."""
    shape = torch.Size((4, 4))
    kinds = RULES[rule].moments(shape)
    return bool(kinds) and kinds[0].signed and kinds[0].shape == shape


def learner_group(*, rule: str, state_bits: int, eps: float) -> dict[str, Any]:
    """The group of a basis that learns by this rule. Every update sets its learning rate."""
    return complete_group({"params": (), "rule": rule, "state_bits": state_bits, "eps": eps})


def _understood(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group in the names of this package: the references' `quant` keys say how bases are packed.

    Raises ValueError for an option that is not supported.
    """
    found = dict(group)
    quant, bits = found.pop("quant", found.pop("proj_quant", None)), found.pop("quant_n_bit", None)
    if quant or (quant is None and bits is not None):
        found["proj_bits"] = 4 if bits is None else bits
    if "quant_group_size" in found:
        found["proj_group_size"] = found.pop("quant_group_size")
    for name, only in _REFUSED.items():
        if found.pop(name, None) not in (None, only):
            raise ValueError(f"the option '{name}' of a parameter group is not supported: only {only!r} is possible")
    return found


def _unknown(name: str) -> str:
    return unknown_option(name, of="a parameter group", known=[*GROUP_OPTIONS, "betas"])


def unknown_option(name: str, *, of: str, known: Sequence[str]) -> str:
    """What to say of an option that is not known, with the one that may have been meant."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"unknown option '{name}' of {of}. {hint}Known: {', '.join(known)}."


def _check_feedback(group: dict[str, Any]) -> None:
    if group["error_feedback"] == "none":
        return
    if RULES[group["rule"]].absorb is None or group["rank"] is not None or not group["betas"][0]:
        raise ValueError(
            f"error_feedback = {group['error_feedback']} needs Adam's rule with beta1 above 0, and no rank: "
            "a projected moment has no room for the rounding error of a whole weight"
        )
    if group["skip_updates"] != "none":
        raise ValueError("error_feedback and skip_updates exclude each other: a share of 0 would divide by zero")


def _check_projection(group: dict[str, Any]) -> None:
    if group["rank"] is None:
        return
    if not group["decoupled"]:
        raise ValueError("weight decay is decoupled wherever gradients are projected: leave out `decoupled`")
    if group["lift"] == "fira" and (group["rule"] not in ("adam", "muon") or group["proj_type"] == "full"):
        raise ValueError("the residual is recovered with Adam's or Muon's rule and one projected side only")
    if METHODS[group["subspace"]].averages and group["proj_type"] == "full":
        raise ValueError(f"the subspace '{group['subspace']}' has one projected side: leave out the proj_type 'full'")
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
