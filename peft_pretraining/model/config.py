"""A model's shape, read from a JSON file and checked before anything is built."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from peft_pretraining.errors import UserError
from peft_pretraining.json_files import read_json
from peft_pretraining.model.family import DEFAULT, FAMILIES

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_config(path: str | Path) -> PreTrainedConfig:
    """Reads a model's shape from one of our JSON files, or from those of the GaLore family's repositories.

    There, max_sequence_length stands for max_position_embeddings, and pad_token_id -1 for "none": taken literally it
    becomes the embedding's padding_idx and freezes the vocabulary's last row. The file's dtype is not read: the
    command line decides. Raises UserError where the file is missing, broken or describes no model that can be built.
    """
    path = Path(path)
    fields = read_json(path)
    if (kind := fields.get("model_type", DEFAULT)) not in FAMILIES:
        known = " and ".join(map(repr, FAMILIES))
        raise UserError(f"{path}: model_type is {kind!r}, but only {known} can be trained here.")
    family = FAMILIES[kind]
    _check_sizes(path, fields)
    if "max_sequence_length" in fields:
        fields.setdefault("max_position_embeddings", fields.pop("max_sequence_length"))
    if isinstance(pad := fields.get("pad_token_id"), int) and pad < 0:
        fields["pad_token_id"] = None
    fields["architectures"] = [family.model.__name__]
    for name in ("model_type", "dtype", "torch_dtype", "transformers_version"):
        fields.pop(name, None)
    try:
        return family.config(**fields)
    except Exception as error:  # transformers' own checks raise classes of many kinds
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def _check_sizes(path: Path, fields: dict[str, Any]) -> None:
    optional = ("max_sequence_length", "max_position_embeddings", "num_key_value_heads", "head_dim")
    for name in SIZES + tuple(name for name in optional if fields.get(name) is not None):
        if name not in fields:
            raise UserError(f"{path}: {name} is missing. It must be a whole number above 0.")
        value = fields[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {name} must be a whole number above 0, not {json.dumps(value)}.")
    _check_heads(path, fields)


def _check_heads(path: Path, fields: dict[str, Any]) -> None:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if hidden % heads:
        raise UserError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    if (fields.get("head_dim") or hidden // heads) % 2:
        raise UserError(
            f"{path}: hidden_size {hidden} / num_attention_heads {heads} is an odd head size; rotary embeddings turn "
            "pairs and need an even one."
        )
    if heads % (fields.get("num_key_value_heads") or heads):
        raise UserError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{fields['num_key_value_heads']}."
        )
