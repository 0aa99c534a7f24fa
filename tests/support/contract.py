"""Optimizers of every name over one small model, and torch's AdamW as the control: what it passes, all must pass."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from qgalore.factory import OPTIMIZERS, Settings, create_optimizer
from qgalore.param_groups import split_parameters
from qgalore.storage.convert import quantize_linear_layers
from support.models import Model, batches, loss_of

CONTROL = "control"
NAMES = [CONTROL, *OPTIMIZERS]
every_optimizer = pytest.mark.parametrize("name", NAMES)
every_one_of_ours = pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS[name].low_rank_engine])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def model_of(*, dtype: torch.dtype = torch.float32, bits: int | None = None, width: int = 72) -> Model:
    """The model; with its two matrices quantized to `bits`."""
    model = Model(width).to(dtype)
    if bits:
        quantize_linear_layers(model, select=lambda name: "mlp" in name, bits=bits, group_size=36)
    return model


def optimizer_of(name: str, model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    """The optimizer of that name, set so that a handful of updates meets a refresh."""
    chosen = {"lr": 0.01, "weight_decay": 0.1, "rank": 4, "update_proj_gap": 3, **settings}
    if name == CONTROL:
        return torch.optim.AdamW(model.parameters(), lr=chosen["lr"], weight_decay=chosen["weight_decay"])
    return create_optimizer(name, groups=split_parameters(model), settings=Settings(**chosen))


def data_of(count: int, *, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return batches(count)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    """One update for each batch, by the loop that everybody writes. Returns the losses."""
    losses = []
    for batch in data:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain(value: object) -> Iterator[Tensor]:
    """The plain tensors inside of a parameter, a state or a dict of them."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from plain(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from plain(item)
    elif torch.is_tensor(value) and hasattr(value, "stored"):
        yield from plain(value.stored().parts)
    elif torch.is_tensor(value):
        yield value.detach()


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of what the parameters are made of."""
    return [tensor.clone() for tensor in plain(list(model.parameters()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """To the last bit."""
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))
