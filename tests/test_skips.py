"""--skip_updates: SkipUpdate and Magma beside float64, and what a skipped weight keeps."""

import math

import pytest
import torch
from support.bad_gradients import end_badly
from support.command_line import flags_refusal
from support.gradients import gradients, largest_difference, parameters
from support.models import Model
from support.oracles import ORACLES
from support.training import Training

from peft_pretraining.checkpoint.atomic_write import write_checkpoint
from qgalore.factory import Settings, create_optimizer
from qgalore.memory import kept_bytes
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage.quantized_weight import open_weight

LR, DECAY, RANK = 0.02, 0.1, 3


class Oracle:
    """Joo et al. 2026, algorithm 1, around a rule: z, the coin, is given."""

    def __init__(self, W, *, rule, skips):
        self.W, self.rule, self.skips, self.s = W.clone(), ORACLES[rule](), skips, None

    def update(self, G, *, z, P=None):
        R = G if P is None else P.T @ G
        D = self.rule.step(R)
        U = self.rule.finish(D if P is None else P @ D)
        f = 2.0 if self.skips == "skip" else self.alignment(R)
        self.W = self.W - z * f * LR * (U + DECAY * self.W)

    def alignment(self, R):
        cosine = torch.nn.functional.cosine_similarity(self.rule.m.flatten(), R.flatten(), dim=0).item()
        fresh = 1 / (1 + math.exp(-cosine / 2))
        self.s = fresh if self.s is None else 0.9 * self.s + 0.1 * fresh
        return self.s


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("rule", ["adam", "lion", "adafactor"])
@pytest.mark.parametrize("skips", ["skip", "magma"])
def test_in_float64_it_is_the_papers(skips, rule, projected, accumulation):
    start = parameters()
    ours = [torch.nn.Parameter(p.detach().clone()) for p in start]
    group = {"params": ours, "rule": rule, "skip_updates": skips}
    if projected:
        group |= {"rank": RANK, "proj_type": "left", "update_proj_gap": 1000, "subspace": "svd"}
    optimizer = LowRankOptimizer([group], lr=LR, weight_decay=DECAY)
    oracles = [Oracle(p.detach(), rule=rule, skips=skips) for p in start]
    updates = PerLayerUpdates(optimizer, accumulation=accumulation)
    moved = []
    for whole in gradients(12):  # the second bases come at the 334th update
        before = [p.detach().clone() for p in ours]
        for _ in range(accumulation):
            sum((p * G / accumulation).sum() for p, G in zip(ours, whole, strict=True)).backward()
        updates.finish()
        for oracle, p, old, G in zip(oracles, ours, before, whole, strict=True):
            moved.append(not torch.equal(p, old))
            oracle.update(G, z=moved[-1], P=optimizer.state[p]["left"] if projected else None)
    assert largest_difference(ours, [oracle.W for oracle in oracles]) < 1e-10
    assert 10 < sum(moved) < 26, "of 36"
    if skips == "magma":
        alignments = [optimizer.state[p]["alignment"].item() for p in ours]
        assert alignments == pytest.approx([oracle.s for oracle in oracles], abs=1e-10)


def coins(**others):
    """Which of 400 updates of two equal matrices move them."""
    ps = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    optimizer = LowRankOptimizer([{"params": ps, "skip_updates": "skip", "rule": "descent"}], lr=1.0, **others)
    found = []
    for _ in range(400):
        before = [p.detach().clone() for p in ps]
        for p in ps:
            p.grad = torch.ones(2, 2)
        optimizer.step()
        found.append([not torch.equal(p, old) for p, old in zip(ps, before, strict=True)])
    return torch.tensor(found).T.double()


def test_the_coin_is_fair_and_each_matrix_has_its_own():
    """400 tosses: a standard deviation of .025 of the mean, of .05 of a correlation."""
    one, other = coins()
    assert abs(one.mean() - 0.5) < 0.1 and abs(other.mean() - 0.5) < 0.1
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.2
    assert torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1].abs() < 0.2
    assert torch.equal(coins(), torch.stack([one, other]))
    assert not torch.equal(coins(seed=1), torch.stack([one, other]))


