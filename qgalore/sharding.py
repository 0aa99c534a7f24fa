"""Parameters of which each rank holds some rows: DTensors, as FSDP2's `fully_shard` makes them.

An update sees the rows of its own rank as if they were a parameter of their own. G_local @ Q, the rule, the way back
and the writing need nothing of the others, so a matrix is projected on the right: between refreshes an update sends
little beyond what FSDP2 itself does. What concerns all rows goes through `Shard.sum`: the sketches of a refresh,
(n, r), and the norms of the gradients. The noise of a row is what it would be in the whole.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The rows of a parameter that this rank holds."""

    whole: torch.Size  # shape of the parameter
    shape: torch.Size  # shape of the rows here
    start: int  # the first of them
    group: dist.ProcessGroup  # the ranks that share the rows

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place; the same bits on every rank."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def norm(self, norm: Tensor) -> Tensor:
        """The norm of the whole from that of the rows here. ()"""
        return self.sum(norm.double().square()).sqrt().to(norm.dtype)


def shard_of(p: Tensor) -> Shard | None:
    """The rows of p that this rank holds; None if it holds all of it.

    Raises ValueError for a DTensor that is not sharded over its rows alone.
    """
    if not is_dtensor(p):
        return None
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    over = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if not over:
        return None
    if len(over) > 1 or not placements[over[0]].is_shard(0):
        raise ValueError(f"a parameter must be sharded over its rows, as fully_shard does it, not {placements}")
    rows = -(-p.shape[0] // mesh.size(over[0]))  # of the first ranks; the last ones may have fewer
    start = min(rows * mesh.get_local_rank(over[0]), p.shape[0])
    shape = torch.Size((min(rows, p.shape[0] - start), *p.shape[1:]))
    return Shard(p.shape, shape, start, mesh.get_group(over[0]))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: of a DTensor its rows, else the tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def as_dtensor(rows: Tensor, *, like: Tensor) -> Tensor:
    """What this rank has of a tensor as a DTensor of the whole, for state dicts: spread as a sharded parameter is.

    rows: (k, ...), the same multiple of the rows that this rank has of `like`, on every rank.
    Raises ValueError if a DTensor cannot be shared out like that, as the rows of `like` do not divide evenly.
    """
    shard = shard_of(like)
    assert shard is not None
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    ranks = shard.group.size()
    if shard.whole[0] % ranks and len(rows) != shard.shape[0]:
        raise ValueError(
            f"the {shard.whole[0]} rows of a parameter of shape {tuple(shard.whole)} do not divide evenly over {ranks} "
            "ranks, so what is kept of them in few bits cannot be a DTensor"
        )
    count = shard.whole[0] if len(rows) == shard.shape[0] else len(rows) * ranks
    shape = torch.Size((count, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    kind: Any = type(like.detach())
    return kind.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor. Where nobody has imported these, there are none: the import takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
