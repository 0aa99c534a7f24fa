"""The architectures that can be trained: one row each, with transformers' classes and where their parts are.

Nothing else in this program names an architecture's classes or modules. Another one that is built alike, decoder layers
between an embedding and a linear head with RMSNorms and rotary embeddings, is another row.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)


@dataclass(frozen=True)
class Family:
    """One architecture. Parts are named as attributes of the model, such as `model.embed_tokens`."""

    config: type[PreTrainedConfig]  # transformers' class of the configuration
    model: type[PreTrainedModel]  # transformers' class of the model with its head
    body: str = "model"  # turns token ids into the last hidden states
    layers: str = "model.layers"  # the decoder layers, which are alike
    embedding: str = "model.embed_tokens"  # an nn.Embedding
    rotary: str = "model.rotary_emb"  # its buffers are computed from the configuration and are in no checkpoint
    head: str = "lm_head"  # the linear layer from hidden states to logits
    norm: str = "RMSNorm"  # the end of the names of the norms' classes; their weights begin as ones
    mlp: str = "MLP"  # the end of the name of the MLPs' class, which have gate_proj, up_proj, down_proj and act_fn
    full_attention: bool = False  # whether no option of the configuration makes a layer look at fewer earlier tokens
    own_shape: tuple[str, ...] = ()  # fields besides those in SHAPE that change what the weights compute

    def part(self, name: str, model: nn.Module) -> Any:
        """The part of a model that a field names, such as "embedding"."""
        return attrgetter(getattr(self, name))(model)

    @property
    def embedding_weight(self) -> str:
        """The name of the embedding's parameter."""
        return f"{self.embedding}.weight"

    @property
    def head_weight(self) -> str:
        """The name of the head's parameter. If it is tied, the embedding's parameter stands for both."""
        return f"{self.head}.weight"

    @property
    def shape(self) -> tuple[str, ...]:
        """The fields of the configuration that make two models of this architecture different."""
        return SHAPE + self.own_shape


# Fields that all architectures here have; rope_parameters come on top.
SHAPE = tuple(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
    "hidden_act rms_norm_eps tie_word_embeddings attention_bias".split()
)

# By model_type, as transformers and config.json name it.
FAMILIES: dict[str, Family] = {
    "llama": Family(config=LlamaConfig, model=LlamaForCausalLM, full_attention=True, own_shape=("mlp_bias",)),
    "qwen3": Family(
        config=Qwen3Config,
        model=Qwen3ForCausalLM,
        own_shape=("use_sliding_window", "sliding_window", "max_window_layers"),
    ),
}
DEFAULT = "llama"  # the model_type of a file that names none


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a model's configuration."""
    return FAMILIES[config.model_type]
