"""Figures of the subspaces beside their definitions in float64; measured training beside training."""

import copy
import math

import pytest
import torch
from support.models import Model, batches, loss_of
from support.ranks import run_distributed
from support.runs import losses, record

import torchrun_main
from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage.affine import Affine
from qgalore.storage.stored import find
from qgalore.subspace.probe import Stopwatch, measuring_period, orthonormality_error, overlap, reconstruction_error
from qgalore.subspace.projector import LEARNERS, PROJ_TYPES
from qgalore.sync import GradSync

RANK, SHAPES = 4, [(10, 16), (16, 10), (12, 12)]


def optimizer_of(p, *, details=True, sync=None, **group) -> LowRankOptimizer:
    chosen = {"params": [p], "rank": RANK, "update_proj_gap": 3} | group
    return LowRankOptimizer([chosen], lr=0.01, sync=sync, details=details)


def stored_bases(state, p) -> dict[str, torch.Tensor]:
    """The bases of p by side, as they are read, in float64."""
    found = {}
    for side, rows in zip(("left", "right"), p.shape, strict=True):
        if f"{side}.codes" in state:
            packed = find(state, side, codec=Affine(4, RANK), shape=torch.Size((rows, RANK)))
            found[side] = packed.read(p.dtype).double()
        elif side in state:
            found[side] = state[side].double().clone()
    return found


def missed(G, bases) -> float:
    """||G - P P^T G Q Q^T|| / ||G||, as it is written."""
    seen = G = G.double()
    if "left" in bases:
        seen = bases["left"].double() @ bases["left"].double().mT @ seen
    if "right" in bases:
        seen = seen @ bases["right"].double() @ bases["right"].double().mT
    return ((G - seen).norm() / G.norm()).item()


def off_orthonormal(bases) -> float:
    identity = torch.eye(RANK, dtype=torch.float64)
    return max(((P.mT @ P - identity).norm() / math.sqrt(RANK)).item() for P in bases.values())


def shared(new, old) -> float:
    """The product over the sides of ||Q_new^T Q_old||_F^2 / r, the columns made orthonormal by QR."""
    spans = [(torch.linalg.qr(new[side]).Q, torch.linalg.qr(old[side]).Q) for side in new]
    return math.prod(((Q.mT @ S).square().sum() / RANK).item() for Q, S in spans)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_figure_is_its_definition(shape, proj_type, bits):
    """Eight updates with refreshes at 1, 4 and 7, of which the oracle sees gradients and bases alone."""
    p = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = optimizer_of(p, proj_type=proj_type, proj_bits=bits)
    expected_overlap = None
    for update in range(1, 9):
        before = stored_bases(optimizer.state[p], p)
        p.grad = torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        after = stored_bases(optimizer.state[p], p)
        learns = proj_type in LEARNERS and update > 1
        if update > 1 and (learns or update in (4, 7)):
            expected_overlap = shared(after, before)
        figures = optimizer.details(p)
        used = before if learns else after
        assert figures["reconstruction_error"] == pytest.approx(missed(p.grad, used), rel=1e-9)
        assert figures["orthonormality_error"] == pytest.approx(off_orthonormal(used), rel=1e-6, abs=1e-12)
        turned = proj_type in LEARNERS and update > 2
        assert (figures["orthonormality_error"] > 1e-3) == (bits == 4 or turned), "no basis need be orthonormal"
        assert figures["overlap"] == (expected_overlap and pytest.approx(expected_overlap, rel=1e-9))
        assert figures["projection_seconds"] > 0 and figures["projections"] == 1
        assert optimizer.details(p) is None, "it is read once"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("scale", [1.0, 1e-17])
def test_the_error_is_as_exact_as_the_gradient(dtype, tolerance, scale):
    """Gradients of a model's size, half of whose energy the basis sees, and so small that squares underflow."""
    P = torch.linalg.qr(torch.randn(512, 64)).Q
    G = scale * (P @ torch.randn(64, 2048) * 2.8 + torch.randn(512, 2048))
    P, G = P.to(dtype), G.to(dtype)
    error = reconstruction_error(G, (P.mT @ G).float(), left=P.float().mT @ P.float())
    assert error.item() == pytest.approx(missed(G, {"left": P}), abs=tolerance)


