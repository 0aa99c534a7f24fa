"""What the projection leaves out, brought back: beside the paper's equations, and what it costs."""

import copy

import pytest
import torch
from support.gradients import gradients, largest_difference, parameters
from support.memory import LiveBytes
from support.oracles import Adam

from qgalore.optimizer import LowRankOptimizer

RANK, LR, SCALE = 3, 0.02, 0.25


class Fira:
    """Chen et al. 2024, algorithm 1, for one matrix, with a basis from the first gradient's SVD."""

    def __init__(self, W):
        self.W, self.wide, self.adam, self.P, self.last = W.clone(), W.shape[0] < W.shape[1], Adam(), None, None

    def update(self, G, *, clip):
        """clip: the largest norm of R, which the paper does not know; where it bites, G is made smaller before."""
        G = G.T if self.wide else G
        if self.P is None:
            self.P = torch.linalg.svd(G).Vh[:RANK].T
        G = G * min(1.0, clip / ((G @ self.P).norm().item() + 1e-6)) if clip else G
        R = G @ self.P
        D = self.adam.step(R)
        phi = torch.stack([d.norm() / r.norm() for d, r in zip(D, R, strict=True)])
        S = phi[:, None] * (G - R @ self.P.T)
        if self.last is not None and S.norm() / self.last > 1.01:
            S = S / S.norm() * 1.01 * self.last
        self.last = S.norm()
        U = D @ self.P.T + S
        self.W = self.W - LR * SCALE * (U.T if self.wide else U)


def optimizer_of(ours, **settings):
    group = {"params": ours, "rank": RANK, "scale": SCALE, "lift": "fira", "update_proj_gap": 1000}
    return LowRankOptimizer([group | settings], lr=LR)


@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_it_is_the_papers(dtype, tolerance, clip):
    """Thirty updates of a wide, a tall and a square matrix; the limiter bites now and then."""
    start = parameters()
    ours = [torch.nn.Parameter(p.detach().to(dtype)) for p in start]
    optimizer, oracles = optimizer_of(ours, subspace="svd", clip=clip), [Fira(p.detach()) for p in start]
    limited = 0
    for grads in gradients(30):
        for p, oracle, G in zip(ours, oracles, grads, strict=True):
            p.grad, before = G.to(dtype), oracle.last
            oracle.update(G, clip=clip)
            limited += bool(before is not None and oracle.last > 1.00999 * before)
        optimizer.step()
    assert largest_difference(ours, [oracle.W for oracle in oracles]) < tolerance
    assert limited > 10
    for p, oracle in zip(ours, oracles, strict=True):
        assert optimizer.state[p]["residual_norm"].item() == pytest.approx(oracle.last.item(), rel=1e-4)


def test_at_full_rank_nothing_is_left_to_recover():
    found = []
    for residual in ("none", "fira"):
        torch.manual_seed(1)
        ours = parameters(shapes=[(6, 20), (20, 6)])
        optimizer = optimizer_of(ours, rank=6, lift=residual)
        for grads in gradients(5, shapes=[(6, 20), (20, 6)]):
            for p, G in zip(ours, grads, strict=True):
                p.grad = G
            optimizer.step()
        found.append(ours)
    assert largest_difference(*found) < 1e-10


def test_a_matrix_without_gradient_at_first_is_not_held_back_later():
    """Growth by 1% from nothing would be nothing for ever. And a row of R that is zero divides nothing by zero."""
    (p,) = parameters(shapes=[(20, 12)])
    optimizer = optimizer_of([p])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state[p]["residual_norm"] == 0
    p.grad = torch.randn_like(p)
    p.grad[3] = 0
    before = p.detach().clone()
    optimizer.step()
    moved = (p - before).abs()
    assert optimizer.state[p]["residual_norm"] > 1 and moved[3].max() == 0 and moved.isfinite().all()
    assert torch.linalg.matrix_rank(p.detach() - before) > RANK


def test_a_gradient_that_is_not_finite_leaves_the_limiter_alone():
    (p,) = parameters(shapes=[(20, 12)], dtype=torch.float32)
    optimizer = optimizer_of([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.end_update()
    kept = copy.deepcopy(optimizer.state[p])
    p.grad[2, 3] = float("nan")
    optimizer.step()
    assert optimizer.end_update().bad == (p,)
    assert torch.equal(optimizer.state[p]["residual_norm"], kept["residual_norm"]) and kept["residual_norm"] > 0


def test_it_needs_no_more_memory_at_its_peak_than_the_update_without():
    """One scalar is kept. For a moment there is what is left out, but never beside the update itself."""
    peaks = {}
    for residual in ("none", "fira"):
        p = torch.nn.Parameter(torch.zeros(512, 256))
        optimizer = optimizer_of([p], lift=residual)
        for _ in range(2):
            p.grad = torch.randn_like(p)
            with LiveBytes(p.detach(), p.grad) as watch:
                optimizer.step()
        peaks[residual] = watch.peak
        kept = {key: value.numel() for key, value in optimizer.state[p].items() if torch.is_tensor(value)}
        assert kept.pop("residual_norm", None) == (1 if residual == "fira" else None)
        assert kept == {"right": 256 * RANK, "exp_avg": 512 * RANK, "exp_avg_sq": 512 * RANK}
    assert peaks["fira"] < peaks["none"] + 0.1 * 4 * 512 * 256


@pytest.mark.parametrize("settings", [dict(rule="lion"), dict(proj_type="full")], ids=str)
def test_what_it_cannot_do_is_refused(settings):
    with pytest.raises(ValueError, match="Adam's or Muon's rule and one projected side"):
        optimizer_of(parameters(), **settings)
