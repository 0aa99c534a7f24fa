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
    """One architecture. Parts are named as attributes of the model, such as `model.embed_tokens`.

    config: transformers' class of its configurations.
    model: transformers' class of the model with its head.
    body: the part that turns token ids into the last hidden states.
    layers: the list of its decoder layers, which are alike.
    embedding: the token embedding, an nn.Embedding.
    rotary: the rotary embedding, whose buffers are computed from the configuration and are in no checkpoint.
    head: the linear layer from hidden states to logits.
    norm: the end of the names of its norms' classes; their weights begin as ones.
    own_shape: fields of the configuration that, besides those in SHAPE, change what the weights compute.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    body: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    norm: str = "RMSNorm"
    own_shape: tuple[str, ...] = ()

    def part(self, name: str, model: nn.Module) -> Any:
        """The part of a model that a field names, such as "embedding"."""
        return attrgetter(getattr(self, name))(model)

    @property
    def embedding_weight(self) -> str:
        """The name of the embedding's parameter."""
        return f"{self.embedding}.weight"

    @property
    def head_weight(self) -> str:
        """The name of the head's parameter; where it is tied, the embedding's stands for both."""
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
    "llama": Family(config=LlamaConfig, model=LlamaForCausalLM, own_shape=("mlp_bias",)),
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
