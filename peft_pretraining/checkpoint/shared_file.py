"""Safetensors files that several processes write together, each the rows of the tensors that it holds.

A tensor lies in the file row after row, so the rows of a rank are one range of bytes. The file is the same, to the last
byte, as the one that a single process with all rows would write: any number of ranks can read it, and every tool. The
processes must see the same file system.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peft_pretraining.checkpoint.tensor_file import layout, to_bytes
from peft_pretraining.distributed import World
from qgalore.sharding import Shard


class Rows(NamedTuple):
    """The rows of a tensor that this process writes."""

    tensor: Tensor | None  # None if another process writes all of it
    start: int  # the first row
    whole: Tensor  # on the meta device, of the shape and dtype of the whole tensor


@dataclass(frozen=True)
class SharedFile:
    """The content of a safetensors file, as far as this process holds it."""

    rows: dict[str, Rows]
    metadata: dict[str, str] = field(default_factory=dict)  # texts beside the tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, over all processes."""
        return sum(rows.whole.nbytes for rows in self.rows.values())

    def create(self, path: Path) -> None:
        """Writes the header, and makes the file as long as it will be. One process does it. Raises OSError."""
        header, _, size = self._layout()
        with path.open("wb") as file:
            file.write(header)
            file.truncate(size)

    def fill(self, path: Path) -> None:
        """Writes the rows of this process. They are on the disk when this returns. Raises OSError."""
        _, places, _ = self._layout()
        with path.open("r+b") as file:
            for name, (tensor, start, whole) in self.rows.items():
                if tensor is not None and tensor.numel():
                    width = whole.shape[1:].numel() * whole.element_size()
                    file.seek(places[name] + start * width)
                    file.write(to_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())

    def _layout(self) -> tuple[memoryview, dict[str, int], int]:
        return layout({name: rows.whole for name, rows in self.rows.items()}, self.metadata)


def rows_to_write(
    tensors: Mapping[str, Tensor], *, spread: Collection[str], world: World, ranks: int
) -> dict[str, Rows]:
    """What each process writes of some tensors, which have the same names on all of them.

    spread: the names of those of which each process has other rows, in the order of the ranks. The others are the same
        everywhere, and the main process writes them.
    ranks: the number of processes that share the rows. There may be several groups of them; the first one writes.
    """
    sizes = world.gather({name: len(tensors[name]) for name in sorted(spread)})[:ranks]
    found = {}
    for name, tensor in tensors.items():
        start, shape = 0, tensor.shape
        if name in spread:
            start = sum(size[name] for size in sizes[: world.rank])
            shape = torch.Size((sum(size[name] for size in sizes), *tensor.shape[1:]))
        whole = torch.empty(shape, dtype=tensor.dtype, device="meta")
        writes = world.rank < ranks if name in spread else world.is_main
        found[name] = Rows(tensor if writes else None, start, whole)
    return found


def rows_of(tensor: Tensor, shard: Shard | None) -> Tensor:
    """The rows of a tensor that belong to a shard's rows: of a weight, a moment, or a part of one. None: all.

    Parts have a first dimension of their own, elements or blocks for example, of which equally many belong to each row.
    """
    if shard is None:
        return tensor
    count, rows, stop = len(tensor), shard.whole[0], shard.start + shard.shape[0]
    return tensor[shard.start * count // rows : count if stop == rows else stop * count // rows]
