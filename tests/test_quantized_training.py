"""Quantized weights in training: they learn; clipping, hooks, checkpointing and torch.compile see what they should."""

import copy

import pytest
import torch
from support.quantized_models import gradients_of, quantized_mlp, tiny_llama
from torch.utils.checkpoint import checkpoint

from qgalore.optimizer import LowRankOptimizer
from qgalore.storage import chunks
from qgalore.storage.quantized_weight import QuantizedWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_galore_trains_int8_weights(dtype):
    """Updates of a hundredth of a step: to nearest, the loss would not move."""
    losses = {}
    for stochastic in (True, False):
        model, x = quantized_mlp(stochastic=stochastic).to(dtype), torch.randn(64, 96).to(dtype)
        target = x.float().roll(1, dims=1)[:, :48]
        optimizer = LowRankOptimizer([{"params": [model[0].weight, model[2].weight], "rank": 8}], lr=2e-5)
        for _ in range(100):
            loss = (model(x).float() - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(stochastic, []).append(loss.item())
        assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    fall = {stochastic: values[0] - values[-1] for stochastic, values in losses.items()}
    assert fall[True] > 0.005 and abs(fall[False]) < 0.1 * fall[True], fall


def test_gradients_clip_accumulate_and_fire_hooks_in_a_llama():
    model, tokens = tiny_llama(), torch.randint(64, (2, 4, 16))
    fired = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append((name, type(p.grad), p.grad.shape)))
    for batch in tokens:
        model(input_ids=batch, labels=batch).loss.backward()
    assert sorted(fired) == sorted(2 * [(n, torch.Tensor, p.shape) for n, p in model.named_parameters()])
    summed = copy.deepcopy(gradients_of(model))
    model.zero_grad()
    both = tokens.flatten(0, 1)
    (2 * model(input_ids=both, labels=both).loss).backward()
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, summed[name], rtol=1e-4, atol=1e-6)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_activation_checkpointing_gives_the_same_gradients():
    tokens, found = torch.randint(64, (4, 16)), []
    for checkpointing in (False, True):
        model = tiny_llama()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append(gradients_of(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    layer, x = quantized_mlp(), torch.randn(3, 96, requires_grad=True)
    direct = torch.autograd.grad(layer(x).sum(), x)[0]
    recomputed = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)[0]
    assert torch.equal(direct, recomputed)


@pytest.mark.parametrize("bits", [8, 4])
def test_llamas_of_codes_and_of_simulated_codes_train_alike(bits):
    batch, losses = torch.randint(64, (4, 16)), []
    for simulation in (False, True):
        model = tiny_llama(simulation=simulation, bits=bits)
        optimizer = LowRankOptimizer(model.parameters(), lr=1e-2)
        for _ in range(5):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:5] == losses[5:]
    assert losses[4] < losses[0] - 0.1


@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_equals_eager(bits):
    """One graph, forward and backward; and an update afterwards reaches the compiled code."""
    eager, compiled = quantized_mlp(bits=bits), quantized_mlp(bits=bits)
    run = torch.compile(compiled, fullgraph=True)
    for step in range(2):
        x = torch.randn(6, 96)
        ours, theirs = run(x), eager(x)
        torch.testing.assert_close(ours, theirs)
        for model, y in ((compiled, ours), (eager, theirs)):
            model.zero_grad()
            y.square().sum().backward()
        for name, gradient in gradients_of(eager).items():
            torch.testing.assert_close(gradients_of(compiled)[name], gradient)
        for model in (compiled, eager):
            model[0].weight.write(torch.full((80, 96), 0.1 * (step + 1)), seed=step)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("options", [{}, {"rank": 16}, {"rank": 16, "lift": "fira"}], ids=["full rank", "low", "fira"])
def test_chunks_change_nothing(options, int8, bits, monkeypatch):
    """Eager code works through a few rows at a time; blocks of moments lie across the rows of this matrix."""
    ends = []
    start, gradients = torch.randn(160, 96), [torch.randn(160, 96) for _ in range(3)]
    for elements in (1 << 30, 1 << 11):
        monkeypatch.setattr(chunks, "CPU_ELEMENTS", elements)
        p = torch.nn.Parameter(QuantizedWeight.from_float(start, group_size=32) if int8 else start.clone())
        optimizer = LowRankOptimizer([{"params": [p], "state_bits": bits, **options}], lr=0.1)
        for G in gradients:
            p.grad = G.clone()
            optimizer.step()
        ends.append(p.detach().float())
    assert (ends[0] - start).abs().mean() > 0.01
    assert ((ends[0] - ends[1]).abs() > 1e-5).float().mean() < (0.01 if options or bits < 32 else 1e-6)
