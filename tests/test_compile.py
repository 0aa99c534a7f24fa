"""Compiled runs beside eager ones, and how often they compile.

They are not equal to the last bit. Products of matrices are the same calls in both, but compiled code sums in another
order, and rounds twice in `lerp` and `alpha` where eager code rounds once. The noise of stochastic rounding is the same
bits in both (asserted below), so where moments and weights are kept in 8 bits, few codes differ. An INT4 basis is
rounded to nearest in coarse steps: there a last bit can become a step, and losses agree to 3 digits instead of 4.
"""

import json

import pytest
import torch
from support.gradients import relative_error
from support.runs import losses, record, torchrun
from torch._dynamo.utils import counters
from transformers import LlamaConfig

import torchrun_main
from peft_pretraining.model.build import build_model, compile_layers
from peft_pretraining.model.loss import token_loss_sum
from qgalore.factory import OPTIMIZERS, Settings, create_optimizer, create_updates
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import split_parameters
from qgalore.storage.affine import unpack_nibbles
from qgalore.storage.convert import quantize_module_weight
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.storage.rounding import mix_seed, random_bits, seed_tensors
from qgalore.sync import GradSync

GALORE = dict(optimizer="galore_adamw")
Q_GALORE = dict(optimizer="q_galore_adamw8bit_per_layer", int8=True, proj_bits=4, accumulation=2)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def compiles() -> int:
    return counters["stats"]["unique_graphs"]


