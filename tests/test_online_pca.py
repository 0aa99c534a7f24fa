"""Bases that learn: their gradient against autograd, and what they capture of a subspace that turns."""

import math

import pytest
import torch
from support.bad_gradients import end_badly

from qgalore.optimizer import LowRankOptimizer
from qgalore.subspace.bases import orthonormalize
from qgalore.subspace.online_pca import pca_gradient
from qgalore.subspace.projector import LEARNERS

RANK = 4


@pytest.mark.parametrize("reg", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_gradient_is_autograds(shape, reg):
    """For a basis that is not orthonormal, through the (n, n) projector that the closed form never builds."""
    G = 7 * torch.randn(shape, dtype=torch.float64)
    P = torch.randn(shape[1], RANK, dtype=torch.float64, requires_grad=True)
    unit = G / G.norm()
    gram = P.T @ P
    loss = (unit - unit @ P @ P.T).square().sum() + reg * (gram - torch.eye(RANK)).square().sum()
    (expected,) = torch.autograd.grad(loss, P)
    P = P.detach()
    assert (pca_gradient(G, G @ P, P, reg=reg) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("size", [1e-35, 1e-12, 1e12])
def test_the_size_of_a_gradient_does_not_matter(size):
    """But where its square is no number in float32: then it counts for little, not for too much."""
    G, P = torch.randn(20, 12), orthonormalize(torch.randn(12, RANK))
    expected = pca_gradient(G, G @ P, P, reg=0.0)
    found = pca_gradient(G * size, G * size @ P, P, reg=0.0)
    assert found.norm() < 1e-9 if size < 1e-18 else torch.allclose(found, expected, atol=1e-5)


def turning_gradients(shape: tuple[int, int], updates: int) -> list[torch.Tensor]:
    """Four directions on each side and little noise; the right ones turn by 0.003 radians or so an update."""
    m, n = shape
    U = orthonormalize(torch.randn(m, RANK, dtype=torch.float64))
    V = orthonormalize(torch.randn(n, RANK, dtype=torch.float64))
    A = torch.randn(n, n, dtype=torch.float64) / math.sqrt(2 * n)
    turn = torch.linalg.matrix_exp(0.003 * (A - A.T))
    found = []
    for _ in range(updates):
        V = turn @ V
        noise = 0.02 * torch.randn(shape, dtype=torch.float64) / math.sqrt(max(shape))
        found.append((U * torch.linspace(1.5, 1, RANK, dtype=torch.float64)) @ V.T + noise)
    return found


def captured(gradients: list[torch.Tensor], **settings) -> list[float]:
    """The share of the best rank-4 energy of each gradient that the basis holds after the update with it."""
    p = torch.nn.Parameter(torch.zeros(gradients[0].shape))
    optimizer = LowRankOptimizer([{"params": [p], "rank": RANK, "update_proj_gap": 200, **settings}])
    shares = []
    for G in gradients:
        p.grad = G.float()
        optimizer.step()
        projector, (side,) = optimizer.updates[p].projector, optimizer.updates[p].projector.sides
        P = orthonormalize(projector.open(optimizer.state[p])[side].read(torch.float64))
        held = (G @ P if side == "right" else G.T @ P).square().sum()
        shares.append((held / torch.linalg.svdvals(G)[:RANK].square().sum()).item())
    return shares


TRACKERS = [dict(proj_type="std", update_proj_gap=10)] + [
    dict(proj_type=name, proj_lr=0.05 if name.endswith("sgd") else 0.005) for name in LEARNERS
]


@pytest.mark.parametrize("settings", TRACKERS, ids=lambda settings: settings["proj_type"])
def test_a_subspace_that_turns_slowly_is_followed(settings):
    """A basis that stays where it was loses 15% on the way; a random one never has more than its share by chance."""
    gradients = turning_gradients((48, 32), 150)
    assert min(captured(gradients, **settings)[50:]) > 0.98
    assert captured(gradients, proj_type="continuous", proj_lr=0.0)[-1] < 0.9


def test_a_random_basis_does_not_follow():
    assert max(captured(turning_gradients((48, 32), 60), proj_type="random", update_proj_gap=10)) < 0.5


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_a_basis_in_4_bits_learns_in_steps_smaller_than_its_grid(shape):
    """Rounded stochastically. To nearest, or left alone, it would stay where it was."""
    gradients = [G if shape == (48, 32) else G.T for G in turning_gradients((48, 32), 150)]
    learning = captured(gradients, proj_type="continuous", proj_lr=0.005, proj_bits=4)
    still = captured(gradients, proj_type="continuous", proj_lr=0.0, proj_bits=4)
    assert min(learning[50:]) > 0.97 and still[-1] < 0.9


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", LEARNERS)
def test_nothing_is_learnt_from_a_gradient_that_is_not_finite(name, bad):
    """Nor from one whose norm is no float32: basis, moments and counts stay, to the last bit."""
    p = torch.nn.Parameter(torch.zeros(24, 20))
    optimizer = LowRankOptimizer([{"params": [p], "rank": RANK, "proj_type": name}])
    before, outcome = end_badly(optimizer, p, updates=4, bad=bad)
    assert outcome.bad == (p,)
    after = optimizer.state[p]
    assert after.keys() == before.keys() and all(torch.equal(torch.as_tensor(after[key]), before[key]) for key in after)


def test_the_step_follows_the_schedule_of_the_learning_rate():
    """Half the learning rate, half the way; the first basis is not touched by the gradient that it came from."""
    G, later = torch.randn(24, 20), torch.randn(24, 20)
    ways = []
    for ratio in (1.0, 0.5):
        p = torch.nn.Parameter(torch.zeros(24, 20))
        group = {"params": [p], "rank": RANK, "proj_type": "continuous_lion", "update_proj_gap": 50, "subspace": "svd"}
        optimizer = LowRankOptimizer([group], lr=0.3)
        optimizer.param_groups[0]["lr"] = 0.3 * ratio
        p.grad = G.clone()
        optimizer.step()
        first = optimizer.state[p]["right"].clone()
        leading = torch.linalg.svd(G).Vh[:RANK].T
        assert (first.T @ leading).square().sum().item() == pytest.approx(RANK, rel=1e-4)
        p.grad = later.clone()
        optimizer.step()
        ways.append(optimizer.state[p]["right"] - first)
    assert torch.allclose(ways[0].abs(), torch.tensor(1 / 50), rtol=1e-4)
    assert torch.allclose(ways[1], ways[0] / 2, atol=1e-6)
