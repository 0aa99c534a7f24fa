import pytest
import torch
from support.ranks import run_distributed

from qgalore.optimizer import LowRankOptimizer
from qgalore.sync import GradSync


def train(*, rank: int, ranks: int, at_rank_size: bool) -> dict[str, torch.Tensor]:
    """Twelve updates of a projected matrix and a vector; each rank holds its share of every gradient."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.zeros(10, 14)), torch.nn.Parameter(torch.zeros(14))
    sync = GradSync(at_rank_size=at_rank_size)
    sent: list[int] = []
    original = sync.reduce
    sync.reduce = lambda t: (sent.append(t.numel()) if sync.at_rank_size else None) or original(t)
    groups = [{"params": [matrix], "rank": 3, "update_proj_gap": 4}, {"params": [vector]}]
    optimizer = LowRankOptimizer(groups, lr=0.05, sync=sync)
    for _ in range(12):
        shares = torch.randn(4, 10, 14, generator=generator), torch.randn(4, 14, generator=generator)
        matrix.grad, vector.grad = (share[rank::ranks].sum(0) for share in shares)
        sync.reduce_whole([matrix.grad, vector.grad])
        optimizer.step()
    return {"matrix": matrix.detach(), "vector": vector.detach(), "sent": torch.tensor(sent)}


def on_a_rank(at_rank_size: bool) -> dict[str, torch.Tensor]:
    group = torch.distributed
    return train(rank=group.get_rank(), ranks=group.get_world_size(), at_rank_size=at_rank_size)


@pytest.mark.parametrize("at_rank_size", [True, False], ids=["at rank size", "whole"])
def test_two_ranks_with_half_the_gradient_each_are_one(at_rank_size):
    """Refreshes included; the two ranks agree to the last bit, and with a single process to rounding."""
    one, two = run_distributed(on_a_rank, at_rank_size)
    alone = train(rank=0, ranks=1, at_rank_size=at_rank_size)
    for name in ("matrix", "vector"):
        assert torch.equal(one[name], two[name])
        assert torch.allclose(one[name], alone[name], atol=1e-5)
    if at_rank_size:
        matrix_elements = one["sent"][::2].tolist()
        assert matrix_elements == [140 if step in (1, 5, 9) else 42 for step in range(1, 13)], "3 x 14, not 10 x 14"


def test_alone_nothing_is_sent():
    sync = GradSync()
    G = torch.randn(3)
    assert sync.reduce(G) is G and not sync.at_rank_size
