"""Causal attention over full sequences: torch's fused kernels, and no mask to think about.

For every forward pass transformers looks whether the positions begin anew within a row, which would need a mask, and so
waits for the GPU to finish all that it has been given. Rows here are full sequences; transformers makes no mask for an
attention function that it has no mask function for.
"""

from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peft_pretraining.model.family import family_of

CAUSAL = "causal_sdpa"

AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def attention_for(config: PreTrainedConfig) -> str:
    """The name of the attention function for a model. Where a layer may look at a window only, masks are needed."""
    return CAUSAL if family_of(config).full_attention else "sdpa"
