"""Bases from an average of gradients, --subspace average."""

import math

import pytest
import torch
from support.bad_gradients import end_badly
from support.command_line import flags_refusal
from support.gradients import gradients, largest_difference, parameters
from support.oracles import AveragedGaLore
from support.training import Training

from peft_pretraining.checkpoint.atomic_write import write_checkpoint
from qgalore.memory import kept_bytes
from qgalore.optimizer import LowRankOptimizer
from qgalore.per_layer import PerLayerUpdates
from qgalore.subspace.bases import orthonormalize

RANK, LR, DECAY, SCALE = 3, 0.02, 0.1, 0.25
AVERAGE = dict(subspace="average", rank=8)


def last_refreshes(gap, updates=30):
    """Of three matrices, the updates at which the bases are computed."""
    return [{1, *range(1 + math.ceil(gap * (i + 1) / 3), updates + 1, gap)} for i in range(3)]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("gap", [1, 4, 15])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_in_float64_it_is_the_formula(proj_type, gap, accumulation):
    """The bases included. The first one is compared by what follows from it: the oracle begins with ours."""
    start = parameters()
    ours = [torch.nn.Parameter(p.detach().clone()) for p in start]
    group = {"params": ours, "rank": RANK, "update_proj_gap": gap, "scale": SCALE, "subspace": "average"}
    optimizer = LowRankOptimizer([group | {"proj_type": proj_type}], lr=LR, weight_decay=DECAY)

    def first(p):
        state = optimizer.state[p]
        return lambda: state["left" if "left" in state else "right"].clone()

    oracles = [
        AveragedGaLore(p.detach(), rank=RANK, scale=SCALE, lr=LR, weight_decay=DECAY, proj_type=proj_type,
                       refreshes=refreshes, drawn=first(q), gap=gap)
        for p, q, refreshes in zip(start, ours, last_refreshes(gap), strict=True)
    ]  # fmt: skip
    updates = PerLayerUpdates(optimizer, accumulation=accumulation)
    for whole in gradients(30):
        for part in range(accumulation):
            weight = (part + 1) / sum(range(1, accumulation + 1))
            sum((p * G * weight).sum() for p, G in zip(ours, whole, strict=True)).backward()
        updates.finish()
        for oracle, G in zip(oracles, whole, strict=True):
            oracle.update(G)
    assert largest_difference(ours, [oracle.W for oracle in oracles]) < 1e-10
    bases = [optimizer.state[p].get("left", optimizer.state[p].get("right")) for p in ours]
    theirs = [oracle.P if oracle.left else oracle.Q for oracle in oracles]
    assert largest_difference(bases, theirs) < 1e-10


def overlap_with_signal(**settings):
    """The mean overlap of the basis with the 4 directions of which every gradient holds a little, under its noise."""
    torch.manual_seed(3)
    U = orthonormalize(torch.randn(48, 4))
    p = torch.nn.Parameter(torch.zeros(48, 64))
    group = {"params": [p], "rank": 4, "update_proj_gap": 10, "proj_type": "left"} | settings
    optimizer, overlaps = LowRankOptimizer([group]), []
    for update in range(150):
        p.grad = U @ torch.randn(4, 64) + torch.randn(48, 64)
        optimizer.step()
        (P,) = optimizer.updates[p].projector.read(optimizer.updates[p].projector.open(optimizer.state[p])).values()
        overlaps += [((U.T @ P).square().sum() / 4).item()] * (update >= 50)
    return sum(overlaps) / len(overlaps)


def test_it_finds_what_one_gradient_hides():
    """With 8-bit state and INT4 bases as well."""
    average = overlap_with_signal(subspace="average")
    assert average > 0.95 and average > overlap_with_signal(subspace="iterate") + 0.2
    assert overlap_with_signal(subspace="average", state_bits=8, proj_bits=4) > 0.9


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("update", [0, 3])
def test_nothing_is_learnt_from_a_gradient_that_is_not_finite(update, bad):
    """Average, moments and counts stay, to the last bit; after a bad first gradient the run begins all the same."""
    p = torch.nn.Parameter(torch.zeros(80, 64))
    optimizer = LowRankOptimizer(
        [{"params": [p], "rank": 64, "state_bits": 8, "update_proj_gap": 2, "subspace": "average"}]
    )
    before, outcome = end_badly(optimizer, p, updates=update + 1, bad=bad)
    assert outcome.bad == (p,)
    after = optimizer.state[p]
    if update:
        changed = {key for key in after if not torch.equal(torch.as_tensor(after[key]), before[key])}
        assert changed <= {"failed_refreshes"} and "right.average.codes" in after
    for _ in range(4):
        p.grad = torch.randn(80, 64)
        optimizer.step()
    assert optimizer.state[p]["right.step"] == update + 4 and p.isfinite().all()


@pytest.mark.parametrize("name", ["galore_adamw", "q_galore_adamw8bit", "q_galore_adamw8bit_per_layer"])
def test_resumed_it_is_one_never_stopped(name, tmp_path):
    settings = AVERAGE | dict(int8=name.startswith("q_"), rank=32)
    trained = Training(name, **settings).train(4)
    folder = write_checkpoint(tmp_path, trained.snapshot(done=4))
    assert Training(name, seed=1, **settings).restore(folder).train(5).everything() == trained.train(5).everything()


@pytest.mark.parametrize("bits", [8, 32])
def test_bytes_are_known_before_training(bits):
    name = "galore_adamw8bit" if bits == 8 else "galore_adamw"
    counted, planned = Training(name, **AVERAGE | dict(rank=64)), Training(name, **AVERAGE | dict(rank=64))
    planned.optimizer.allocate()
    counted.train(2)
    assert kept_bytes(counted.model, counted.optimizer) == kept_bytes(planned.model, planned.optimizer)
    state = counted.optimizer.state[
        next(p for p in counted.model.parameters() if "right" in counted.optimizer.state[p])
    ]
    assert ("right.average.codes" in state) == (bits == 8)


def test_what_cannot_be_is_refused():
    p = torch.nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match="one projected side"):
        LowRankOptimizer([{"params": [p], "rank": 2, "subspace": "average", "proj_type": "full"}])
    flags = ("--optimizer", "galore_adamw", "--subspace", "average")
    assert "it has one projected side" in flags_refusal(*flags, "--proj_type", "full")
    assert "--parallel fsdp with --subspace average" in flags_refusal(*flags, "--parallel", "fsdp", world_size=2)
