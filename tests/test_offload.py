"""Recomputed layers whose inputs wait in host memory: the same gradients, and less memory on the device."""

import copy

import pytest
import torch
from support import runs
from torch import nn

from peft_pretraining.cli.args import parse_args
from peft_pretraining.model.offload import recompute
from peft_pretraining.training.memory_plan import plan_memory


def layers():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))


def gradients(model, wrap):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    hidden = x
    for layer in model:
        hidden = wrap(layer, hidden)
    hidden.square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def test_gradients_are_those_of_plain_layers():
    model = layers()
    expected = gradients(copy.deepcopy(model), lambda layer, hidden: layer(hidden))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, recompute), expected, strict=True))


def test_what_a_layer_drops_is_dropped_again():
    """And torch's own generator goes on as if layers had run once."""
    model, found = nn.ModuleList(nn.Sequential(layer, nn.Dropout(0.5)) for layer in layers()), []
    for wrap in (lambda layer, hidden: layer(hidden), recompute):
        torch.manual_seed(3)
        found.append([*gradients(copy.deepcopy(model), wrap), torch.rand(4)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_second_backward_is_refused():
    hidden = recompute(layers()[0], torch.randn(4, 8, requires_grad=True))
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        hidden.sum().backward()


@pytest.mark.parametrize(
    "flags",
    [
        dict(optimizer="adamw"),
        dict(optimizer="galore_adamw_per_layer", rank=8, gradient_accumulation=2),
        dict(optimizer="q_galore_adamw8bit_per_layer", rank=8, weight_quant=True, stochastic_round=True),
    ],
    ids=["whole", "accumulating per layer", "INT8 per layer"],
)
def test_a_run_is_the_same_to_the_last_bit(flags, tiny, tmp_path):
    shared = flags | dict(num_training_steps=6, activation_checkpointing=True)
    runs.run(tiny, tmp_path / "device", **shared)
    runs.run(tiny, tmp_path / "host", **shared, offload_activations=True)
    assert runs.losses(tmp_path / "host") == runs.losses(tmp_path / "device")


def test_the_plan_of_a_gpu_shrinks_by_the_inputs_of_the_layers():
    """Four layers and 8 x 256 tokens of 192 numbers in bfloat16; of one layer the input is on the device."""

    def activations(*flags):
        args = ["--model_config", "configs/llama_3m.json", "--dataset", "pydocs", "--batch_size", "8", *flags]
        return plan_memory(parse_args(args), dtype=torch.bfloat16).peaks["an update"].kinds["activations"]

    saved = activations("--activation_checkpointing") - activations(
        "--activation_checkpointing", "--offload_activations"
    )
    assert saved == pytest.approx(4 * 8 * 256 * 192 * 2, rel=0.3)
