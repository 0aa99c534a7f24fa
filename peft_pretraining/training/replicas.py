"""Whether the ranks of a data-parallel run still hold the same model, to the last bit.

Every rank computes the same update from the same sums, so weights and states never differ, unless memory, a network or
a program is broken. A run would go on with an average of two models, and nobody would see it from the loss.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from qgalore.storage.quantized_weight import open_weight

CHUNK = 1 << 20  # bytes that are summed at once


def check_replicas(model: nn.Module, optimizer: torch.optim.Optimizer, *, world: World, update: int) -> None:
    """Compares the weights and the optimizer's state of all ranks, parameter by parameter.

    update: number of the finished update, for the message.
    Raises UserError, on every rank, with the name of the first parameter that differs.
    """
    if world.size == 1:
        return
    digests = dict(_digests(model, optimizer))
    same = world.agree(torch.stack([digest.cpu() for digest in digests.values()])).tolist()
    if different := [name for name, alike in zip(digests, same, strict=True) if not alike]:
        raise UserError(
            f"after update {update} the processes no longer hold the same model: {different[0]} differs, and "
            f"{len(different) - 1} more. Memory, network or software is broken. Go on from a checkpoint that was saved "
            "before it, with --check_replicas 1 to see where it begins."
        )


def _digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        yield name, digest(open_weight(p).tensors())
        yield f"the optimizer's state of {name}", digest(optimizer.state.get(p, {}))
    for name, buffer in model.named_buffers():
        yield name, digest({"": buffer})


def digest(values: Mapping[str, Any]) -> Tensor:
    """64 bits, as () int64, that change with any bit of a tensor, any plain number and any name. Waits for nothing."""
    plain = {name: value for name, value in values.items() if not torch.is_tensor(value)}
    total = torch.tensor(zlib.crc32(repr(sorted(plain.items())).encode()))
    for name, tensor in values.items():
        if torch.is_tensor(tensor):
            total = total.to(tensor.device) * 31 + _of_bytes(tensor) + zlib.crc32(name.encode())
    return total


def _of_bytes(tensor: Tensor) -> Tensor:
    """The bytes, each times an odd number of its own, modulo 2 ** 64. ()"""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        places = torch.arange(start, start + len(part), device=part.device)
        total += (part.long() * (places * 0x9E3779B97F4A7C2 + 1)).sum()
    return total
