import warnings

import pytest
import torch
from torch import nn

from qgalore.optimizer import LowRankOptimizer
from qgalore.subspace.bases import orthonormalize
from qgalore.subspace.projector import SIDE_TYPES, Projector, Turn, projection_sides
from qgalore.subspace.schedule import RefreshSchedule


def projector(shape, *, proj_type="std", rank=4, gap=3, method="iterate", dtype=torch.float32) -> Projector:
    return Projector(
        torch.Size(shape),
        dtype,
        sides=projection_sides(shape, proj_type=proj_type),
        rank=rank,
        method=method,
        schedule=RefreshSchedule(gap=gap, offset=gap),
    )


def refresh_if_due(p, G, state, *, step):
    return p.refresh(G, state, step=step) if p.due(state, step=step) else None


def project(p, G, state):
    return p.project(G, p.open(state))


def back(p, D, state):
    return p.back(D, p.read(p.open(state)))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("proj_type", SIDE_TYPES)
def test_the_side_is_the_references(shape, proj_type):
    """std keeps the longer side of R, the square matrix counts as tall; reverse_std the shorter."""
    state, p = {}, projector(shape, proj_type=proj_type)
    G = torch.randn(shape)
    refresh_if_due(p, G, state, step=1)
    m, n = shape
    std = (m, 4) if m >= n else (4, n)
    expected = {"std": std, "reverse_std": (4, n) if std == (m, 4) else (m, 4), "left": (4, n), "right": (m, 4)}
    assert tuple(project(p, G, state).shape) == expected.get(proj_type, (4, 4))
    assert {"left", "right"} & state.keys() == set(p.sides), "the side is what the state holds"


@pytest.mark.parametrize("proj_type", SIDE_TYPES)
def test_there_and_back_is_the_projection_of_the_gradient(proj_type):
    G, state, p = (
        torch.randn(10, 14, dtype=torch.float64),
        {},
        projector((10, 14), proj_type=proj_type, dtype=torch.float64),
    )
    refresh_if_due(p, G, state, step=1)
    once = back(p, project(p, G, state), state)
    again = back(p, project(p, once, state), state)
    assert torch.allclose(once, again, atol=1e-12)
    assert 0 < once.norm() < G.norm()
    left = state["left"] @ state["left"].mT if "left" in state else torch.eye(10, dtype=torch.float64)
    right = state["right"] @ state["right"].mT if "right" in state else torch.eye(14, dtype=torch.float64)
    assert torch.allclose(once, left @ G @ right, atol=1e-12)


def test_without_sides_it_is_the_identity_for_any_shape():
    for shape in [(5,), (3, 4), (2, 3, 4)]:
        p, state = Projector(torch.Size(shape), torch.bfloat16), {}
        G = torch.randn(shape, dtype=torch.bfloat16)
        assert refresh_if_due(p, G, state, step=1) is None
        assert torch.equal(back(p, project(p, G, state), state), G.float())
        assert state == {}


def test_a_refresh_happens_exactly_when_due():
    p, state = projector((8, 12), gap=3), {}
    changed = []
    for step in range(1, 12):
        before = state.get("left")
        turn = refresh_if_due(p, torch.randn(8, 12), state, step=step)
        if state["left"] is not before:
            changed.append(step)
        assert (turn is not None) == (step in (4, 7, 10)), "the first basis replaces none"
    assert changed == [1, 4, 7, 10]
    assert state["refreshes"] == 4


@pytest.mark.parametrize("proj_type", SIDE_TYPES)
def test_a_refresh_tells_how_coordinates_changed(proj_type):
    """What both bases span is carried over exactly; what only the old one spans is dropped."""
    p, state = projector((10, 14), proj_type=proj_type, gap=1, dtype=torch.float64), {}
    G = torch.randn(10, 14, dtype=torch.float64)
    refresh_if_due(p, G, state, step=1)
    old = dict(state)
    turn = refresh_if_due(p, G + 0.3 * torch.randn(10, 14, dtype=torch.float64), state, step=2)
    M = project(p, torch.randn(10, 14, dtype=torch.float64), old)
    assert torch.allclose(turn.carry(M), project(p, back(p, M, old), state), atol=1e-12)


