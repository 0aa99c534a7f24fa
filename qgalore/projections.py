"""How each parameter of an optimizer is projected: side, rank, source of its bases, and the turn of its refreshes."""

from typing import Any

import torch
from torch import Tensor

from qgalore.rules.moments import moment_codec
from qgalore.rules.rules import RULES
from qgalore.rules.skips import SKIPS
from qgalore.sharding import Shard, shard_of
from qgalore.storage.blockwise import BLOCK, Blockwise, row_multiple
from qgalore.storage.rounding import mix_seed
from qgalore.subspace.projector import LEARNERS, SMALLEST, Projector, projection_sides
from qgalore.subspace.schedule import RefreshSchedule, staggered_offset


def make_projectors(pairs: list[tuple[Tensor, dict[str, Any]]], *, seed: int) -> dict[Tensor, Projector]:
    """A projector for every parameter. Refreshes are staggered over all the projected ones.

    pairs: the parameters of an optimizer in their order, each with its group.
    Raises ValueError for a sharded parameter that cannot be updated by the rows.
    """
    turns = {p: turn for turn, p in enumerate(p for p, group in pairs if group["rank"])}
    return {
        p: _make_projector(p, group, seed=mix_seed(seed, index), turn=turns.get(p, 0), count=len(turns))
        for index, (p, group) in enumerate(pairs)
    }


def _make_projector(p: Tensor, group: dict[str, Any], *, seed: int, turn: int, count: int) -> Projector:
    """The projector of a parameter, which is number `turn` of the `count` projected ones, or the identity.

    Raises ValueError for a sharded parameter that cannot be updated by the rows.
    """
    shard = shard_of(p)
    shape = p.shape if shard is None else shard.shape
    if not group["rank"]:
        projector = Projector(shape, p.dtype)
        _check_shard(shard, projector, group)
        return projector
    gap, random = group["update_proj_gap"], group["proj_type"] == "random"
    schedule = RefreshSchedule(
        gap=gap,
        offset=staggered_offset(turn, count=count, gap=gap),
        threshold=None if random else group["cos_threshold"],
        growth=group["gamma_proj"],
        queue_size=group["queue_size"],
    )

    def facing(proj_type: str) -> Projector:
        return Projector(
            shape,
            p.dtype,
            sides=projection_sides(p.shape, proj_type=proj_type),
            rank=min(group["rank"], *p.shape),
            method="random" if random else group["subspace"],
            learns=proj_type in LEARNERS,
            schedule=schedule,
            seed=seed,
            bits=group["proj_bits"],
            group_size=group["proj_group_size"],
        )

    if shard is not None:
        projector = facing("right" if random or group["proj_type"] == SMALLEST else group["proj_type"])
        _check_shard(shard, projector, group)
        return projector
    if group["proj_type"] == SMALLEST:
        return min(facing("std"), facing("reverse_std"), key=lambda projector: _state_bytes(projector, group))
    return facing(group["proj_type"])


def _check_shard(shard: Shard | None, projector: Projector, group: dict[str, Any]) -> None:
    """Raises ValueError for what needs more than the rows of one rank."""
    if shard is None:
        return
    rule, what = RULES[group["rule"]], f"a parameter of shape {tuple(shard.whole)} that is sharded over its rows"
    if rule.separable is None:
        raise ValueError(f"{what} cannot be updated by the rule {group['rule']}, which needs all of them")
    if group["lift"] != "none":
        raise ValueError(f"{what} cannot be updated with the lift {group['lift']}, which needs norms of all rows")
    if SKIPS[group["skip_updates"]].remembers:
        skips = group["skip_updates"]
        raise ValueError(f"{what} cannot be updated with skip_updates '{skips}', which compares all rows")
    if projector.learns:
        raise ValueError(f"{what} cannot have a basis that learns (proj_type {group['proj_type']})")
    if projector.averages:
        raise ValueError(f"{what} cannot have bases from an average of its gradients (subspace {group['subspace']})")
    if projector.sides not in ((), ("right",)):
        raise ValueError(f"{what} can be projected on the right only: proj_type 'right', not '{group['proj_type']}'")
    for kind in rule.moments(projector.projected_shape):
        whole = kind._replace(shape=torch.Size((shard.whole[0], *kind.shape[1:])))
        codec, width = moment_codec(whole, bits=group["state_bits"], dtype=projector.wide), kind.shape[1:].numel()
        if isinstance(codec, Blockwise) and -(-shard.whole[0] // shard.group.size()) % row_multiple(width):
            raise ValueError(
                f"{what} over {shard.group.size()} ranks has blocks of moments on two of them: the rows of a rank "
                f"times {width} must be a multiple of {BLOCK}. Moments in 32 bits have no blocks"
            )


def _state_bytes(projector: Projector, group: dict[str, Any]) -> int:
    """The bytes of bases and moments of a parameter with this projector."""
    specs = [projector.codec.spec(projector.basis_shape(side)) for side in projector.sides]
    for kind in RULES[group["rule"]].moments(projector.projected_shape):
        specs.append(moment_codec(kind, bits=group["state_bits"], dtype=projector.wide).spec(kind.shape))
    return sum(shape.numel() * dtype.itemsize for spec in specs for shape, dtype in spec.values())
