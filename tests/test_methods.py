"""Other papers' optimizers on the same road: each beside its paper's equations in float64, and all of them at work."""

import math
from functools import partial

import pytest
import torch
from support.gradients import gradients, largest_difference, parameters
from support.models import Model, batches, loss_of
from support.oracles import ORACLES
from support.ranks import run_distributed
from support.runs import losses, record

import torchrun_main
from qgalore.factory import Settings, create_optimizer, create_updates, find_recipe
from qgalore.param_groups import ParameterGroup, split_parameters
from qgalore.storage.convert import quantize_linear_layers
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.sync import GradSync

LR, DECAY, SCALE, UPDATES = 0.02, 0.1, 0.25, 12


class Apollo:
    """Zhu et al. 2024, algorithm 1: moments of a random sketch of G say how each channel of G is scaled."""

    def __init__(self, W, *, rank, mini, sketch):
        self.W, self.rank, self.mini, self.sketch = W.clone(), rank, mini, sketch
        self.adam, self.last = ORACLES["adam"](), None

    def update(self, G):
        m, n = G.shape
        P = self.sketch()
        R = P.T @ G if m < n else G @ P
        N = self.adam.step(R)
        if self.mini:
            U = math.sqrt(128) * N.norm() / R.norm() * G
        else:
            channel = 0 if m < n else 1
            U = G * (N.norm(dim=channel, keepdim=True) / R.norm(dim=channel, keepdim=True))
        if self.last is not None and U.norm() / self.last > 1.01:
            U = U / U.norm() * 1.01 * self.last
        self.last = U.norm()
        self.W = self.W - LR * SCALE * U - LR * DECAY * self.W