def tiny_llama(*, dtype, int8=False, layers=3):
    """All its matrices (128, 128), large enough for 8-bit moments at rank 32; embedding and head (64, 128)."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2
    )

    def finish(name, module):
        if int8 and name.endswith("_proj"):
            quantize_module_weight(module, group_size=16)

    return build_model(config, device="cpu", dtype=dtype, seed=0, finish=finish)


def sequences(generator) -> torch.Tensor:
    """Four sequences of 17 tokens, each token followed by three times itself. (4, 17)"""
    first = torch.randint(64, (4, 1), generator=generator)
    return torch.cat([(3**i * first + i) % 64 for i in range(17)], dim=1)


def train(*, compile, optimizer, dtype, int8=False, accumulation=1, updates=7, **settings):
    """The losses, and the compiles so far, of updates with a learning rate of their own each; refreshes every 3."""
    model = tiny_llama(dtype=dtype, int8=int8)
    if compile:
        compile_layers(model)
    chosen = Settings(**dict(rank=32, update_proj_gap=3, weight_decay=0.01, compile=compile) | settings)
    built = create_optimizer(optimizer, groups=split_parameters(model), settings=chosen)
    driver = create_updates(optimizer, optimizer=built, sync=GradSync(), accumulation=accumulation)
    generator = torch.Generator().manual_seed(1)
    found, graphs = [], []
    for update in range(1, updates + 1):
        for group in built.param_groups:
            group["lr"] = 1e-3 * (1 - update / (2 * updates))
        loss = 0.0
        for _ in range(accumulation):
            x = sequences(generator)
            share = token_loss_sum(model, x[:, :-1], x[:, 1:]) / (64 * accumulation)
            share.backward()
            loss += share.item()
        driver.finish()
        found.append(loss)
        graphs.append(compiles())
    return found, graphs


@pytest.mark.parametrize(
    "settings, dtype, tolerance",
    [
        pytest.param(GALORE, torch.float32, 1e-4, marks=pytest.mark.slow),  # all four take more than a minute
        pytest.param(GALORE, torch.bfloat16, 5e-3, marks=pytest.mark.slow),
        (Q_GALORE, torch.float32, 1e-3),
        pytest.param(Q_GALORE, torch.bfloat16, 5e-3, marks=pytest.mark.slow),
    ],
    ids=["galore-float32", "galore-bfloat16", "q_galore-float32", "q_galore-bfloat16"],
)
def test_compiled_training_is_eager_training(settings, dtype, tolerance):
    """And everything is compiled at the first update, for all layers at once: one layer forward with its backward, and
    the updates of a projected matrix, of embedding and head, of a norm. Neither the learning rate nor a refresh nor the
    bias correction, the seed or the next layer is a reason to compile again."""
    eager, graphs = train(compile=False, dtype=dtype, **settings)
    assert graphs == [0] * len(graphs)
    compiled, graphs = train(compile=True, dtype=dtype, **settings)
    assert graphs == [4] * len(graphs)
    assert not counters["graph_break"]
    assert compiled == pytest.approx(eager, rel=tolerance)
    assert compiled[-1] < compiled[0]


@pytest.mark.parametrize(
    "simulation, settings",
    [
        (False, dict(rank=32, clip=0.1)),
        (True, dict(rank=32, proj_type="full", proj_bits=8)),
        (False, dict(decoupled=False, weight_decay=0.1)),
        (False, dict(rank=32, lift="fira")),
        (False, dict(rank=32, rule="adafactor", proj_type="random")),
    ],
    ids=["clipped", "simulated, both sides", "unprojected, coupled decay", "residual", "adafactor, random"],
)
def test_one_update_writes_what_eager_code_writes(simulation, settings):
    """From the same gradient in float32: codes, of moments and of weights, are the same but for one or two.

    A few more of second moments differ: all codes of a block hang on the last bit of its smallest value."""
    values, G = torch.randn(128, 128), torch.randn(128, 128)
    found = []
    for compile in (False, True):
        p = torch.nn.Parameter(QuantizedWeight.from_float(values, group_size=16, simulation=simulation))
        optimizer = LowRankOptimizer([{"params": [p], "state_bits": 8, **settings}], compile=compile)
        version = p._version
        p.grad = G.clone()
        optimizer.step()
        assert p._version > version, "a backward that needs the old weight would notice"
        assert torch.equal(p.grad, G)
        found.append({"weight": p.detach().float()} | {k: v for k, v in optimizer.state[p].items() if "codes" in k})
    assert compiles() == 1
    for name, eager in found[0].items():
        few = 5 if name == "exp_avg_sq.codes" else 2
        assert ((found[1][name].float() - eager.float()).abs() > 1e-4).sum() <= few, name


@pytest.mark.parametrize("lift", ["fira", "apollo"])
def test_a_limited_norm_is_remembered_in_float64(lift):
    """Compiled by torch 2.13, what is written to a 0-d float64 tensor on the CPU is lost, and with it the limit."""
    values, gradients, found = torch.randn(32, 24).double(), torch.randn(3, 32, 24).double(), []
    for compile in (False, True):
        p = torch.nn.Parameter(values.clone())
        group = {"params": [p], "rank": 4, "lift": lift, "update_proj_gap": 10}
        optimizer = LowRankOptimizer([group], compile=compile)
        for size, G in zip((1, 100, 10_000), gradients, strict=True):  # each is limited
            p.grad = size * G
            optimizer.step()
        (norm,) = (value for name, value in optimizer.state[p].items() if name.endswith("_norm"))
        assert norm.shape == () and norm > 0
        found.append((norm, p.detach()))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert torch.allclose(found[0][1], found[1][1], rtol=0, atol=1e-12)


def test_an_average_of_gradients_is_compiled_once_beside_the_weights():
    """With a basis from it at the third update; few of its 8-bit codes differ, by one."""
    found, generator = [], torch.Generator().manual_seed(3)
    gradients = [torch.randn(128, 128, generator=generator) for _ in range(4)]
    for compile in (False, True):
        p = torch.nn.Parameter(torch.zeros(128, 128))
        settings = dict(rank=32, subspace="average", state_bits=8, proj_bits=4)
        optimizer = LowRankOptimizer([{"params": [p], "update_proj_gap": 2, **settings}], lr=0.1, compile=compile)
        for G in gradients:
            p.grad = G.clone()
            optimizer.step()
        assert optimizer.state[p]["refreshes"] == 2
        found.append((p.detach(), optimizer.state[p]["right.average.codes"].int()))
    assert compiles() == 2
    (eager, eager_codes), (compiled, codes) = found
    assert (codes - eager_codes).abs().max() <= 1 and (codes != eager_codes).float().mean() < 0.01
    assert relative_error(compiled, eager) < 0.05


def test_skipped_updates_are_compiled_once_beside_the_others():
    """Weights in float64, so that nothing is rounded: the alignment is the same, and the steps that it scales."""
    found, generator = [], torch.Generator().manual_seed(3)
    gradients = [torch.randn(64, 48, generator=generator, dtype=torch.float64) for _ in range(6)]
    for compile in (False, True):
        p = torch.nn.Parameter(torch.zeros(64, 48, dtype=torch.float64))
        optimizer = LowRankOptimizer([{"params": [p], "skip_updates": "magma"}], lr=0.1, compile=compile)
        moved = []
        for G in gradients:
            before, p.grad = p.detach().clone(), G.clone()
            optimizer.step()
            moved.append(not torch.equal(p, before))
        found.append((moved, p.detach(), optimizer.state[p]["alignment"]))
    assert compiles() == 2
    (eager_moved, eager, eager_s), (moved, compiled, s) = found
    assert moved == eager_moved and 0 < sum(moved) < 6
    assert relative_error(compiled, eager) < 1e-10 and relative_error(s, eager_s) < 1e-12


def test_a_basis_that_learns_is_compiled_once_beside_the_weights():
    """Lion's sign for the weights, 8-bit Adam for an INT4 basis, its noise from the same bits: three steps of learning,
    with a step size of their own each. Few of the basis' codes differ, by one."""
    found, generator = [], torch.Generator().manual_seed(3)
    gradients = [torch.randn(128, 128, generator=generator) for _ in range(4)]
    for compile in (False, True):
        p = torch.nn.Parameter(torch.zeros(128, 128))
        settings = dict(rank=32, rule="lion", proj_type="continuous_adam8bit", proj_bits=4)
        optimizer = LowRankOptimizer([{"params": [p], "update_proj_gap": 100, **settings}], lr=0.1, compile=compile)
        for G in gradients:
            optimizer.param_groups[0]["lr"] *= 0.9
            p.grad = G.clone()
            optimizer.step()
        found.append((p.detach(), unpack_nibbles(optimizer.state[p]["right.codes"], width=32).int()))
    assert compiles() == 2
    (eager, eager_codes), (compiled, codes) = found
    assert (codes - eager_codes).abs().max() <= 1 and (codes != eager_codes).float().mean() < 0.01
    assert (compiled != eager).float().mean() < 0.05, "a sign that a last bit or a code has turned"


