"""Under torch's own data parallelism, which sums gradients or cuts the states up itself."""

import copy

import pytest
import torch
from support.contract import data_of, model_of, optimizer_of, train, weights
from support.models import loss_of
from support.ranks import run_distributed
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from qgalore.optimizer import LowRankOptimizer

NAMES = ["control", "galore_adamw", "q_galore_adamw8bit", "muon"]
UPDATES = 4


def halves(batch, rank):
    return tuple(tensor.chunk(2)[rank] for tensor in batch)


def under_ddp(name):
    """The loop of torch's tutorial. Model and data are those of the process that is alone."""
    torch.manual_seed(0)
    model = model_of()
    wrapped = DistributedDataParallel(model)
    optimizer = optimizer_of(name, model)
    for batch in data_of(UPDATES):
        loss_of(wrapped, halves(batch, torch.distributed.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def under_zero():
    """Each rank keeps the states of half of the parameters."""
    torch.manual_seed(0)
    model = model_of()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=LowRankOptimizer, lr=0.01)
    for batch in data_of(UPDATES):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = sum(len(state) > 0 for state in optimizer.optim.state.values())
    return weights(model), kept


def both():
    return {name: under_ddp(name) for name in NAMES} | {"zero": under_zero()}


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(both)


def alone(name):
    torch.manual_seed(0)
    model = model_of()
    train(model, optimizer_of(name, model), data_of(UPDATES))
    return weights(model)


@pytest.mark.parametrize("name", NAMES)
def test_ddp_sums_once(name, ranks):
    """Two ranks with half of each batch make the updates of one process; `step` sends nothing by itself."""
    for one, two, single in zip(*(rank[name] for rank in ranks), alone(name), strict=True):
        assert torch.equal(one, two)
        if name != "q_galore_adamw8bit":  # whose rounded moments and bases magnify the last bit of a mean
            assert torch.allclose(one, single, atol=1e-4)


def test_zero_keeps_each_state_on_one_rank(ranks):
    torch.manual_seed(0)
    model = model_of()
    count = len(list(model.parameters()))
    train(model, LowRankOptimizer(copy.copy(list(model.parameters())), lr=0.01), data_of(UPDATES))
    kept = [rank["zero"][1] for rank in ranks]
    assert sum(kept) == count and all(kept)
    for rank in ranks:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(rank["zero"][0], weights(model), strict=True))
