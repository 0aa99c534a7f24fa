"""GaLore against torch.optim at full rank, and against an oracle in float64 written from the paper's equations."""

import contextlib
import copy
import functools
import math

import pytest
import torch
from support.gradients import SHAPES, gradients, largest_difference, parameters
from support.oracles import Adam, GaLore

from qgalore.optimizer import LowRankOptimizer
from qgalore.rules.moments import MOMENT_POLICIES
from qgalore.subspace.projector import SIDE_TYPES


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_without_a_rank_it_is_adamw(betas):
    """Any shape, twenty updates, saved and loaded in the middle."""
    ours = parameters(shapes=[(5,), (4, 6), (2, 3, 4)])
    theirs = copy.deepcopy(ours)
    options = dict(lr=0.02, betas=betas, weight_decay=0.1)
    optimizer, twin = LowRankOptimizer(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
        if step == 9:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = LowRankOptimizer(ours, **options)
            optimizer.load_state_dict(saved)
    assert largest_difference(ours, theirs) < 1e-10


@pytest.mark.parametrize("subspace", ["iterate", "svd"])
@pytest.mark.parametrize("proj_type", SIDE_TYPES)
def test_with_an_identity_basis_at_full_rank_it_is_adamw(proj_type, subspace):
    """rank = min(m, n) with the basis set to the identity, where the projected side is the one of that length."""
    shapes = [(12, 12)] if proj_type not in ("std",) else SHAPES
    ours = parameters(shapes=shapes)
    theirs = copy.deepcopy(ours)
    group = {"params": ours, "rank": 12 if proj_type != "std" else 16, "update_proj_gap": 1000}
    with pytest.warns(UserWarning, match="clamped") if proj_type == "std" else contextlib.nullcontext():
        optimizer = LowRankOptimizer([group | {"proj_type": proj_type, "subspace": subspace}], lr=0.02)
    twin = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.0)
    for p in ours:
        for side in optimizer.updates[p].projector.sides:
            optimizer.state[p][side] = torch.eye(min(p.shape), dtype=p.dtype)
        optimizer.state[p]["next_refresh"] = 1000
    for grads in gradients(20, shapes=shapes):
        for p, q, G in zip(ours, theirs, grads, strict=True):
            p.grad, q.grad = G.clone(), G.clone()
        optimizer.step()
        twin.step()
    assert largest_difference(ours, theirs) < 1e-10


