"""Each rule at full rank, for twenty updates, beside torch's own or the paper's equations."""

import copy
import math

import pytest
import torch

from qgalore.low_rank_optimizer import LowRankOptimizer
from qgalore.update_rules import RULES

SHAPES = [(12, 20), (20, 12), (16,), (2, 3, 4)]


def lion(grads, *, lr, weight_decay, beta1=0.9, beta2=0.99):
    """Chen et al. 2023, algorithm 2, from zero."""
    w = m = torch.zeros_like(grads[0])
    for g in grads:
        direction = torch.sign(beta1 * m + (1 - beta1) * g)
        w = w - lr * (direction + weight_decay * w)
        m = beta2 * m + (1 - beta2) * g
    return w


def adafactor(grads, *, lr, weight_decay, beta1=0.9):
    """Shazeer and Stern 2018, algorithm 4 for matrices and 5 for the rest, with a given step size instead of a relative
    one; the first moment averages the clipped updates, with Adam's bias correction."""
    w = m = torch.zeros_like(grads[0])
    rows = columns = v = 0.0
    for t, g in enumerate(grads, start=1):
        beta2 = 1 - t**-0.8
        squares = g**2 + 1e-30
        rows = beta2 * rows + (1 - beta2) * squares.sum(-1)
        columns = beta2 * columns + (1 - beta2) * squares.sum(-2) if g.ndim == 2 else None
        v = beta2 * v + (1 - beta2) * squares
        estimate = torch.outer(rows, columns) / rows.sum() if g.ndim == 2 else v
        u = g / estimate.sqrt()
        u = u / max(1.0, math.sqrt((u**2).mean()))
        m = beta1 * m + (1 - beta1) * u
        w = w - lr * (m / (1 - beta1**t) + weight_decay * w)
    return w


def sgd(grads, *, lr, weight_decay):
    w = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = torch.optim.SGD([w], lr=lr, momentum=0.9)
    for g in grads:
        with torch.no_grad():
            w *= 1 - lr * weight_decay
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule, oracle", [("lion", lion), ("adafactor", adafactor), ("sgd", sgd)])
def test_at_full_rank_it_is_the_papers(rule, oracle, shape):
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(20)]
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = LowRankOptimizer([{"params": [p], "rule": rule}], lr=0.02, weight_decay=0.1)
    for step, g in enumerate(grads):
        if step == 9:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = LowRankOptimizer([{"params": [p], "rule": rule}], lr=0.02, weight_decay=0.1)
            optimizer.load_state_dict(saved)
        p.grad = g.clone()
        optimizer.step()
    assert torch.allclose(p, oracle(grads, lr=0.02, weight_decay=0.1), atol=1e-12)


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


@pytest.mark.parametrize("rule", RULES)
def test_moments_in_8_bits_give_nearly_the_same_weights(rule):
    """Momentum rounds to 8 bits, factored second moments stay float32; directions agree but for rounding."""
    grads = [torch.randn(64, 80) + 0.5 for _ in range(10)]
    found = []
    for bits in (32, 8):
        p = torch.nn.Parameter(torch.zeros(64, 80))
        optimizer = LowRankOptimizer([{"params": [p], "rule": rule, "state_bits": bits}], lr=0.01)
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
        assert ("exp_avg.codes" in optimizer.state[p]) == (bits == 8)
        found.append(p.detach())
    exact, rounded = found
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
