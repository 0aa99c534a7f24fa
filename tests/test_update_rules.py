"""Each rule at full rank beside its paper's equations."""

import copy
import math

import pytest
import torch
from support.oracles import ORACLES

from qgalore.optimizer import LowRankOptimizer
from qgalore.rules.rules import RULES

SHAPES = [(12, 20), (20, 12), (16,), (2, 3, 4)]
WIDE = torch.Size((128, 256))  # foam3 keeps an eighth of it: still enough elements for 8 bits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", ORACLES)  # tests/test_methods.py has the others
def test_at_full_rank_it_is_the_papers(rule, shape):
    """Twenty updates, saved and loaded in the middle."""
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(20)]
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = LowRankOptimizer([{"params": [p], "rule": rule}], lr=0.02, weight_decay=0.1)
    oracle, w = ORACLES[rule](), torch.zeros(shape, dtype=torch.float64)
    for step, g in enumerate(grads):
        w = w - 0.02 * (oracle.finish(oracle.step(g)) + 0.1 * w)
        if step == 9:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = LowRankOptimizer([{"params": [p], "rule": rule}], lr=0.02, weight_decay=0.1)
            optimizer.load_state_dict(saved)
        p.grad = g.clone()
        optimizer.step()
    assert torch.allclose(p, w, atol=1e-12)


def test_sgd_is_torchs():
    ours, theirs = (torch.nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2))
    optimizer = LowRankOptimizer([{"params": [ours], "rule": "sgd"}], lr=0.02)
    twin = torch.optim.SGD([theirs], lr=0.02, momentum=0.9)
    for _ in range(20):
        ours.grad = torch.randn(5, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        optimizer.step(), twin.step()
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("shape, names", [
    ((12, 20), {"exp_avg": (12, 20), "exp_avg_sq_row": (12,), "exp_avg_sq_col": (20,)}),
    ((16,), {"exp_avg": (16,), "exp_avg_sq": (16,)}),
])  # fmt: skip
def test_adafactor_keeps_a_second_moment_for_each_row_and_column(shape, names):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    optimizer = LowRankOptimizer([{"params": [p], "rule": "adafactor"}])
    optimizer.step()
    kept = {key: tuple(value.shape) for key, value in optimizer.state[p].items() if torch.is_tensor(value)}
    assert kept == names


def test_adafactor_survives_rows_and_columns_without_gradient():
    p = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = LowRankOptimizer([{"params": [p], "rule": "adafactor"}], lr=0.1)
    for _ in range(3):
        p.grad = torch.zeros(4, 6)
        p.grad[1, 2] = 3.0
        optimizer.step()
    moved = p.detach() != 0
    assert moved.nonzero().tolist() == [[1, 2]] and p.isfinite().all()
    assert -p[1, 2].item() <= 3 * 0.1 * math.sqrt(24) * 1.001, "clipped: the root mean square of all is at most lr"


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.moments(WIDE)])
def test_moments_in_8_bits_give_nearly_the_same_weights(rule):
    """Momentum rounds to 8 bits, factored second moments stay float32; directions agree but for rounding."""
    grads = [torch.randn(WIDE) + 0.5 for _ in range(10)]
    found = []
    for bits in (32, 8):
        p = torch.nn.Parameter(torch.zeros(WIDE))
        optimizer = LowRankOptimizer([{"params": [p], "rule": rule, "state_bits": bits}], lr=0.01)
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
        assert ("exp_avg.codes" in optimizer.state[p]) == (bits == 8)
        found.append(p.detach())
    exact, rounded = found
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
