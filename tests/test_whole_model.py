import copy

import pytest
import torch
from support.ranks import run_distributed
from torch import nn

from qgalore.optimizer import LowRankOptimizer
from qgalore.storage.convert import quantize_module_weight
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape)) for shape in [(10, 14), (14,)]]


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_it_is_torchs_clip_and_step(clip):
    ours = parameters()
    theirs = copy.deepcopy(ours)
    updates = WholeModelUpdates(torch.optim.AdamW(ours, lr=0.1), sync=GradSync(at_rank_size=False), clip=clip)
    twin = torch.optim.AdamW(theirs, lr=0.1)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip or float("inf"))
        twin.step()
        assert updates.finish().norm == pytest.approx(norm.item(), rel=1e-6), "the norm is that before clipping"
        assert all(p.grad is None for p in ours)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(ours, theirs, strict=True))


def test_clipping_sees_int8_weights():
    """The clipped norm, over all parameters, is exactly the limit: the INT8 weight's gradient is part of it."""
    layers = [nn.Linear(16, 8, bias=False), nn.Linear(8, 4)]
    quantize_module_weight(layers[0])
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = LowRankOptimizer(parameters, lr=0.01)
    updates = WholeModelUpdates(optimizer, sync=GradSync(), clip=0.5)
    layers[1](layers[0](100 * torch.randn(3, 16))).square().sum().backward()
    assert updates.finish().norm > 100
    seen = [optimizer.state[p]["exp_avg"] / 0.1 for p in parameters]
    assert torch.stack([R.norm() for R in seen]).norm().item() == pytest.approx(0.5, rel=1e-3)
    assert seen[0].norm() > 0.05


def norms_on_a_rank(at_rank_size: bool) -> torch.Tensor:
    """Two ranks with the same gradients: their sum is twice them."""
    torch.manual_seed(0)
    matrix, vector = parameters()
    sync = GradSync(at_rank_size=at_rank_size)
    optimizer = LowRankOptimizer([{"params": [matrix], "rank": 3}, {"params": [vector]}], lr=0.1, sync=sync)
    updates = WholeModelUpdates(optimizer, sync=optimizer.sync)
    matrix.grad, vector.grad = torch.randn(10, 14), torch.randn(14)
    whole = torch.stack([2 * matrix.grad.norm(), 2 * vector.grad.norm()]).norm()
    return torch.stack(
        [torch.tensor(updates.finish().norm), whole, updates.optimizer.state[matrix]["exp_avg"].norm() / 0.1]
    )


def test_the_norm_is_that_of_the_sum_over_the_ranks():
    for norm, whole, _ in run_distributed(norms_on_a_rank, False):
        assert norm.item() == pytest.approx(whole.item(), rel=1e-5)
    for norm, whole, projected in run_distributed(norms_on_a_rank, True):
        assert projected < norm < whole, "the matrix as projected, the vector whole"


@pytest.mark.parametrize("optimizer", ["torch's", "ours"])
def test_micro_batches_can_be_summed_in_float32_for_bfloat16_weights(optimizer):
    """Of 512 gradients of 1, a bfloat16 sum stops at 256; a float32 one is exact."""
    sums = {}
    for dtype in (None, torch.float32):
        p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
        chosen = LowRankOptimizer([p], lr=0.0) if optimizer == "ours" else torch.optim.SGD([p], lr=0.0)
        updates = WholeModelUpdates(chosen, sync=GradSync(), dtype=dtype)
        for _ in range(512):
            p.sum().backward()
        sums[dtype] = updates.finish().norm / 8
    assert sums == {None: 256, torch.float32: 512}


def test_projected_gradients_summed_in_float32_keep_bases_in_the_weights_dtype():
    """And the direction is that of the sum: the twin gets the rounded sum as one gradient."""
    torch.manual_seed(1)
    parts = [torch.randn(12, 20) for _ in range(4)]
    found = []
    for micro_batches in (parts, [torch.stack(parts).bfloat16().float().sum(0)]):
        p = torch.nn.Parameter(torch.zeros(12, 20, dtype=torch.bfloat16))
        optimizer = LowRankOptimizer([{"params": [p], "rank": 4, "subspace": "svd"}], lr=0.1)
        updates = WholeModelUpdates(optimizer, sync=GradSync(), dtype=torch.float32)
        for part in micro_batches:
            (p * part.bfloat16()).sum().backward() if len(micro_batches) > 1 else (p.float() * part).sum().backward()
        updates.finish()
        assert optimizer.state[p]["left"].dtype == torch.bfloat16
        found.append(optimizer.state[p]["exp_avg"])
    assert torch.allclose(*found, atol=2e-2)
