"""On a GPU: the same numbers as on a CPU, nothing written where a gradient is bad, no waiting, and the planned memory.

What only a GPU's way has is here: bad gradients that nobody looks at, larger chunks, compiled kernels in Triton,
asynchronous copies. Everything else is tested on CPUs, by tests that do not care where they run.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from support import runs
from support.training import TOKENS, Training

import torchrun_main
from peft_pretraining.checkpoint.atomic_write import write_checkpoint
from peft_pretraining.cli.args import parse_args
from peft_pretraining.model.loss import token_loss_sum
from peft_pretraining.training.memory_plan import plan_memory
from qgalore.factory import OPTIMIZERS
from qgalore.storage.affine import Affine
from qgalore.storage.blockwise import Log, Power
from qgalore.storage.quantized_weight import QuantizedWeight, open_weight
from qgalore.storage.rounding import mix_seed, random_bits, round_stochastic_bfloat16
from qgalore.storage.stored import Stored

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LOW_RANK = [name for name, recipe in OPTIMIZERS.items() if recipe.low_rank_engine]
Q_GALORE = dict(optimizer="q_galore_adamw8bit_per_layer", int8=True)
KINDS = {
    "adamw8bit": dict(optimizer="adamw8bit"),
    "galore": dict(optimizer="galore_adamw"),
    "q_galore": Q_GALORE,
    "fira": dict(optimizer="q_galore_adamw8bit", int8=True, lift="fira"),
    "4-bit moments": Q_GALORE | dict(moments_bits=4),
    "online pca": dict(optimizer="galore_adamw", proj_type="continuous"),
    "average": dict(optimizer="q_galore_adamw8bit", int8=True, subspace="average"),
    "magma": dict(optimizer="q_galore_adamw8bit", int8=True, skip_updates="magma"),
    "magma, full rank": dict(optimizer="adamw8bit", int8=True, skip_updates="magma"),
    "both sides": dict(optimizer="galore_adamw8bit", proj_type="full"),
    "adafactor": dict(optimizer="galore_adafactor"),
    "lion": dict(optimizer="galore_lion"),
    "eco": dict(optimizer="adamw8bit", int8=True, error_feedback="eco"),
    "apollo": dict(optimizer="apollo"),
    "foam": dict(optimizer="foam"),
    "scale": dict(optimizer="scale"),
    "muon": dict(optimizer="muon"),
    "muon in a subspace": dict(optimizer="q_galore_muon8bit", int8=True, lift="fira"),
}


def weights(training):
    """All weights, in float64 on the CPU."""
    return {name: open_weight(p).read(torch.float32).double().cpu() for name, p in training.model.named_parameters()}


def loss_of(training):
    ids = TOKENS[:4].to(training.model.device)
    with torch.no_grad():
        logits = training.model(ids).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_noise_is_the_same_bits():
    for seed in (0, mix_seed(3, 1, 4), (1 << 64) - 1):
        assert torch.equal(random_bits(10_000, seed=seed, device="cuda").cpu(), random_bits(10_000, seed=seed))
    values = torch.randn(1000)
    ours = round_stochastic_bfloat16(values.cuda(), seed=7).cpu()
    assert torch.equal(ours, round_stochastic_bfloat16(values, seed=7))


@pytest.mark.parametrize("codec", [Affine(8, 64), Affine(4, 64), Power(8), Power(4), Log(8), Log(4)], ids=repr)
def test_codes_are_the_same(codec):
    """Many chunks of a CPU beside one of a GPU. A quotient's or a root's last bit may turn one code in ten thousand."""
    values = torch.randn(1024, 512) * torch.logspace(-3, 3, 1024).unsqueeze(1)
    values = values.square() if isinstance(codec, Log) else values
    found = []
    for device in ("cpu", "cuda"):
        stored = Stored.zeros(codec, values.shape, device=torch.device(device))
        stored.write(values.to(device), seed=11)
        found.append({name: part.cpu() for name, part in stored.parts.items()} | {"": stored.read(torch.float32).cpu()})
    assert (found[0]["codes"] != found[1]["codes"]).float().mean() < 1e-4
    assert (found[0][""] - found[1][""]).norm() < 1e-3 * found[0][""].norm()


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("name", LOW_RANK)
def test_training_is_that_of_a_cpu(name, int8, tmp_path):
    """Six updates with refreshes, from the same weights, at a quarter of the rank (see the next test). The change of
    the weights agrees, but for noise that depends on a last bit; where bases are drawn, another generator draws others,
    and the loss falls as far."""
    drawn = "proj_type" in OPTIMIZERS[name].matrix
    settings = dict(subspace="svd", rank=16) if OPTIMIZERS[name].projected and not drawn else {}
    cpu = Training(name, int8=int8, **settings)
    start, first = weights(cpu), loss_of(cpu)
    folder = write_checkpoint(tmp_path, cpu.snapshot(done=0))
    gpu = Training(name, int8=int8, device="cuda", seed=1, **settings).restore(folder)
    cpu.train(6), gpu.train(6)
    if settings or not OPTIMIZERS[name].projected:
        ours, theirs = (
            torch.cat([(after[n] - start[n]).flatten() for n in start]) for after in map(weights, (gpu, cpu))
        )
        coarse = int8 or OPTIMIZERS[name].state_bits < 32
        assert (ours - theirs).norm() < (0.2 if coarse else 0.02) * theirs.norm()
    assert loss_of(gpu) - first == pytest.approx(loss_of(cpu) - first, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager(kind):
    """The weights that five updates leave, but for codes that turn with a last bit. At a quarter of the rank: in
    directions that hold next to none of a gradient, a last bit would decide the update."""
    torch._dynamo.reset()
    ends, start = [], None
    for compile in (False, True):
        training = Training(**KINDS[kind] | dict(rank=16, update_proj_gap=1000), device="cuda", compile=compile)
        start = weights(training)
        ends.append(weights(training.train(5)))
    changes = [torch.cat([(end[name] - start[name]).flatten() for name in start]) for end in ends]
    assert (changes[0] - changes[1]).norm() < 0.2 * changes[0].norm()
    assert changes[0].norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_repeats_itself_and_resumes_to_the_last_bit(kind, dtype, tmp_path):
    shared = dict(dtype=dtype, device="cuda", **KINDS[kind])
    trained = Training(**shared).train(4)
    folder = write_checkpoint(tmp_path, trained.snapshot(done=4))
    expected = trained.train(3).everything()
    assert Training(**shared, seed=1).restore(folder).train(3).everything() == expected
    assert Training(**shared).train(7).everything() == expected


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_gradient_writes_nothing(kind, compile):
    """Kernels run without anybody having looked at the gradient. Weights, moments and counts are as before."""
    torch._dynamo.reset()
    training = Training(**KINDS[kind] | dict(update_proj_gap=1000), device="cuda", compile=compile).train(3)
    before = training.everything()
    model, updates = training.model, training.updates
    for bad in (float("nan"), float("inf")):
        logits = model(TOKENS[:4].cuda()).logits.float()
        (logits.square().mean() * bad).backward()
        outcome = updates.finish()
        assert len(outcome.bad) > 0
        after = training.everything()
        assert after == before, [key for key in before if before[key] != after.get(key)]
    assert all(w.isfinite().all() for w in weights(training.train(2)).values())


@pytest.mark.parametrize("kind", ["adamw8bit", "q_galore", "fira", "online pca"])
def test_updates_do_not_wait_for_the_device(kind):
    """Forward, backward and update, between refreshes. The outcome is looked at once, at the end; torch raises where
    anything else waits."""
    training = Training(**KINDS[kind] | dict(update_proj_gap=1000), device="cuda").train(3)
    ids, targets = TOKENS[:4, :-1].cuda(), TOKENS[:4, 1:].cuda()
    optimizer = training.optimizer
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (token_loss_sum(training.model, ids, targets) / targets.numel()).backward()
        if not OPTIMIZERS[KINDS[kind]["optimizer"]].per_layer:
            for p in training.model.parameters():
                update = optimizer.updates[p]
                update.complete(update.prepare(p.grad))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not optimizer.end_update().bad


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "adamw"],
        ["--optimizer", "galore_adamw", "--rank", "32"],
        ["--optimizer", "q_galore_adamw8bit_per_layer", "--rank", "32", "--weight_quant", "--stochastic_round"],
        ["--optimizer", "q_galore_adamw8bit", "--rank", "32", "--weight_quant", "--stochastic_round", "--residual",
         "fira"],
    ],
    ids=lambda flags: flags[1],
)  # fmt: skip
def test_the_plan_is_the_allocators_peak(flags, accumulation):
    args = parse_args([
        "--model_config", "configs/llama_9m.json", "--dataset", "pydocs", "--batch_size", "8", *flags,
        "--gradient_accumulation", str(accumulation),
    ])  # fmt: skip
    plan = plan_memory(args, dtype=torch.bfloat16)
    plan_memory(args, dtype=torch.bfloat16, device_type="cuda", real=True)  # libraries take their workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = plan_memory(args, dtype=torch.bfloat16, device_type="cuda", real=True)
    measured = torch.cuda.max_memory_allocated() - before
    phases = {
        name: (peak.bytes, run.peaks[name].bytes, peak.line, run.peaks[name].line) for name, peak in plan.peaks.items()
    }
    assert plan.peak.bytes == pytest.approx(measured, rel=0.05), (measured, phases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_int8_products(dtype, compile):
    torch._dynamo.reset()
    values = torch.randn(256, 512, device="cuda")
    weight = torch.nn.Parameter(QuantizedWeight.from_float(values, group_size=-1, dtype=dtype, products="all"))
    x = torch.randn(64, 512, device="cuda", dtype=dtype, requires_grad=True)
    linear = torch.compile(F.linear, dynamic=False) if compile else F.linear
    y = linear(x, weight)
    dy = torch.randn_like(y)
    y.backward(dy)
    W = weight.detach().dequantize(torch.float64)
    exact = x.double() @ W.mT, dy.double() @ W, dy.double().mT @ x.double()
    for ours, theirs in zip((y, x.grad, weight.grad), exact, strict=True):
        assert 1e-3 * theirs.norm() < (ours.double() - theirs).norm() < 0.02 * theirs.norm()


RUNS = {
    "adamw": dict(optimizer="adamw"),
    "q_galore": dict(
        optimizer="q_galore_adamw8bit_per_layer", rank=8, weight_quant=True, stochastic_round=True, proj_quant=True
    ),
    "offloaded": dict(optimizer="galore_adamw", rank=8, activation_checkpointing=True, offload_activations=True),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", RUNS)
def test_the_script(kind, dtype, tiny, tmp_path):
    """Trains, saves, resumes, evaluates and exports; the resumed run is the one never stopped, to the last bit."""
    shared = dict(RUNS[kind], num_training_steps=8, save_every=4, eval_every=4, dtype=dtype)
    for name in ("whole", "again"):
        runs.run(tiny, tmp_path / name, **shared)
    assert runs.losses(tmp_path / "whole") == runs.losses(tmp_path / "again")
    checkpoint = tmp_path / "whole" / "checkpoint-00000004"
    runs.run(tiny, tmp_path / "resumed", **shared, continue_from=checkpoint)
    assert runs.losses(tmp_path / "resumed")[-4:] == runs.losses(tmp_path / "whole")[4:]
    start = runs.record(tmp_path / "whole", "start")[0]
    assert start["device"] == torch.cuda.get_device_name()
    assert runs.losses(tmp_path / "whole")[-1] < runs.losses(tmp_path / "whole")[0]


@pytest.mark.parametrize("kind", ["adamw", "q_galore"])
def test_the_script_compiled(kind, tiny, tmp_path):
    torch._dynamo.reset()
    config = tmp_path / "square.json"
    config.write_text(json.dumps(json.loads(tiny.config.read_text()) | {"intermediate_size": 32}))
    shared = dict(RUNS[kind], num_training_steps=6, model_config=config)
    runs.run(tiny, tmp_path / "eager", **shared)
    runs.run(tiny, tmp_path / "compiled", **shared, compile=True)
    assert runs.losses(tmp_path / "compiled") == pytest.approx(runs.losses(tmp_path / "eager"), rel=2e-3)


def test_offloaded_activations_leave_the_device(tiny, tmp_path):
    """The same losses to the last bit as recomputed layers that keep their inputs on the device."""
    shared = dict(RUNS["q_galore"], activation_checkpointing=True, dtype="bfloat16", num_training_steps=6)
    runs.run(tiny, tmp_path / "device", **shared)
    runs.run(tiny, tmp_path / "host", **shared, offload_activations=True)
    assert runs.losses(tmp_path / "host") == runs.losses(tmp_path / "device")


@pytest.mark.parametrize("residual", [None, "fira"])
def test_sums_on_the_host_are_the_same_sums(residual, tiny, tmp_path):
    """To the last bit, through streams that run beside each other."""
    shared = dict(RUNS["q_galore"], dtype="bfloat16", num_training_steps=6, gradient_accumulation=4, residual=residual)
    whole = shared | dict(optimizer="q_galore_adamw8bit") if residual else shared
    runs.run(tiny, tmp_path / "device", **whole)
    runs.run(tiny, tmp_path / "host", **shared, accumulate_on="host")
    found, expected = (runs.losses(tmp_path / name) for name in ("host", "device"))
    assert found == expected if residual is None else found == pytest.approx(expected, rel=0.02)


def test_int8_products_in_a_run(tiny, tmp_path):
    shared = dict(RUNS["q_galore"], weight_group_size=-1, num_training_steps=12)
    for name, chosen in (("floating", {}), ("forward", {"int8_matmul": "forward"}), ("all", {"int8_matmul": "all"})):
        assert torchrun_main.command_line(tiny.flags(tmp_path / name, **shared | chosen)) == 0
    floating, forward, every = (runs.losses(tmp_path / name) for name in ("floating", "forward", "all"))
    for losses in (forward, every):
        assert losses != floating and losses == pytest.approx(floating, rel=0.02)
