"""Everybody's ways to save a model and its optimizer, with weights in 8 and 4 bits and without."""

import io

import accelerate
import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, load_model, save_file, save_model
from support.contract import data_of, model_of, optimizer_of, same, train, weights
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from qgalore import dequantize_linear_layers, quantize_linear_layers
from qgalore.storage.quantized_weight import QuantizedWeight

every_weight = pytest.mark.parametrize("bits", [None, 8, 4])


def trained(bits=8, name="q_galore_adamw8bit"):
    model = model_of(bits=bits, dtype=torch.bfloat16)
    optimizer = optimizer_of(name, model)
    train(model, optimizer, data_of(4))
    return model, optimizer


def untrained(bits=8, name="q_galore_adamw8bit"):
    model = model_of(bits=bits, dtype=torch.bfloat16)
    return model, optimizer_of(name, model)


def by_torch(model, path):
    torch.save(model.state_dict(), path)
    return lambda other: other.load_state_dict(torch.load(path, weights_only=True))


def by_torch_assigned(model, path):
    torch.save(model.state_dict(), path)
    return lambda other: other.load_state_dict(torch.load(path, weights_only=True), assign=True)


def by_safetensors(model, path):
    save_file(model.state_dict(), path)
    return lambda other: other.load_state_dict(load_file(path))


def by_safetensors_model(model, path):
    save_model(model, str(path))
    return lambda other: load_model(other, path)


@every_weight
@pytest.mark.parametrize("save", [by_torch, by_torch_assigned, by_safetensors, by_safetensors_model])
def test_weights_come_back_bit_for_bit(save, bits, tmp_path):
    model, _ = trained(bits)
    load = save(model, tmp_path / "model")
    other, _ = untrained(bits)
    load(other)
    assert same(weights(model), weights(other))
    kind = QuantizedWeight if bits else torch.Tensor
    assert isinstance(other.mlp[0].weight.data, kind) and other.mlp[0].weight.requires_grad


@every_weight
def test_the_file_is_as_small_as_the_model(bits, tmp_path):
    model, _ = trained(bits)
    save_file(model.state_dict(), tmp_path / "model")
    held = sum(tensor.nbytes for tensor in weights(model))
    assert held < (tmp_path / "model").stat().st_size < held + 4096


@every_weight
def test_a_whole_module_is_pickled(bits):
    model, _ = trained(bits)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same(weights(model), weights(torch.load(file, weights_only=False)))


@every_weight
@pytest.mark.parametrize("name", ["q_galore_adamw8bit", "galore_adamw", "muon", "adamw"])
def test_distributed_checkpoints(name, bits, tmp_path):
    """Which call parameters by their names, and step a fresh optimizer once to see what its state looks like."""
    if name == "adamw" and bits:
        pytest.skip("torch's optimizers do not train weights in 8 or 4 bits")
    model, optimizer = trained(bits, name)
    held, states = get_state_dict(model, optimizer)
    dcp.save({"model": held, "optimizer": states}, checkpoint_id=tmp_path)
    other, restored = untrained(bits, name)
    held, states = get_state_dict(other, restored)
    loaded = {"model": held, "optimizer": states}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(other, restored, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert same(weights(model), weights(other))
    train(model, optimizer, data_of(4, seed=2))
    train(other, restored, data_of(4, seed=2))
    assert same(weights(model), weights(other))


@every_weight
def test_accelerate(bits, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*untrained(bits))
    train(model, optimizer, data_of(4))
    accelerator.save_state(tmp_path)
    saved = weights(model)
    losses = train(model, optimizer, data_of(4, seed=2))
    accelerator.load_state(tmp_path)
    assert same(saved, weights(model))
    assert train(model, optimizer, data_of(4, seed=2)) == losses


def test_floating_weights_are_rounded_to_the_grid_of_the_quantized_one():
    model, floats = model_of(bits=8), model_of()
    model.load_state_dict(floats.state_dict())
    error = (model.mlp[0].weight.float() - floats.mlp[0].weight).abs().max()
    assert 0 < error <= 0.501 * model.mlp[0].weight.scale.max()


@pytest.mark.parametrize("other", [{"bits": 4}, {"group_size": 12}], ids=str)
def test_weights_quantized_in_another_way_are_refused_in_words(other):
    model, wrong = model_of(bits=8), model_of()
    quantize_linear_layers(wrong, select=lambda name: "mlp" in name, **{"bits": 8, "group_size": 36, **other})
    before = wrong.mlp[0].weight.float()
    with pytest.raises(RuntimeError, match=r"mlp.0.weight: .*Quantize the model as the saved one was"):
        wrong.load_state_dict(model.state_dict())
    assert torch.equal(before, wrong.mlp[0].weight.float())


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    quantize_linear_layers(model, select=lambda name: "mlp" in name)
    return model


def test_a_dequantized_model_is_as_any_other(tmp_path):
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    values, logits = model.model.layers[0].mlp.up_proj.weight.dequantize(), model(torch.arange(9)[None]).logits
    names = dequantize_linear_layers(model)
    assert [name.split(".")[-2] for name in names] == ["gate_proj", "up_proj", "down_proj"]
    assert type(model.model.layers[0].mlp.up_proj.weight.data) is torch.Tensor
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, values)
    assert torch.allclose(loaded(torch.arange(9)[None]).logits, logits, atol=0.02)


def test_save_pretrained_of_a_quantized_model_comes_back(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    other = llama()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_merges_into_a_quantized_base(safe):
    """The frozen base is rounded to nearest, once; unmerging takes it back as far as rounding allows."""
    model = llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], r=4))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    before, expected = weights(model), adapted(torch.arange(9)[None]).logits
    merged = adapted.merge_and_unload(safe_merge=safe)
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight.data, QuantizedWeight) and not same(before, weights(merged))
    assert torch.allclose(merged(torch.arange(9)[None]).logits, expected, atol=0.02)


def test_arithmetic_in_place_on_a_weight_that_is_trained_is_refused():
    """Also through `.data`, as some optimizers write: small updates would be lost by rounding to nearest."""
    weight = model_of(bits=8).mlp[0].weight
    for target in (weight.data, weight.detach()):
        with pytest.raises(ValueError, match="lose small updates"):
            target.add_(1e-4)
    with pytest.raises(ValueError, match="cannot be replaced"):
        weight.data = torch.zeros(weight.shape)
