"""Every weight optimizer times every projection: beside an oracle in float64, and all of them at work."""

import itertools
import math

import pytest
import torch
from support.gradients import gradients, largest_difference, parameters
from support.models import Model, batches, loss_of
from support.oracles import ORACLES, GaLore
from support.runs import record
from support.training import Training

import torchrun_main
from peft_pretraining.checkpoint.atomic_write import write_checkpoint
from qgalore.factory import OPTIMIZERS, Settings, create_optimizer, create_updates
from qgalore.memory import kept_bytes
from qgalore.optimizer import LowRankOptimizer
from qgalore.options import RESIDUALS
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.subspace.projector import LEARNERS, PROJ_TYPES
from qgalore.sync import GradSync

RANK, GAP, LR, DECAY, SCALE, REG = 3, 10, 0.02, 0.1, 0.25, 0.1
RULES = ("adam", "lion", "adafactor")


def drawn_basis(optimizer, p):
    def draw():
        P = optimizer.state[p]["left" if "left" in optimizer.state[p] else "right"].double()
        assert torch.allclose(P.T @ P, torch.eye(RANK, dtype=P.dtype), atol=1e-5)
        return P.clone()

    return draw


def compare(*, rule, proj_type, dtype, accumulation=1):
    """Thirty updates of a wide, a tall and a square matrix. Returns ours and the oracle's weights.

    accumulation: micro-batches, of random shares that sum to the gradient, through updates inside backward."""
    start = parameters()
    ours = [torch.nn.Parameter(p.detach().to(dtype)) for p in start]
    group = {"params": ours, "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "rule": rule, "subspace": "svd"}
    optimizer = LowRankOptimizer([group | {"proj_type": proj_type, "proj_reg": REG}], lr=LR, weight_decay=DECAY)
    oracles = [
        GaLore(
            p.detach(),
            rank=RANK,
            scale=SCALE,
            lr=LR,
            weight_decay=DECAY,
            rule=ORACLES[rule],
            refreshes={1, *range(1 + math.ceil(GAP * (i + 1) / 3), 31, GAP)},
            drawn=drawn_basis(optimizer, q) if proj_type == "random" else None,
            learner=ORACLES[LEARNERS[proj_type].rule]() if proj_type in LEARNERS else None,
            step_size=1 / GAP,
            reg=REG,
        )
        for i, (p, q) in enumerate(zip(start, ours, strict=True))
    ]
    updates = PerLayerUpdates(optimizer, accumulation=accumulation)
    for whole in gradients(30):
        shares = [torch.randn(accumulation, *G.shape, dtype=G.dtype) for G in whole]
        shares = [share + (G - share.sum(0)) / accumulation for share, G in zip(shares, whole, strict=True)]
        for micro in zip(*shares, strict=True):
            sum((p * G.to(dtype)).sum() for p, G in zip(ours, micro, strict=True)).backward()
        updates.finish()
        for oracle, G in zip(oracles, whole, strict=True):
            oracle.update(G)
    return ours, [oracle.W for oracle in oracles]


@pytest.mark.parametrize("proj_type", ["std", "random", *LEARNERS])
@pytest.mark.parametrize("rule", RULES)
def test_in_float64_it_is_the_papers(rule, proj_type):
    """Refreshes included. These bases are too small for moments in 8 bits, whatever the name says."""
    ours, theirs = compare(rule=rule, proj_type=proj_type, dtype=torch.float64)
    assert largest_difference(ours, theirs) < 1e-8


@pytest.mark.parametrize("proj_type", ["std", "random", "continuous", "continuous_sgd"])
@pytest.mark.parametrize("rule", ["adam", "adafactor"])
def test_in_float32_it_is_close_to_that(rule, proj_type):
    """Lion is left out: a sign that rounding turns is a difference of twice the step."""
    ours, theirs = compare(rule=rule, proj_type=proj_type, dtype=torch.float32)
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("proj_type", ["random", "continuous", "continuous_lion"])
@pytest.mark.parametrize("rule", RULES)
def test_four_micro_batches_are_one_update(rule, proj_type):
    """From the first update on: random bases need no gradient, learning ones wait for the whole of it."""
    ours, theirs = compare(rule=rule, proj_type=proj_type, dtype=torch.float64, accumulation=4)
    assert largest_difference(ours, theirs) < 1e-8


LOW_RANK = [name for name, recipe in OPTIMIZERS.items() if recipe.projected and "proj_type" not in recipe.matrix]
OTHERS = [name for name, recipe in OPTIMIZERS.items() if recipe.low_rank_engine and name not in LOW_RANK]
COMBINATIONS = [*itertools.product(LOW_RANK, PROJ_TYPES), *((name, "std") for name in OTHERS)]


def slow_if_alike(combinations):
    """Marks those per layer as slow whose projection is much like another one's."""
    for name, proj_type, *rest in combinations:
        alike = name.endswith("_per_layer") and proj_type not in ("std", "continuous", "random")
        yield pytest.param(name, proj_type, *rest, marks=pytest.mark.slow if alike else ())


@pytest.mark.parametrize("name, proj_type", slow_if_alike(COMBINATIONS))
def test_every_combination_moves_every_parameter(name, proj_type):
    """Five updates, INT4 bases where the name says so, wide enough for moments in 8 bits."""
    model = Model(width=64)
    before = [p.detach().clone() for p in model.parameters()]
    settings = Settings(lr=0.01, rank=64 if "8bit" in name else 4, update_proj_gap=2, proj_type=proj_type,
                        proj_bits=4 if name.startswith("q_") else None)  # fmt: skip
    optimizer = create_optimizer(name, groups=split_parameters(model), settings=settings)
    updates = create_updates(name, optimizer=optimizer, sync=GradSync(), accumulation=2)
    for index, batch in enumerate(batches(10), start=1):
        (loss_of(model, batch) / 2).backward()
        if index % 2 == 0:
            assert not updates.finish().bad
    assert all(
        p.isfinite().all() and not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
    )
    kept = {key for p in model.mlp.parameters() for key in optimizer.state[p]}
    assert ("exp_avg.codes" in kept) == ("8bit" in name)
    remembers = proj_type in LEARNERS and LEARNERS[proj_type].rule != "descent"
    assert any(key.startswith("right.exp_avg") for key in kept) == remembers
    if "8bit" in proj_type and "8bit" in name:
        assert "right.exp_avg.codes" in kept, "a basis of 64 x 64"
    values = [value for p in model.parameters() for value in optimizer.state[p].values()]
    assert all(v.is_contiguous() if torch.is_tensor(v) else isinstance(v, (int, float, list)) for v in values)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("proj_type", [name for name in PROJ_TYPES if name != "full"])
def test_a_recovered_residual_gives_every_projection_full_rank(proj_type, per_layer):
    """8-bit moments and INT4 bases; per layer, with accumulation, too, where the whole gradient is then summed."""
    model, name = Model(width=64), "q_galore_adamw8bit" + "_per_layer" * per_layer
    before = [layer.weight.detach().clone() for layer in model.mlp]
    settings = Settings(lr=0.01, rank=8, update_proj_gap=2, proj_type=proj_type, proj_bits=4, lift="fira")
    optimizer = create_optimizer(name, groups=split_parameters(model), settings=settings)
    updates = create_updates(name, optimizer=optimizer, sync=GradSync(), accumulation=2)
    for batch in batches(2):
        (loss_of(model, batch) / 2).backward()
    updates.finish()
    ranks = [torch.linalg.matrix_rank(p.weight.detach() - old) for p, old in zip(model.mlp, before, strict=True)]
    assert min(ranks) > 16 and all(optimizer.state[p.weight]["residual_norm"] > 0 for p in model.mlp)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("proj_type", [*LEARNERS, "random"])
def test_bytes_are_known_before_training(proj_type, bits):
    """What `allocate` puts there is what three updates leave, by kind and to the byte."""
    counted = []
    for train in (False, True):
        model = Model(width=64)
        settings = Settings(rank=64, proj_type=proj_type, proj_bits=bits)
        optimizer = create_optimizer("galore_adafactor", groups=split_parameters(model), settings=settings)
        if not train:
            optimizer.allocate()
        for batch in batches(3 * train):
            loss_of(model, batch).backward()
            optimizer.step()
        counted.append(kept_bytes(model, optimizer))
    assert counted[0] == counted[1]
    elements = 2 * 64 * 64
    if bits is None:
        assert counted[0]["bases"] == 4 * elements
    else:
        assert elements / 2 < counted[0]["bases"] < elements, "the moments of a basis are not counted as bases"


def test_a_rank_beyond_the_matrix_is_clamped_for_bases_that_learn_or_are_drawn():
    for proj_type in ("random", "continuous"):
        p = torch.nn.Parameter(torch.zeros(6, 20))
        with pytest.warns(UserWarning, match="rank 99 .* clamped"):
            optimizer = LowRankOptimizer([{"params": [p], "rank": 99, "proj_type": proj_type}])
        for _ in range(3):
            p.grad = torch.randn_like(p)
            optimizer.step()
        assert optimizer.state[p]["left"].shape == (6, 6) and p.abs().min() > 0


@pytest.mark.parametrize(
    "name, proj_type, residual",
    slow_if_alike(
        (*pair, residual)
        for pair in COMBINATIONS
        for residual in RESIDUALS
        if residual == "none" or pair[0] in LOW_RANK
    ),
)
def test_every_combination_resumed_is_one_never_stopped(name, proj_type, residual, tmp_path):
    """To the last bit: bases packed, drawn or learning with their moments and their clock, and the limiter."""
    if residual != "none" and (OPTIMIZERS[name].rule not in ("adam", "muon") or proj_type == "full"):
        with pytest.raises(ValueError, match="residual"):
            Training(name, proj_type=proj_type, lift=residual)
        return
    bits = 4 if name.startswith("q_") else None
    settings = dict(proj_type=proj_type, lift=residual, proj_bits=bits, rank=64 if "8bit" in proj_type else 8)
    trained = Training(name, **settings).train(4)
    folder = write_checkpoint(tmp_path, trained.snapshot(done=4))
    assert Training(name, seed=1, **settings).restore(folder).train(3).everything() == trained.train(3).everything()


def test_as_the_user_starts_it(tiny, tmp_path, capsys):
    """The flags reach the optimizer, the log says what they do, and the loss falls."""
    chosen = dict(optimizer="galore_adamw_per_layer", proj_type="continuous_lion", proj_lr=0.01, residual="fira")
    flags = tiny.flags(tmp_path, **chosen, rank=8, num_training_steps=30, eval_every=10)
    assert torchrun_main.command_line(flags) == 0
    assert "online PCA by Lion, scale 1, residual recovered" in record(tmp_path, "start")[0]["groups"][0]["trained_by"]
    assert "after that, the bases learnt online" in capsys.readouterr().err
    first, *_, last = record(tmp_path, "eval")
    assert last["loss"] < first["loss"]
    assert {matrix["refreshes"] for matrix in record(tmp_path, "subspaces")[-1]["matrices"]} == {1}