def test_what_lies_in_the_subspace_misses_nothing():
    """But for what cancels in float32."""
    P = torch.linalg.qr(torch.randn(512, 64)).Q
    G = P @ torch.randn(64, 2048)
    assert reconstruction_error(G, P.mT @ G, left=P.mT @ P).item() < 1e-3
    G = G.double()
    P = torch.linalg.qr(P.double()).Q
    G = P @ (P.mT @ G)
    assert reconstruction_error(G, P.mT @ G, left=P.mT @ P).item() < 1e-7


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_says_nothing_has_no_error(value):
    G, P = torch.full((8, 6), value), torch.eye(8)[:, :3]
    assert reconstruction_error(G, P.mT @ G, left=P.mT @ P).isnan()


def test_overlap_is_of_spans():
    P = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    mixed = P[:, :6] @ torch.randn(6, 6, dtype=torch.float64)
    assert overlap(mixed, P[:, :6]).item() == pytest.approx(1, abs=1e-9), "any columns will do"
    assert overlap(P[:, :6], P[:, 6:12]).item() == pytest.approx(0, abs=1e-12)
    assert overlap(mixed, P[:, 2:8]).item() == pytest.approx(4 / 6, abs=1e-9)
    turned = math.cos(0.3) * P[:, :1] + math.sin(0.3) * P[:, 1:2]
    assert overlap(turned, 5 * P[:, :1]).item() == pytest.approx(math.cos(0.3) ** 2, abs=1e-12)
    assert overlap(P[:, [0, 0]], P[:, :2]).isnan() and overlap(P[:, :2], P[:, [0, 0]]).isnan()


def test_orthonormality_is_measured_per_column():
    assert orthonormality_error(torch.eye(9)).item() == 0
    assert orthonormality_error(1.5 * torch.eye(9)).item() == pytest.approx(0.5)


@pytest.mark.parametrize("count, gap", [(1, 1), (5, 10), (14, 50), (56, 200), (224, 500)])
def test_each_matrix_is_measured_in_its_turn_and_at_every_age_of_its_basis(count, gap):
    period = measuring_period(count, gap=gap)
    assert count <= period <= count + 3
    assert {update % gap for update in range(0, period * gap, period)} == set(range(gap))


def test_in_an_update_one_matrix_is_measured():
    matrices = [torch.nn.Parameter(torch.randn(8, 6)) for _ in range(5)]
    group = {"params": matrices, "rank": RANK, "update_proj_gap": 10}
    optimizer = LowRankOptimizer([group], details=True)
    turns = []
    for _ in range(16):
        for p in matrices:
            p.grad = torch.randn_like(p)
        optimizer.step()
        turns.append([i for i, p in enumerate(matrices) if optimizer.details(p) is not None])
    assert turns == ([[0], [1], [2], [3], [4], [], []] * 3)[:16], "a period of 7: 5 and 10 have a divisor in common"


