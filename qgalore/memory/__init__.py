"""The bytes that training keeps between updates, counted from the tensors themselves."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qgalore.sharding import local
from qgalore.storage.quantized_weight import open_weight
from qgalore.subspace.projector import is_basis

KINDS = ("weights", "scales", "bases", "moments", "accumulators")


def kept_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, accumulators: Iterable[Tensor] = ()
) -> dict[str, int]:
    """Bytes by kind, on any device, the meta device included; of a sharded model, those of this rank.

    weights: floating weights, or codes of quantized ones.
    scales: scales and zero points of quantized weights.
    bases: bases with their scales.
    moments: moments with their block maxima, those of bases that learn, and float32 master weights.
    accumulators: sums over micro-batches.
    Gradients and activations are not kept between updates and do not count.
    """
    kept: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for p in model.parameters():
        for kind, size in _weight_bytes(p):
            kept[kind] += size
    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value):
                kept[state_kind(name)] += local(value).nbytes
    kept["accumulators"] = sum(tensor.nbytes for tensor in accumulators)
    return dict(kept)


def weight_kind(part: str) -> str:
    """The kind of a part of a weight, see Stored."""
    return "weights" if part in ("", "codes", "values") else "scales"


def state_kind(name: str) -> str:
    """The kind of an entry of a parameter's state."""
    return "bases" if is_basis(name) else "moments"


def _weight_bytes(p: Tensor) -> list[tuple[str, int]]:
    return [(weight_kind(part), tensor.nbytes) for part, tensor in open_weight(p).tensors().items()]


def adamw_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that AdamW would keep for the same model: weights and two moments, in the dtype of the weights."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return dict.fromkeys(KINDS, 0) | {"weights": weights, "moments": 2 * weights}