def test_updates_are_measured_from_outside_their_compiled_code():
    """The same bits as without, and no compile more. The seconds are those of the way into the subspace alone."""
    ends, start = [], [torch.randn(64, 96) for _ in range(3)]
    gradients = [[torch.randn(64, 96) for _ in start] for _ in range(7)]
    for details in (False, True):
        matrices = [torch.nn.Parameter(p.clone()) for p in start]
        group = {"params": matrices, "rank": 8, "update_proj_gap": 2, "proj_bits": 4}
        optimizer = LowRankOptimizer([group], compile=True, details=details)
        torch._dynamo.reset()
        counters.clear()
        for update in gradients:
            for p, G in zip(matrices, update, strict=True):
                p.grad = G.clone()
            optimizer.step()
        assert compiles() == 1
        ends.append(matrices)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
    figures = [optimizer.details(p) for p in matrices]
    assert figures[1:] == [None, None] and 0 < figures[0]["reconstruction_error"] < 1
    assert figures[0]["projection_seconds"] > 0


def test_noise_is_the_same_bits_from_tensors_and_compiled():
    for seed in (0, 7, mix_seed(3, 1, 4), (1 << 64) - 1):
        expected = random_bits(1000, seed=seed)
        assert torch.equal(random_bits(1000, seed=seed_tensors(seed)), expected)
        compiled = torch.compile(random_bits, fullgraph=True, dynamic=False)
        assert torch.equal(compiled(1000, seed=seed_tensors(seed)), expected)
    assert compiles() == 1, "no seed is compiled in"


