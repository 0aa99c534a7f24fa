"""Writes to a QuantizedWeight that look like those to any tensor, `w.data = x` and `w[i] = x`, and what is refused.

There is no seed to round with, so on a weight that is trained they would lose small updates for ever, and are refused.
"""

from typing import Any

import torch
from torch import Tensor

QuantizedWeight = Any  # its module imports this one

NO_DATA = "the .data of quantized weights cannot be replaced. Convert models by model.to(dtype), not by model.float()."
NO_SEED = (
    "{} would write into quantized weights without a seed to round with, and lose small updates. Compute the new "
    "values in float32 and store them by weight.write(values, seed=...)."
)


def set_data(weight: QuantizedWeight, values: Tensor) -> None:
    """`weight.data = values`, which does nothing where the values are its own after arithmetic in place.

    Raises ValueError for anything else than values of the same dtype and shape for a frozen weight.
    """
    if weight.requires_grad or values.dtype != weight.dtype or values.shape != weight.shape:
        raise ValueError(NO_DATA)
    with torch.no_grad():
        weight.copy_(values)


def set_item(weight: QuantizedWeight, index: Any, values: Any) -> None:
    """`weight[index] = values`, rounded to nearest, whatever the index: of elements there is no view to be written to.

    Groups that hold none of them stay as they are but for float32's last bit. Raises ValueError for a trained weight.
    """
    if weight.requires_grad or weight.trained:
        raise ValueError(NO_SEED.format("weight[...] = values"))
    new = weight.float()
    new[index] = values.float() if isinstance(values, Tensor) else values
    with torch.no_grad():
        weight.copy_(new)