SETTINGS = [
    dict(proj_type="std"),
    dict(proj_type="full", proj_bits=4, cos_threshold=0.1, queue_size=1),
    dict(proj_type="continuous", proj_bits=4),
    dict(proj_type="random"),
    dict(proj_type="std", lift="fira"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_per_layer"])
def test_measuring_changes_no_bit(name, accumulation, settings):
    """Ten updates: every weight and every state. Micro-batches are projected one by one only where that is how it is
    done anyway."""
    data, ends, seen = batches(10 * accumulation), [], set()
    start = Model().state_dict()
    for details in (False, True):
        model = Model()
        model.load_state_dict(start)
        chosen = Settings(lr=0.02, rank=RANK, update_proj_gap=3, log_details=details, **settings)
        optimizer = create_optimizer(name, groups=split_parameters(model), settings=chosen)
        updates = create_updates(name, optimizer=optimizer, sync=GradSync(), accumulation=accumulation)
        for index, batch in enumerate(data, start=1):
            (loss_of(model, batch) / accumulation).backward()
            if index % accumulation == 0:
                updates.finish()
                found = [optimizer.details(p) for p in model.parameters()]
                seen |= {figures["projections"] for figures in found if figures}
        ends.append([{**optimizer.state[p], "weight": p.detach()} for p in model.parameters()])
    for plain, measured in zip(*ends, strict=True):
        assert plain.keys() == measured.keys(), "nothing is remembered"
        for key in plain:
            one, other = plain[key], measured[key]
            assert torch.equal(one, other) if torch.is_tensor(one) else one == other, key
    whole = accumulation == 1 or name == "galore_adamw" or {"continuous", "fira"} & set(settings.values())
    both = {1, 4} if settings["proj_type"] != "random" else {4}  # where a refresh is due, the whole gradient is there
    assert seen == ({1} if whole else both)


def test_of_micro_batches_that_are_projected_one_by_one_the_first_is_measured():
    p = torch.nn.Parameter(torch.randn(10, 16, dtype=torch.float64))
    optimizer = optimizer_of(p, proj_type="random")
    updates = PerLayerUpdates(optimizer, accumulation=3)
    gradients = torch.randn(3, *p.shape, dtype=torch.float64)
    for G in gradients:
        (p * G).sum().backward()
    updates.finish()
    figures = optimizer.details(p)
    assert figures["projections"] == 3
    used = stored_bases(optimizer.state[p], p)
    assert figures["reconstruction_error"] == pytest.approx(missed(gradients[0], used), rel=1e-9)


def errors_on_a_rank():
    p = torch.nn.Parameter(torch.randn(10, 16, dtype=torch.float64))
    optimizer = optimizer_of(p, proj_type="random", sync=GradSync())
    p.grad = torch.randn_like(p) + torch.distributed.get_rank()
    optimizer.step()
    expected = missed(p.grad, stored_bases(optimizer.state[p], p))
    return [optimizer.details(p)["reconstruction_error"], expected]


def test_of_several_ranks_each_measures_its_own_share():
    """Where sums travel at rank size, in place."""
    (one, expected), (two, other) = run_distributed(errors_on_a_rank)
    assert one == pytest.approx(expected, rel=1e-9) and two == pytest.approx(other, rel=1e-9) and one != two


def test_an_overlap_is_forgotten_with_the_refresh_that_it_is_of():
    """Back at a state of before the second refresh, at update 4, as after a rollback."""
    p = torch.nn.Parameter(torch.randn(8, 6))
    optimizer, overlaps = optimizer_of(p), []
    for update in range(1, 9):
        if update == 3:
            saved = copy.deepcopy(optimizer.state_dict())
        if update == 6:
            optimizer.load_state_dict(saved)
        p.grad = torch.randn_like(p)
        optimizer.step()
        overlaps.append(optimizer.details(p)["overlap"])
    assert [overlap is not None for overlap in overlaps] == [False] * 3 + [True] * 2 + [False] + [True] * 2


def test_without_details_there_are_none():
    p = torch.nn.Parameter(torch.randn(8, 6))
    optimizer = optimizer_of(p, details=False)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.details(p) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_stamps_its_own_time():
    """A product that takes the GPU milliseconds, and the host no time at all to ask for."""
    X, watch = torch.randn(8192, 8192, device="cuda"), Stopwatch(torch.device("cuda"))
    for _ in range(3):
        with watch.lap():
            X @ X
    assert watch.seconds() > 3e-3


def test_the_record_has_a_line_a_measurement_and_the_run_is_the_same(tiny, tmp_path):
    """Fourteen matrices in turn. The run that goes on measures on; its overlaps are unknown until the next refresh."""
    flags = dict(optimizer="q_galore_adamw8bit_per_layer", proj_quant=True, rank=8, update_proj_gap=5)
    flags |= dict(total_batch_size=8, num_training_steps=16)
    for name, details in [("with", True), ("without", None)]:
        assert torchrun_main.command_line(tiny.flags(tmp_path / name, save_every=8, log_details=details, **flags)) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert not record(tmp_path / "without", "subspace_details")
    lines = record(tmp_path / "with", "subspace_details")
    names = [matrix["name"] for matrix in record(tmp_path / "with", "subspaces")[-1]["matrices"]]
    assert [(line["update"], line["name"]) for line in lines] == list(enumerate(names + names[:2], start=1))
    assert lines[0]["overlap"] is None and 0 < lines[15]["overlap"] <= 1.0001
    for line in lines:
        assert 0 < line["reconstruction_error"] < 1.1 and 0 < line["orthonormality_error"] < 0.3
        assert 0 < line["projection_seconds"] < 1 and line["projections"] in (1, 2)

    middle = tmp_path / "without" / "checkpoint-00000008"
    resumed = tiny.flags(tmp_path / "resumed", continue_from=middle, log_details=True, **flags)
    assert torchrun_main.command_line(resumed) == 0
    later = record(tmp_path / "resumed", "subspace_details")
    for line, other in zip(later, lines[8:], strict=True):
        for key in ("update", "name", "reconstruction_error", "orthonormality_error", "projections"):
            assert line[key] == other[key]
        assert line["overlap"] in (None, other["overlap"])
    assert later[0]["overlap"] is None and later[-1]["overlap"] is not None