def test_overlap_ignores_sign_order_and_rotation():
    def overlap(new, old):
        return Turn(left=new.mT @ old).overlap.item()

    P, Q = orthonormalize(torch.randn(30, 6)), orthonormalize(torch.randn(30, 6))
    assert overlap(P @ orthonormalize(torch.randn(6, 6)), P) == pytest.approx(1, abs=1e-5)
    assert overlap(-P.flip(1), Q) == pytest.approx(overlap(P, Q), abs=1e-5)
    full = orthonormalize(torch.randn(30, 12))
    assert overlap(full[:, :6], full[:, 6:]) == pytest.approx(0, abs=1e-6)
    assert Turn(left=torch.eye(4), right=0.5 * torch.eye(4)).overlap.item() == pytest.approx(0.25)


@pytest.mark.parametrize("method", ["iterate", "svd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_old_basis(method, bad):
    p, state = projector((8, 12), gap=1, method=method), {}
    refresh_if_due(p, torch.randn(8, 12), state, step=1)
    old = state["left"].clone()
    G = torch.randn(8, 12)
    G[3, 4] = bad
    with pytest.warns(UserWarning, match="the old basis stays"):
        turn = refresh_if_due(p, G, state, step=2)
    assert torch.equal(state["left"], old) and state["failed_refreshes"] == 1
    assert turn is None, "moments stay as they are"


def test_a_useless_first_gradient_gives_some_orthonormal_basis():
    p, state = projector((8, 12)), {}
    with pytest.warns(UserWarning):
        refresh_if_due(p, torch.full((8, 12), float("nan")), state, step=1)
    assert torch.allclose(state["left"].mT @ state["left"], torch.eye(4), atol=1e-5)


def test_a_factorization_that_fails_leaves_the_old_basis(monkeypatch):
    p, state = projector((8, 12), gap=1), {}
    refresh_if_due(p, torch.randn(8, 12), state, step=1)
    old = state["left"].clone()

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr("qgalore.subspace.bases.iterate_basis", fail)
    with pytest.warns(UserWarning, match="no convergence"):
        refresh_if_due(p, torch.randn(8, 12), state, step=2)
    assert torch.equal(state["left"], old)


def test_a_basis_is_kept_in_the_gradients_dtype_and_r_in_float32():
    G, state, p = torch.randn(8, 12, dtype=torch.bfloat16), {}, projector((8, 12), gap=1, dtype=torch.bfloat16)
    for step in (1, 2):
        refresh_if_due(p, G, state, step=step)
    assert state["left"].dtype == torch.bfloat16
    assert project(p, G, state).dtype == torch.float32
    assert back(p, project(p, G, state), state).dtype == torch.float32


@pytest.mark.parametrize("dtype, bits", [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 4)])
def test_random_bases_follow_from_the_seed_and_the_count_alone(dtype, bits):
    """Two that see different gradients, one of them useless, draw the same bases; a later one is another one."""
    ours, theirs = {}, {}
    p = Projector(
        torch.Size((20, 64)),
        dtype,
        sides=("right",),
        rank=8,
        method="random",
        seed=5,
        bits=bits,
        schedule=RefreshSchedule(gap=2, offset=2),
    )
    seen = []
    for step in range(1, 7):
        change = refresh_if_due(p, torch.randn(20, 64, dtype=dtype), ours, step=step)
        refresh_if_due(p, torch.full((20, 64), float("nan"), dtype=dtype), theirs, step=step)
        P = p.open(ours)["right"].read(torch.float32)
        assert (change is not None) == (step in (3, 5))
        assert torch.equal(P, p.open(theirs)["right"].read(torch.float32))
        assert torch.allclose(P.mT @ P, torch.eye(8), atol={None: 0.02, 4: 0.4}[bits])
        seen.append(P)
    assert torch.equal(seen[2], seen[3]) and (seen[2].mT @ seen[4]).square().sum() / 8 < 0.4
    assert ours["refreshes"] == 3 and "failed_refreshes" not in theirs


@pytest.mark.parametrize("gap", [1, 5, 50])
def test_a_first_update_that_was_undone_leaves_nothing_to_go_on_from(gap):
    """The first good gradient gets the basis that it would have had: not one on the way there from a random one."""
    draw = torch.Generator().manual_seed(0)
    G, found = torch.randn(40, 24, generator=draw), []
    for bad in (False, True):
        p = nn.Parameter(torch.zeros(40, 24))
        optimizer = LowRankOptimizer([{"params": [p], "rank": 4, "update_proj_gap": gap}])
        gradients = [torch.full_like(G, torch.nan), G] if bad else [G]
        for gradient in gradients:
            p.grad = gradient.clone()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        found.append(optimizer.state[p])
    side = "left" if "left" in found[0] else "right"
    assert torch.equal(found[0][side], found[1][side])