class Muon:
    """Jordan et al. 2024: the Nesterov momentum's singular values s become p(p(p(p(p(s / ||.||_F))))), by an SVD."""

    def __init__(self, W):
        self.W, self.m = W.clone(), 0.0

    def update(self, G):
        self.m = 0.95 * self.m + G
        U, S, Vh = torch.linalg.svd(G + 0.95 * self.m, full_matrices=False)
        s = S / (S.norm() + 1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        step = 0.2 * math.sqrt(max(G.shape)) * (U * s) @ Vh
        self.W = self.W - LR * step - LR * DECAY * self.W


class GaLoreMuon:
    """Muon of R = P^T G, its momentum carried into each new basis; with a residual, scaled and limited as Fira's is."""

    def __init__(self, W, *, basis, residual):
        self.W, self.basis, self.residual = W.clone(), basis, residual
        self.m, self.P, self.last = 0.0, None, None

    def update(self, G):
        wide = G.shape[0] < G.shape[1]
        G = G if wide else G.T  # projected on the left
        P = self.basis()
        if self.P is not None:
            self.m = P.T @ self.P @ self.m
        self.P, R = P, P.T @ G
        self.m = 0.95 * self.m + R
        D = R + 0.95 * self.m
        D = D / D.norm()
        for _ in range(5):
            D = 3.4445 * D - 4.7750 * D @ D.T @ D + 2.0315 * (D @ D.T) @ (D @ D.T) @ D
        U = P @ D
        if self.residual:
            rest = (G - P @ R) * (D.norm(dim=0) / R.norm(dim=0))
            norm = rest.norm() if self.last is None else min(rest.norm(), 1.01 * self.last)
            U, self.last = U + rest * norm / rest.norm(), norm
        U = 0.2 * math.sqrt(max(G.shape)) * (U if wide else U.T)
        self.W = self.W - LR * SCALE * U - LR * DECAY * self.W


class Scale:
    """Glentis et al. 2025, algorithm 1, for (out, in) matrices; momentum and columns of embeddings by kind."""

    def __init__(self, W, *, kind="matrix"):
        self.W, self.kind, self.m = W.clone(), kind, torch.zeros_like(W)

    def update(self, G):
        self.m = 0.9 * self.m + 0.1 * G if self.kind == "head" else G
        inputs = 0 if self.kind == "embedding" else 1
        U = self.m / (self.m.norm(dim=inputs, keepdim=True) / math.sqrt(G.shape[inputs]))
        self.W = self.W - LR * U - LR * DECAY * self.W


class Foam:
    """arXiv 2512.07112, algorithm 1, with its averages and repeats as matrices A and E."""

    def __init__(self, W, *, level=2):
        n, f = W.shape[1], math.gcd(W.shape[1], 2**level)
        self.E = torch.kron(torch.eye(n // f, dtype=W.dtype), torch.ones(1, f, dtype=W.dtype))
        self.W, self.A, self.t, self.m, self.v = W.clone(), self.E.T / f, 0, 0.0, 0.0

    def update(self, G):
        self.t += 1
        g = G @ self.A
        R = G - g @ self.E
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.95 * self.v + 0.05 * G**2 @ self.A
        m, v = self.m / (1 - 0.9**self.t) @ self.E, self.v / (1 - 0.95**self.t) @ self.E
        self.W = self.W - LR * SCALE * (m + R) / ((v + R**2).sqrt() + 1e-8) - LR * DECAY * self.W


def sketch_of(optimizer, p):
    """The one that the optimizer has drawn."""
    return lambda: next(b.read(torch.float64) for b in optimizer.updates[p].projector.open(optimizer.state[p]).values())


def oracle_of(name, optimizer, p, kind):
    if kind != "matrix":
        return Scale(p.detach().double(), kind=kind)
    if name.startswith("apollo"):
        mini = name.startswith("apollo_mini")
        return Apollo(p.detach().double(), rank=1 if mini else 3, mini=mini, sketch=sketch_of(optimizer, p))
    if name.startswith("galore_muon"):
        residual = optimizer.updates[p].group["lift"] == "fira"
        return GaLoreMuon(p.detach().double(), basis=sketch_of(optimizer, p), residual=residual)
    return ORACLES_HERE[name.removesuffix("_per_layer")](p.detach().double())


ORACLES_HERE = {"muon": Muon, "scale": Scale, "foam": Foam, "foam3": partial(Foam, level=3), "galore_muon": GaLoreMuon}
NAMES = ["apollo", "apollo_mini", *ORACLES_HERE]


def compare(name, *, kind="matrix", dtype=torch.float64, accumulation=1, **chosen):
    """Updates of a wide, a tall and a square parameter. Returns ours and the oracle's weights."""
    ours = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    group = ParameterGroup(kind, kind, tuple("abc"), tuple(ours))
    settings = Settings(lr=LR, weight_decay=DECAY, scale=SCALE, rank=3, update_proj_gap=5, **chosen)
    optimizer = create_optimizer(name, groups=[group], settings=settings)
    oracles = [oracle_of(name, optimizer, p, kind) for p in ours]
    updates = create_updates(name, optimizer=optimizer, sync=GradSync(), accumulation=accumulation)
    for whole in gradients(UPDATES):
        for _ in range(accumulation):
            sum((p * G.to(dtype)).sum() / accumulation for p, G in zip(ours, whole, strict=True)).backward()
        updates.finish()
        for oracle, G in zip(oracles, whole, strict=True):
            oracle.update(G)
    return ours, [oracle.W for oracle in oracles]


@pytest.mark.parametrize("driven", ["", "_per_layer"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_papers(name, driven):
    assert largest_difference(*compare(name + driven)) < 1e-10
    assert largest_difference(*compare(name + driven, dtype=torch.float32)) < 1e-4
    assert largest_difference(*compare(name + driven, accumulation=4)) < 1e-10


@pytest.mark.parametrize("driven", ["", "_per_layer"])
def test_muon_in_a_subspace_recovers_the_residual(driven):
    assert largest_difference(*compare("galore_muon" + driven, lift="fira")) < 1e-10
    assert largest_difference(*compare("galore_muon" + driven, lift="fira", accumulation=4)) < 1e-10


def muon_moved(name, *, int8, **chosen):
    """How far twelve gradients with a common part move a matrix."""
    draw = partial(torch.randn, 128, 256, generator=torch.Generator().manual_seed(1))
    p, common = torch.nn.Parameter(0.1 * draw()), draw()
    if int8:
        p = torch.nn.Parameter(QuantizedWeight.from_float(p.detach(), group_size=64))
    start, group = p.detach().float().clone(), ParameterGroup("matrix", "matrix", ("p",), (p,))
    settings = Settings(lr=LR, rank=64, update_proj_gap=4, subspace="svd", **chosen)
    optimizer = create_optimizer(name, groups=[group], settings=settings)
    for _ in range(12):
        p.grad = common + 0.3 * draw()
        optimizer.step()
    return p.detach().float() - start


@pytest.mark.parametrize("name, few, lift", [
    ("muon", "muon8bit", "none"), ("galore_muon", "q_galore_muon8bit", "none"),
    ("galore_muon", "q_galore_muon8bit", "fira"),
])  # fmt: skip
def test_muon_in_few_bits_moves_as_in_float(name, few, lift):
    """8-bit momentum alone: a few percent of noise. INT8 weights and INT4 bases: more of it, and as far on average."""
    exact = muon_moved(name, int8=False, lift=lift)
    for int8, bits, noise in [(False, None, 0.03), (True, 4, 0.2)]:
        found = muon_moved(few, int8=int8, lift=lift, proj_bits=bits)
        assert 0 < (found - exact).norm() / exact.norm() < noise
        assert (found * exact).sum() / exact.square().sum() == pytest.approx(1, abs=0.02), "no shorter, no longer"


@pytest.mark.parametrize("kind", ["embedding", "head"])
def test_scale_has_momentum_for_the_head_alone_and_normalizes_the_columns_of_an_embedding(kind):
    assert largest_difference(*compare("scale", kind=kind)) < 1e-10
    model = Model(width=64)
    optimizer = create_optimizer("scale", groups=split_parameters(model), settings=Settings(lr=0.01))
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    kept = {
        group["name"]: {key for p in group["params"] for key in optimizer.state[p]} for group in optimizer.param_groups
    }
    counted = {"step", "mass", "mass_sq"}
    assert kept["attention and MLP"] == kept["embedding"] == counted and kept["head"] == counted | {"exp_avg"}


@pytest.mark.parametrize("driven", ["", "_per_layer"])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_moves_and_the_loss_falls(name, bits, driven):
    """In float and in quantized weights."""
    model = Model(width=64)
    if bits:
        quantize_linear_layers(model, select=lambda name: "mlp" in name, bits=bits, group_size=16, seed=0)
    before = {key: p.detach().clone().float() for key, p in model.named_parameters()}
    optimizer = create_optimizer(
        name + driven, groups=split_parameters(model), settings=Settings(lr=0.01, rank=8, update_proj_gap=3)
    )
    updates = create_updates(name + driven, optimizer=optimizer, sync=GradSync())
    found, batch = [], batches(1)[0]
    for _ in range(12):
        loss = loss_of(model, batch)
        loss.backward()
        assert not updates.finish().bad
        found.append(loss.item())
    assert found[-1] < found[0]
    moved = {key: (p.detach().float() - before[key]).abs().max() > 0 for key, p in model.named_parameters()}
    assert all(moved.values()), moved


@pytest.mark.parametrize("name", NAMES)
def test_as_the_user_starts_it(tiny, tmp_path, name):
    """From flags, in INT8, resumed in the middle to the last bit."""
    chosen = dict(optimizer=name, rank=8, weight_quant=True, stochastic_round=True, weight_group_size=16, lr=0.005)
    chosen |= dict(num_training_steps=8, save_every=4, update_proj_gap=3, weight_bits=4 if name == "foam" else 8)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "whole", **chosen)) == 0
    middle = tmp_path / "whole" / "checkpoint-00000004"
    assert torchrun_main.command_line(tiny.flags(tmp_path / "half", continue_from=middle, **chosen)) == 0
    found = losses(tmp_path / "whole")
    assert losses(tmp_path / "half") == found[4:]
    title = record(tmp_path / "whole", "start")[0]["groups"][0]["trained_by"]
    assert title.startswith(f"INT{chosen['weight_bits']} weights, {find_recipe(name).title}") and found[-1] < found[0]


def two_updates_on_a_rank(name: str) -> list[torch.Tensor]:
    """Each rank with half of every gradient, or alone with all of it."""
    alone = not torch.distributed.is_initialized()
    ours = [torch.nn.Parameter(p.detach()) for p in parameters()]
    group = ParameterGroup("matrix", "matrix", tuple("abc"), tuple(ours))
    sync = GradSync()
    optimizer = create_optimizer(name, groups=[group], settings=Settings(lr=LR, rank=3), sync=sync)
    updates = create_updates(name, optimizer=optimizer, sync=sync)
    for whole in gradients(2):
        sum((p * G).sum() / (1 if alone else 2) for p, G in zip(ours, whole, strict=True)).backward()
        updates.finish()
    return [p.detach() for p in ours]


def all_methods() -> dict[str, list[torch.Tensor]]:
    found = {}
    for name in NAMES:
        torch.manual_seed(0)
        found[name] = two_updates_on_a_rank(name)
    return found


def test_two_ranks_are_one():
    one, two = run_distributed(all_methods)
    alone = all_methods()
    for name in NAMES:
        assert largest_difference(one[name], two[name]) == 0, name
        assert largest_difference(one[name], alone[name]) < 1e-12, name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_is_eager(name):
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        p = torch.nn.Parameter(QuantizedWeight.from_float(torch.randn(48, 32), group_size=16))
        group = ParameterGroup("matrix", "matrix", ("p",), (p,))
        settings = Settings(lr=LR, rank=3, compile=compile, update_proj_gap=2)
        optimizer = create_optimizer(name, groups=[group], settings=settings)
        for _ in range(3):
            p.grad = torch.randn(48, 32)
            optimizer.step()
        found.append(p.detach().float())
    assert ((found[0] - found[1]).abs() > 1e-3).sum() <= 5, "codes that a last bit has turned"
