"""A model's shape, read from a JSON file and checked before anything is built."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from peft_pretraining.errors import UserError
from peft_pretraining.json_files import read_json
from peft_pretraining.model.family import DEFAULT, FAMILIES, Family

NUMBERS = ("rms_norm_eps", "initializer_range", "rope_theta", "attention_dropout")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
FOREIGN = ("quantization_config", "auto_map")  # of weights and code that are not used
OUTPUTS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}  # what a model must return
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_config(path: str | Path) -> PreTrainedConfig:
    """Reads a model's shape from one of our JSON files, from the GaLore family's repositories, or from the hub.

    In the second, max_sequence_length stands for max_position_embeddings, and pad_token_id -1 for none; so does one
    beyond the vocabulary. Taken literally it becomes the embedding's padding_idx, which freezes a row. The file's dtype
    is not read, because the command line decides. How the file's weights are quantized, and code of its own, do not
    matter here, and are dropped with a warning.
    Raises UserError if the file is missing, broken, or describes no model that can be built.
    """
    path = Path(path)
    fields = read_json(path)
    if (kind := str(fields.get("model_type", DEFAULT))) not in FAMILIES:
        known = " and ".join(map(repr, FAMILIES))
        raise UserError(f"{path}: model_type is {kind!r}, but only {known} can be trained here.")
    family = FAMILIES[kind]
    _check_sizes(path, fields)
    _check_numbers(path, fields)
    if "max_sequence_length" in fields:
        fields.setdefault("max_position_embeddings", fields.pop("max_sequence_length"))
    pad = fields.get("pad_token_id")
    if isinstance(pad, int) and not 0 <= pad < fields["vocab_size"]:
        fields["pad_token_id"] = None
    for name in FOREIGN:
        if fields.pop(name, None) is not None:
            logger.warning(f"{path}: {name} is left out; the model is trained from its shape alone")
    for name, value in OUTPUTS.items():
        if fields.pop(name, value) != value:
            logger.warning(f"{path}: {name} is left out; models are trained with {json.dumps(value)}")
    fields["architectures"] = [family.model.__name__]
    for name in ("model_type", "dtype", "torch_dtype", "transformers_version"):
        fields.pop(name, None)
    try:
        config = family.config(**fields)
    except Exception as error:  # transformers' own checks raise classes of many kinds
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    _check_parts(path, config)
    _check_that_it_builds(path, family, fields)
    return config


def _check_parts(path: Path, config: PreTrainedConfig) -> None:
    """Raises UserError for heads that cannot share, and an activation or rotary embedding that is unknown."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads  # the latter has a default of its own
    if heads % shared:
        raise UserError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}.")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for name, value, known in [
        ("hidden_act", config.hidden_act, list(ACT2FN)),
        ("rope_type", rope, ["default", *ROPE_INIT_FUNCTIONS]),
    ]:
        if value not in known:
            close = difflib.get_close_matches(str(value), known, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise UserError(f"{path}: {name} {value!r} is unknown. {hint}Known: {', '.join(sorted(known))}.")


def _check_that_it_builds(path: Path, family: Family, fields: dict[str, Any]) -> None:
    """Builds one layer without memory, and the rotary embedding. Raises UserError if transformers cannot."""
    small = {name: value for name, value in fields.items() if name != "layer_types"} | {"num_hidden_layers": 1}
    try:
        config = family.config(**small)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        type(family.part("rotary", model))(config=config)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: transformers cannot build this model ({type(error).__name__}: {reason}).") from error


def _check_numbers(path: Path, fields: dict[str, Any]) -> None:
    for name in NUMBERS:
        value = fields.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
        ):
            raise UserError(f"{path}: {name} must be a number, 0 or more, not {json.dumps(value)}.")
    if fields.get("rope_theta") == 0:
        raise UserError(f"{path}: rope_theta must be a number above 0, not 0.")
    if (dropped := fields.get("attention_dropout") or 0) >= 1:
        raise UserError(f"{path}: attention_dropout must be below 1, not {json.dumps(dropped)}.")
    for name in SWITCHES:
        if fields.get(name) not in (None, True, False):
            raise UserError(f"{path}: {name} must be true or false, not {json.dumps(fields[name])}.")


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
    if hidden % heads and not fields.get("head_dim"):
        raise UserError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    if (fields.get("head_dim") or hidden // heads) % 2:
        raise UserError(
            f"{path}: hidden_size {hidden} / num_attention_heads {heads} is an odd head size; rotary embeddings turn "
            "pairs and need an even one."
        )
