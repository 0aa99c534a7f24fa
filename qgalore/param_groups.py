"""Groups of a model's parameters by kind: each trainable parameter is in exactly one group."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

PROJECTED_MODULES = ("attn", "mlp")
# The kinds of parameters with their names in the log. A matrix is the weight of a linear layer inside attention or MLP.
KINDS = {"matrix": "attention and MLP", "embedding": "embedding", "head": "head", "norm": "norms and others"}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one kind, in the order of the model."""

    kind: str  # of KINDS, or `frozen`
    name: str  # the kind's name in the log
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    rank_ratio: float = 1.0  # factor on the rank, where gradients are projected

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.parameters)


def split_parameters(
    model: nn.Module,
    *,
    projected_modules: Sequence[str] = PROJECTED_MODULES,
    matrices: Collection[nn.Parameter] | None = None,
) -> tuple[ParameterGroup, ...]:
    """Groups the trainable parameters by kind: attention and MLP linears, embeddings, head, norms and the rest.

    projected_modules: a linear layer is a matrix if its name contains one of these, as in the reference; else a head.
    matrices: the parameters of kind `matrix`, in place of those that `projected_modules` finds.
    A tied parameter belongs to the first module that holds it. Empty groups are left out.
    Raises ValueError if nothing is trainable.
    """
    kinds: dict[str, list[tuple[str, nn.Parameter]]] = {kind: [] for kind in KINDS}
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), module)
    named = None if matrices is None else {id(p) for p in matrices}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = _kind(name, owners[id(parameter)], parameter, projected_modules)
            if named is not None:
                kind = "matrix" if id(parameter) in named else "head" if kind == "matrix" else kind
            kinds[kind].append((name, parameter))
    groups = tuple(
        ParameterGroup(
            kind=kind,
            name=KINDS[kind],
            names=tuple(name for name, _ in members),
            parameters=tuple(parameter for _, parameter in members),
        )
        for kind, members in kinds.items()
        if members
    )
    if not groups:
        raise ValueError("the model has no trainable parameter")
    return groups


def read_ratios(text: str | None) -> dict[str, float]:
    """`q_proj=0.5,down_proj=2` as a dict; None is an empty one. Raises ValueError for anything else."""
    found = {}
    for pair in [] if text is None else text.split(","):
        name, _, value = (part.strip() for part in pair.partition("="))
        if not name or not 0 < float(value) < math.inf:
            raise ValueError(f"'{pair}' is no part of a name with a factor above 0")
        found[name] = float(value)
    return found


def split_by_rank(groups: Sequence[ParameterGroup], ratios: Mapping[str, float]) -> tuple[ParameterGroup, ...]:
    """The groups, with the matrices in one group for each rank.

    ratios: factors on the rank by parts of names. Where several parts fit a name, the last one counts.
    Raises ValueError that lists the names, if a part fits none.
    """
    names = [name for group in groups if group.kind == "matrix" for name in group.names]
    for part in ratios:
        if not any(part in name for name in names):
            kinds = sorted({".".join(name.removesuffix(".weight").split(".")[-2:]) for name in names})
            raise ValueError(f"rank_ratio: no matrix has '{part}' in its name. The matrices are {', '.join(kinds)}")
    return tuple(each for group in groups for each in (_by_ratio(group, ratios) if group.kind == "matrix" else [group]))


def _by_ratio(group: ParameterGroup, ratios: Mapping[str, float]) -> list[ParameterGroup]:
    """The matrices of a group by the factor on their rank, in the order in which factors come up."""
    members: dict[float, list[tuple[str, nn.Parameter]]] = {}
    parts: dict[float, list[str]] = {}
    for name, parameter in zip(group.names, group.parameters, strict=True):
        part = next((part for part in reversed(list(ratios)) if part in name), None)
        ratio = 1.0 if part is None else ratios[part]
        members.setdefault(ratio, []).append((name, parameter))
        own = parts.setdefault(ratio, [])
        if part is not None and part not in own:
            own.append(part)
    split = []
    for ratio, pairs in members.items():
        names, parameters = zip(*pairs, strict=True)
        title = f"{group.name}: {', '.join(parts[ratio])}" if ratio != 1 else group.name
        split.append(replace(group, name=title, names=names, parameters=parameters, rank_ratio=ratio))
    return split


def make_groups(model: nn.Module, *, rank: int, **options: Any) -> list[dict[str, Any]]:
    """Two groups of any module's trainable parameters for a LowRankOptimizer: projected matrices, and all others.

    The weights of linear layers are projected if both sides are larger than `rank`. The output layer is not projected
    (`model.get_output_embeddings()` if there is such a method, else the last linear layer), nor a weight that is tied
    to an embedding.
    rank: number of columns of each basis.
    options: options of the projected group, see options.ProjectionOptions.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    named = getattr(model, "get_output_embeddings", lambda: None)()
    kept = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    kept |= {id(layer.weight) for layer in ([named] if named is not None else linears[-1:])}
    fits = {id(layer.weight) for layer in linears if min(layer.weight.shape) > rank} - kept
    trained = [p for p in model.parameters() if p.requires_grad]
    projected = [p for p in trained if id(p) in fits]
    others = [p for p in trained if id(p) not in fits]
    groups = [{"params": projected, "rank": rank, **options}, {"params": others}]
    return [group for group in groups if group["params"]]


def frozen_parameters(model: nn.Module) -> tuple[ParameterGroup, ...]:
    """The parameters that split_parameters leaves out, as one group or none."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    group = ParameterGroup("frozen", "frozen", names=tuple(frozen), parameters=tuple(frozen.values()))
    return (group,) if frozen else ()


def _kind(name: str, owner: nn.Module, parameter: nn.Parameter, projected_modules: Sequence[str]) -> str:
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(owner, nn.Linear) and parameter.ndim == 2:
        return "matrix" if any(key in name for key in projected_modules) else "head"
    return "norm"
