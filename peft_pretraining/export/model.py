"""A trained model as a plain one in memory, whatever it is kept in: a transformers folder, a checkpoint, adapters."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from peft_pretraining.checkpoint.files import CONFIG, STATE, Checkpoint, find_checkpoint
from peft_pretraining.checkpoint.weights import StoredWeights, is_transformers_folder, load_weights, open_checkpoint
from peft_pretraining.data.tokenizer import Tokenizer, check_fits, load_tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.model.adapters import Adapters, merging
from peft_pretraining.model.build import build_model
from peft_pretraining.model.config import read_config


def open_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    """The model, in evaluation mode, and its tokenizer.

    folder: a transformers folder, a checkpoint, or a run's folder, whose newest checkpoint is taken.
    Raises UserError if one of them cannot be read, or does not fit the other.
    """
    if is_transformers_folder(folder):
        model = build_model(read_config(folder / CONFIG), device=device, dtype=dtype, seed=0)
        tokenizer = load_tokenizer(str(folder))
        check_fits(tokenizer, vocab_size=model.config.vocab_size)
        load_weights(model, folder)
        return model.eval(), tokenizer
    checkpoint = Checkpoint.open(find_checkpoint(folder)).verify()
    tokenizer = tokenizer_of(checkpoint, config=read_config(checkpoint.file(CONFIG)))
    weights = open_checkpoint(checkpoint.folder)
    model = merged_model(weights, Adapters.of(args_of(checkpoint)), device=device, dtype=dtype)
    return model.eval(), tokenizer


@torch.no_grad()
def merged_model(
    weights: StoredWeights, adapters: Adapters | None, *, device: torch.device | str = "cpu", dtype: torch.dtype
) -> PreTrainedModel:
    """The model of a checkpoint as one without adapters and quantized weights."""
    model = build_model(read_config(weights.folder / CONFIG), device=device, dtype=dtype, seed=0)
    read = merging(weights.read, adapters, names=weights.names())
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    return model


def tokenizer_of(checkpoint: Checkpoint, *, config: PreTrainedConfig) -> Tokenizer:
    """The run's tokenizer, from the checkpoint or by its name. Raises UserError if it cannot be found."""
    spec = checkpoint.tokenizer or args_of(checkpoint).get("tokenizer")
    if spec is None:
        raise UserError(f"{checkpoint.folder / STATE} does not name it.")
    tokenizer = load_tokenizer(str(spec))
    check_fits(tokenizer, vocab_size=config.vocab_size)
    return tokenizer


def args_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of the run that the checkpoint is of."""
    return checkpoint.state.get("args", {})
