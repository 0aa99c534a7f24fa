"""The rounding error of a weight in the first moment, ECO: beside the paper's equations in float64, and in runs."""

import pytest
import torch
from support.runs import losses, record
from support.training import Training

import torchrun_main
from peft_pretraining.checkpoint.atomic_write import write_checkpoint
from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import ParameterGroup
from qgalore.storage.affine import Affine
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.sync import GradSync

LR, DECAY, SHAPE, GROUP = 0.01, 0.1, (12, 16), 8


def nearest(values):
    """The values on the grid of an INT8 weight."""
    codec = Affine(8, GROUP, False)
    return codec.decode(codec.encode(values), shape=values.shape, dtype=values.dtype)


class Eco:
    """Nikdan et al. 2026 around AdamW: W is W~ rounded, and m takes (1 - 1 / b1) (sqrt(v^) + eps) (W~ - W) / lr in."""

    def __init__(self, W):
        self.W, self.m, self.v, self.t = W.clone(), torch.zeros_like(W), torch.zeros_like(W), 0

    def update(self, G):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * G
        self.v = 0.999 * self.v + 0.001 * G**2
        divisor = (self.v / (1 - 0.999**self.t)).sqrt() + 1e-8
        wanted = self.W - LR * self.m / (1 - 0.9**self.t) / divisor - LR * DECAY * self.W
        self.W = nearest(wanted)
        self.m = self.m + (1 - 0.9**self.t) / LR * (1 - 1 / 0.9) * divisor * (wanted - self.W)


def optimizer_of(p, *, name="adamw8bit", **settings):
    group = ParameterGroup("matrix", "matrix", ("p",), (p,))
    return create_optimizer(name, groups=[group], settings=Settings(**{"lr": LR, "error_feedback": "eco", **settings}))


def quantized(*, dtype=torch.float64, **how):
    return torch.nn.Parameter(
        QuantizedWeight.from_float(torch.randn(SHAPE, dtype=dtype), group_size=GROUP, stochastic=False, **how)
    )


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["adamw8bit", "adamw8bit_per_layer"])
@pytest.mark.parametrize("simulation", [False, True])
def test_it_is_the_papers(name, simulation, accumulation):
    """Codes and scales are float32 on both sides; all else is float64, as moments this small are not packed."""
    p = quantized(simulation=simulation)
    oracle, optimizer = Eco(p.dequantize().detach()), optimizer_of(p, name=name, weight_decay=DECAY)
    updates = create_updates(name, optimizer=optimizer, sync=GradSync(), accumulation=accumulation)
    for _ in range(20):
        G = torch.randn(SHAPE, dtype=torch.float64) + 0.3
        for _ in range(accumulation):
            (p.dequantize() * G / accumulation).sum().backward()
        updates.finish()
        oracle.update(G)
        assert (p.dequantize() - oracle.W).abs().max() < 1e-10
        assert (optimizer.state[p]["exp_avg"] - oracle.m).abs().max() < 1e-10


def end_of(feedback, *, bits=8, updates=300):
    """Where a weight ends that is rounded to nearest, on its way to a target; bits = None: a float32 weight."""
    torch.manual_seed(0)
    p, target = quantized(dtype=torch.float32), torch.randn(SHAPE)
    if bits is None:
        p = torch.nn.Parameter(p.detach().dequantize().clone())
    optimizer = optimizer_of(p, lr=1e-3, error_feedback=feedback)
    for _ in range(updates):
        p.grad = p.detach().to(torch.float32).clone() - target if bits is None else p.detach().dequantize() - target
        optimizer.step()
    return p.detach() if bits is None else p.detach().dequantize()


def test_updates_far_below_a_code_are_lost_without_it():
    """A code is about 0.015 here, an update 0.001; a weight in float32 moves by up to 0.3."""
    exact = end_of("none", bits=None)
    assert (end_of("none") - exact).abs().mean() > 0.1
    assert (end_of("eco") - exact).abs().mean() < 0.03


def test_a_rate_of_zero_changes_nothing_and_divides_nothing():
    p = quantized(dtype=torch.float32)
    optimizer, before = optimizer_of(p, lr=0.01), p.detach().dequantize().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = torch.randn(SHAPE)
    optimizer.step()
    assert torch.equal(before, p.dequantize()) and optimizer.state[p]["exp_avg"].isfinite().all()


def test_a_run_that_is_resumed_is_one_never_stopped(tmp_path):
    settings = dict(int8=True, error_feedback="eco")
    trained = Training("adamw8bit", **settings).train(4)
    folder = write_checkpoint(tmp_path, trained.snapshot(done=4))
    again = Training("adamw8bit", seed=1, **settings).restore(folder)
    assert again.train(3).everything() == trained.train(3).everything()


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            dict(optimizer="galore_adamw", weight_quant=True),
            "with --optimizer galore_adamw: it needs Adam's first moment",
        ),
        (dict(optimizer="adamw"), "with --optimizer adamw: it needs Adam's first moment"),
        (dict(optimizer="adamw8bit"), "without --weight_quant: there is no rounding error"),
        (dict(optimizer="adamw8bit", weight_quant=True, skip_updates="skip"), "leave one of them out"),
    ],
)
def test_where_it_cannot_work_it_is_refused_in_a_line(tiny, tmp_path, capsys, flags, says):
    assert torchrun_main.command_line(tiny.flags(tmp_path, error_feedback="eco", num_training_steps=2, **flags)) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [dict(rank=2), dict(rule="muon"), dict(skip_updates="skip"), dict(betas=(0.0, 0.9))]
)
def test_a_group_without_the_moment_for_it_is_refused(options):
    with pytest.raises(ValueError, match="error_feedback"):
        LowRankOptimizer([{"params": [torch.nn.Parameter(torch.ones(3, 4))], "error_feedback": "eco", **options}])


def test_as_the_user_starts_it(tiny, tmp_path):
    chosen = dict(optimizer="adamw8bit", weight_quant=True, weight_group_size=16, lr=0.005, error_feedback="eco")
    assert torchrun_main.command_line(tiny.flags(tmp_path, num_training_steps=10, **chosen)) == 0
    found = losses(tmp_path)
    assert found[-1] < found[0]
    assert "rounding errors fed back" in record(tmp_path, "start")[0]["groups"][0]["trained_by"]


@pytest.mark.slow
def test_compiled_it_is_eager():
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(QuantizedWeight.from_float(torch.randn(80, 64), group_size=16, stochastic=False))
        optimizer = optimizer_of(p, compile=compile)
        for _ in range(4):
            p.grad = torch.randn(80, 64)
            optimizer.step()
        found.append(p.detach().float())
    assert ((found[0] - found[1]).abs() > 1e-3).float().mean() < 0.01, "codes that a last bit has turned"
