"""LLaMAs of two layers with adapters, and without."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pretraining.model.adapters import Adapters
from peft_pretraining.model.build import build_model

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=40
)  # fmt: skip
LORA, LOW_RANK = Adapters("lora", rank=4, alpha=8), Adapters("low_rank", rank=4, alpha=8)
UP_PROJ = "model.layers.1.mlp.up_proj"


def build(adapters: Adapters | None, *, dtype: torch.dtype = torch.float32, **config: object) -> LlamaForCausalLM:
    """On the CPU, of one seed; config: what differs from CONFIG."""
    shape = LlamaConfig(**CONFIG.to_dict() | config)
    return build_model(shape, device="cpu", dtype=dtype, seed=3, adapters=adapters)