QUICK = ("muon8bit", "scale")  # the others take a minute


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name, recipe in OPTIMIZERS.items()
        if recipe.rule != "adam" and not recipe.per_layer
    ],
)
def test_rules_that_are_no_adam_compile(name):
    """SCALE's head among them, whose code torch fails to generate by itself."""
    ends = []
    for compile in (False, True):
        model = tiny_llama(dtype=torch.float32, layers=1)
        settings = Settings(rank=32, compile=compile, lr=1e-3)
        optimizer = create_optimizer(name, groups=split_parameters(model), settings=settings)
        for _ in range(2):
            x = sequences(torch.Generator().manual_seed(1))
            token_loss_sum(model, x[:, :-1], x[:, 1:]).backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert compiles() > 0
    for eager, compiled in zip(*ends, strict=True):
        assert ((eager - compiled).abs() > 1e-5).float().mean() < 0.02


def test_more_shapes_than_torch_would_compile_by_itself():
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (2, 3, 4)]
    optimizer = LowRankOptimizer(parameters, compile=True)
    for p in parameters:
        p.grad = torch.ones_like(p)
    with torch._dynamo.config.patch(recompile_limit=2):
        optimizer.step()
        assert torch._dynamo.config.recompile_limit == 2, "raised for these compiles alone"
    assert compiles() == 3


def test_a_compiled_model_has_the_names_of_an_eager_one():
    model = tiny_llama(dtype=torch.float32, int8=True)
    names, parameters = list(model.state_dict()), list(model.parameters())
    compile_layers(model)
    assert list(model.state_dict()) == names
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


@pytest.mark.slow
def test_compile_flag_end_to_end(tiny, tmp_path):
    """INT8 weights, activation checkpointing, evaluations, saving: a compiled run leaves the record of an eager one.

    It takes six graphs: a layer in training and in evaluation; there the first one, too, of whose input transformers
    requires a gradient for checkpointing's sake; the updates of a matrix, of embedding and head, of a norm.
    """
    config = tmp_path / "llama_square.json"
    config.write_text(json.dumps(json.loads(tiny.config.read_text()) | {"intermediate_size": 32}))
    chosen = dict(
        model_config=config, optimizer="galore_adamw", rank=8, update_proj_gap=2, activation_checkpointing=True
    )
    chosen |= dict(weight_quant=True, weight_group_size=16, stochastic_round=True)
    chosen |= dict(eval_every=3, eval_tokens=2048)  # 64 sequences: the last batch is a full one
    for name, switch in (("eager", None), ("compiled", True)):
        assert torchrun_main.command_line(tiny.flags(tmp_path / name, **chosen, compile=switch)) == 0
        assert compiles() == (6 if switch else 0)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    ours, eager = (record(tmp_path / name, "eval") for name in ("compiled", "eager"))
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in eager], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["galore_adamw", "q_galore_adamw8bit_per_layer"])
def test_two_ranks_compiled_are_two_ranks_eager(tiny, tmp_path, optimizer):
    """Sums over the ranks lie between backward and the compiled update, inside backward or after it."""
    config = tmp_path / "llama_square.json"
    config.write_text(json.dumps(json.loads(tiny.config.read_text()) | {"intermediate_size": 32}))
    flags = dict(model_config=config, optimizer=optimizer, rank=8, update_proj_gap=2, total_batch_size=16)
    for name, switch in (("eager", None), ("compiled", True)):
        result = torchrun(tiny.flags(tmp_path / name, compile=switch, **flags), processes=2, timeout=500)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
