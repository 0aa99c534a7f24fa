"""Models of quantized weights, always the same ones."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qgalore.storage.convert import quantize_linear_layers


def mlp() -> nn.Sequential:
    """96 -> 80 -> 48, in float32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 80), nn.SiLU(), nn.Linear(80, 48, bias=False))


def quantized_mlp(*, simulation: bool = False, **settings) -> nn.Sequential:
    """The same with codes for weights."""
    model = mlp()
    quantize_linear_layers(model, simulation=simulation, **settings)
    return model


def tiny_llama(*, simulation: bool = False, **settings) -> LlamaForCausalLM:
    """Two layers, all their projections in codes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config)
    names = quantize_linear_layers(model, select=lambda name: name != "lm_head", simulation=simulation, **settings)
    assert len(names) == 14
    return model.train()


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of all parameters by name."""
    return {name: p.grad for name, p in model.named_parameters()}
