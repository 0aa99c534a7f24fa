"""Views of a QuantizedWeight that stay in codes: what FSDP2 makes of a parameter, rows, all in one row, the whole.

Each takes torch's operation and its arguments. NotImplemented means that the codes have no such view.
"""

from typing import Any

import torch
from torch import Tensor

from qgalore.storage.stored import Stored

QuantizedWeight = Any  # its module imports this one


def share(
    func: Any, weight: QuantizedWeight, *, parts: dict[str, Tensor] | None = None, shape: torch.Size | None = None
) -> QuantizedWeight:
    """Another weight with the same parts, or with these. It is as little to be written as the first, see `trained`."""
    parts = parts or {name: func(part) for name, part in weight.stored().parts.items()}
    alias = weight._like(parts, shape=shape)
    alias.trained = weight.requires_grad or weight.trained  # `.data` of a weight that is trained is trained, too
    return alias


def rows_of(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Rows from `start` up to `stop`."""
    parts = weight.codec.rows(weight.stored().parts, slice(start, stop), width=weight.shape[1])
    return share(None, weight, parts=parts, shape=torch.Size((stop - start, weight.shape[1])))


def slice_of(
    func: Any, weight: QuantizedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    if weight.ndim != 2 or dim not in (0, -2) or step != 1:
        return NotImplemented
    start, stop, _ = slice(start, end).indices(weight.shape[0])
    return rows_of(weight, start, max(start, stop))


def split(func: Any, weight: QuantizedWeight, size: int, dim: int = 0) -> Any:
    if weight.ndim != 2 or dim not in (0, -2):
        return NotImplemented
    rows = weight.shape[0]
    return [rows_of(weight, start, min(start + size, rows)) for start in range(0, max(1, rows), max(1, size))]


def view(func: Any, weight: QuantizedWeight, size: list[int]) -> Tensor:
    if list(size) not in ([-1], [weight.numel()], list(weight.shape)):
        return NotImplemented
    shape = weight.shape if len(size) == 2 else torch.Size((weight.numel(),))
    return share(None, weight, parts=weight.stored().parts, shape=shape)


def as_strided(func: Any, weight: QuantizedWeight, size: Any, stride: Any, offset: int | None = None) -> Tensor:
    if tuple(size) != tuple(weight.shape) or tuple(stride) != tuple(weight.stride()) or offset:
        return NotImplemented
    return share(None, weight, parts=weight.stored().parts)


def new_zeros(func: Any, weight: QuantizedWeight, size: Any, **kwargs: Any) -> Tensor:
    """Rows of zeros in codes, which FSDP2 copies the rows of a rank into; of any other width, an ordinary tensor."""
    if weight.ndim != 2 or len(size) != 2 or size[1] != weight.shape[1] or kwargs.get("dtype") is not None:
        return NotImplemented
    shape = torch.Size(size)
    return weight._like(Stored.zeros(weight.codec, shape, device=weight.device).parts, shape=shape)