def momentum(training, p):
    state = training.optimizer.state[p]
    return state["exp_avg"] if "exp_avg" in state else state["exp_avg.codes"]


@pytest.mark.parametrize("skips", ["skip", "magma"])
@pytest.mark.parametrize("name", ["adamw8bit", "q_galore_adamw8bit", "muon"])
def test_a_skipped_int8_weight_stays_and_its_moments_do_not(name, skips):
    training = Training(name, int8=True, skip_updates=skips)
    matrices = [p for n, p in training.model.named_parameters() if "layers" in n and p.ndim == 2]
    training.train(1)
    kept = 0
    for _ in range(3):
        weights = [{part: t.clone() for part, t in open_weight(p).tensors().items()} for p in matrices]
        moments = [momentum(training, p).clone() for p in matrices]
        training.train(1)
        for p, weight, moment in zip(matrices, weights, moments, strict=True):
            stayed = [torch.equal(t, weight[part]) for part, t in open_weight(p).tensors().items()]
            kept += all(stayed)
            assert stayed[0] == all(stayed)
            assert not torch.equal(momentum(training, p), moment)
    assert 3 < kept < 18, "of 21"


@pytest.mark.parametrize("name", ["adamw8bit", "q_galore_adamw8bit_per_layer"])
@pytest.mark.parametrize("lift", ["none", "fira"])
def test_resumed_it_is_one_never_stopped(name, lift, tmp_path):
    settings = dict(int8=True, skip_updates="magma", lift=lift if name.startswith("q_") else "none")
    trained = Training(name, **settings).train(4)
    folder = write_checkpoint(tmp_path, trained.snapshot(done=4))
    assert Training(name, **settings).restore(folder).train(4).everything() == trained.train(4).everything()


def test_int8_is_within_the_noise_of_its_simulation():
    ends = [
        Training("adamw8bit", int8=int8, skip_updates="magma", moments_bits=8).train(6) for int8 in (True, "simulated")
    ]
    one, other = ({n: open_weight(p).read(torch.float32) for n, p in end.model.named_parameters()} for end in ends)
    for name, values in one.items():
        assert (values - other[name]).norm() <= 0.02 * values.norm(), name


@pytest.mark.parametrize("bad", [math.nan, 1e30])
def test_a_bad_gradient_writes_nothing(bad):
    p = torch.nn.Parameter(torch.randn(24, 20))
    optimizer = LowRankOptimizer([{"params": [p], "skip_updates": "magma"}])
    before, outcome = end_badly(optimizer, p, updates=4, bad=bad)
    assert outcome.bad == (p,)
    assert all(torch.equal(torch.as_tensor(value), before[key]) for key, value in optimizer.state[p].items())


def test_matrices_alone_are_skipped_and_bytes_are_known():
    model = Model(width=64)
    optimizer = create_optimizer("lion", groups=split_parameters(model), settings=Settings(skip_updates="magma"))
    chosen = {group["name"]: group["skip_updates"] for group in optimizer.param_groups}
    assert {name for name, skips in chosen.items() if skips == "magma"} == {"attention and MLP"}
    planned, trained = Training("adamw8bit", skip_updates="magma"), Training("adamw8bit", skip_updates="magma").train(1)
    planned.optimizer.allocate()
    assert kept_bytes(planned.model, planned.optimizer) == kept_bytes(trained.model, trained.optimizer)


def test_what_cannot_be_is_refused():
    p = torch.nn.Parameter(torch.zeros(8, 8))
    for rule in ("foam", "scale"):
        with pytest.raises(ValueError, match="momentum of its size, which the rule"):
            LowRankOptimizer([{"params": [p], "rule": rule, "skip_updates": "magma"}])
    said = flags_refusal("--optimizer", "foam", "--skip_updates", "magma")
    assert "--optimizer foam, which keeps no momentum" in said
    flags = ("--optimizer", "adamw8bit", "--parallel", "fsdp", "--skip_updates", "magma")
    assert "which compares all rows of a matrix" in flags_refusal(*flags, world_size=2)