@pytest.mark.parametrize("gap", [10, 4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("policy", MOMENT_POLICIES)
@pytest.mark.parametrize("proj_type", SIDE_TYPES)
def test_galore_is_the_papers(proj_type, policy, dtype, tolerance, gap):
    """Thirty updates of a wide, a tall and a square matrix, refreshes included, each matrix at its own time.

    With `full` R is diagonal when the bases are fresh: what is left beside the diagonal is rounding, which Adam blows
    up to full steps. A large eps keeps it out of the comparison.
    """
    ours = parameters()
    eps = 1e-2 if proj_type == "full" else 1e-8
    options = dict(rank=3, scale=0.25, proj_type=proj_type)
    oracles = [
        GaLore(
            p.detach(),
            **options,
            policy=policy,
            lr=0.02,
            weight_decay=0.1,
            rule=functools.partial(Adam, eps=eps),
            refreshes={1, *range(1 + math.ceil(gap * (i + 1) / 3), 31, gap)},
            share=gap / 10,
        )
        for i, p in enumerate(ours)
    ]
    ours = [torch.nn.Parameter(p.detach().to(dtype)) for p in ours]
    group = {"params": ours, "update_proj_gap": gap, "subspace": "svd", "moments_on_refresh": policy, **options}
    optimizer = LowRankOptimizer([group], lr=0.02, weight_decay=0.1, eps=eps)
    for grads in gradients(30):
        for p, oracle, G in zip(ours, oracles, grads, strict=True):
            p.grad = G.to(dtype)
            oracle.update(G)
        optimizer.step()
    assert largest_difference(ours, [oracle.W for oracle in oracles]) < tolerance
    assert all(optimizer.state[p]["refreshes"] == len(o.refreshes) for p, o in zip(ours, oracles, strict=True))


def test_orthogonal_iteration_comes_close_to_the_exact_subspace():
    """The same run with the two ways to a basis: what they capture of the last gradient differs by under 2%."""
    captured = {}
    for subspace in ("iterate", "svd"):
        torch.manual_seed(0)
        ours = parameters()
        optimizer = LowRankOptimizer([{"params": ours, "rank": 3, "update_proj_gap": 3, "subspace": subspace}])
        for grads in gradients(30):
            for p, G in zip(ours, grads, strict=True):
                p.grad = G.clone()
            optimizer.step()
        captured[subspace] = [optimizer.updates[p].project(p.grad).norm().item() for p in ours]
    assert captured["iterate"] == pytest.approx(captured["svd"], rel=0.02)


def test_a_group_without_rank_stands_beside_a_projected_one():
    """Norms and embeddings are plain AdamW while the matrices are projected: their state has the shape to show it."""
    matrix, vector = parameters(shapes=[(12, 20), (12,)], dtype=torch.float32)
    optimizer = LowRankOptimizer([{"params": [vector]}, {"params": [matrix], "rank": 4}], lr=0.1)
    before = [matrix.detach().clone(), vector.detach().clone()]
    matrix.grad, vector.grad = torch.randn_like(matrix), torch.randn_like(vector)
    optimizer.step()
    assert optimizer.state[matrix]["exp_avg"].shape == (4, 20)
    assert optimizer.state[vector]["exp_avg"].shape == (12,)
    assert (vector - before[1]).abs().allclose(torch.tensor(0.1), rtol=1e-4), "Adam's first step has size lr"
    assert torch.linalg.matrix_rank(matrix.detach() - before[0]) == 4


def test_state_survives_a_round_trip_in_the_middle():
    """Saved as tensors and plain scalars, loaded into a new optimizer: the next updates are the same, bit for bit."""
    grads = gradients(14)
    results = []
    for interrupted in (False, True):
        torch.manual_seed(1)
        ours = parameters(dtype=torch.bfloat16)
        group = {"params": ours, "rank": 4, "update_proj_gap": 5}
        optimizer = LowRankOptimizer([group], lr=0.05)
        for step, step_grads in enumerate(grads):
            if interrupted and step == 7:
                saved = optimizer.state_dict()
                kinds = {type(value) for state in saved["state"].values() for value in state.values()}
                assert kinds <= {torch.Tensor, int, float}
                optimizer = LowRankOptimizer([{**group}], lr=0.05)
                optimizer.load_state_dict(copy.deepcopy(saved))
                for p in ours:
                    restored, original = optimizer.state[p], saved["state"][optimizer.updates[p].index]
                    assert all(restored[k].dtype == v.dtype for k, v in original.items() if torch.is_tensor(v))
            for p, G in zip(ours, step_grads, strict=True):
                p.grad = G.to(p.dtype)
            optimizer.step()
        results.append([p.detach().clone() for p in ours])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_piles_up_where_nobody_takes_the_norm():
    """In a loop that never asks for the norm, the optimizer holds the norms of one update."""
    (ours,) = parameters(shapes=[(6, 20)])
    optimizer = LowRankOptimizer([{"params": [ours], "rank": 3}])
    for _ in range(5):
        ours.grad = torch.randn_like(ours)
        optimizer.step()
    last = optimizer.updates[ours].project(ours.grad).norm().item()
    assert optimizer.end_update().norm == pytest.approx(last)
    assert optimizer.end_update().norm == 0


def test_moments_are_float32_for_bfloat16_weights():
    ours = parameters(dtype=torch.bfloat16)
    optimizer = LowRankOptimizer([{"params": ours, "rank": 4}])
    for p in ours:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert {optimizer.state[p][k].dtype for p in ours for k in ("exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize(
    "setting",
    [
        {"rank": 0},
        {"rank": 4, "update_proj_gap": 0},
        {"rank": 4, "proj_type": "middle"},
        {"rank": 4, "subspace": "guess"},
        {"rank": 4, "moments_on_refresh": "forget"},
        {"rank": 4, "scale": float("nan")},
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=list(setting)[-1]):
        LowRankOptimizer([{"params": parameters(), **setting}])


def test_only_matrices_can_be_projected():
    with pytest.raises(ValueError, match="matrices only"):
        LowRankOptimizer([{"params": parameters(shapes=[(5,)]), "rank": 2}])


def test_a_rank_beyond_the_matrix_is_clamped_with_a_warning():
    (ours,) = parameters(shapes=[(6, 20)])
    with pytest.warns(UserWarning, match="rank 99 .* clamped"):
        optimizer = LowRankOptimizer([{"params": [ours], "rank": 99}])
    ours.grad = torch.randn_like(ours)
    optimizer.step()
    assert optimizer.state[ours]["left"].shape == (6, 6)


@pytest.mark.parametrize(
    "shape, options, side",
    [
        ((96, 64), {}, "left"),  # two moments of (64, r) and a basis of (96, r)
        ((64, 96), {}, "right"),
        ((64, 64), {}, "right"),  # as std
        ((96, 64), dict(rule="lion"), "right"),  # one moment weighs as much as the basis, which is float32 here
        ((96, 64), dict(rule="lion", proj_bits=4), "left"),
        ((96, 64), dict(state_bits=8, rank=64), "right"),  # two bytes of moments, four of the basis
        ((96, 64), dict(state_bits=8, rank=64, proj_bits=4), "left"),
    ],
)
def test_auto_projects_the_side_that_keeps_fewer_bytes(shape, options, side):
    """By count of what the state holds after an update, against both fixed sides."""

    def sides_and_bytes(proj_type):
        p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        group = {"params": [p], "rank": 8, "proj_type": proj_type} | options
        optimizer = LowRankOptimizer([group], betas=(0.9, 0.99))
        p.grad = torch.ones(shape)
        optimizer.step()
        kept = sum(value.nbytes for value in optimizer.state[p].values() if torch.is_tensor(value))
        return optimizer.updates[p].projector.sides, kept, p.detach()

    (chosen, kept, values), *fixed = (sides_and_bytes(name) for name in ("auto", "std", "reverse_std"))
    assert chosen == (side,) and kept == min(other for _, other, _ in fixed)
    assert any(sides == chosen and torch.equal(values, same) for sides, _, same in fixed)
