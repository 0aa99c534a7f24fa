"""The ways to fine-tune a model: METHODS has a row for each, and the matrices that they are about."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peft_pretraining.errors import UserError


@dataclass(frozen=True)
class Method:
    """One row of the table.

    optimizer: name of qgalore.OPTIMIZERS.
    adapters: whether LoRA's factors and the classifier are trained, and nothing else.
    weight_bits: bits of the weights of linear layers, the classifier's excepted, if nothing else is asked for; None for
        floating point.
    flags: flags of torchrun_main.py that belong to it.
    """

    optimizer: str
    adapters: bool = False
    weight_bits: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)


Q_GALORE = {"proj_quant": True, "proj_bits": 4, "stochastic_round": True}
METHODS: dict[str, Method] = {
    "full": Method("adamw"),
    "full_8bit": Method("adamw8bit"),
    "lora": Method("adamw", adapters=True),
    "qlora": Method("adamw", adapters=True, weight_bits=4),
    "galore": Method("galore_adamw"),
    "galore_8bit": Method("galore_adamw8bit"),
    "q_galore": Method("q_galore_adamw8bit_per_layer", weight_bits=8, flags=Q_GALORE),
    "apollo": Method("apollo"),
}

# Parts of the names of the linear layers that are projected or get adapters: those that GaLore's script takes with
# --lora_all_modules, and without it. Keys are model types, or parts of them.
MODULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bert": (("query", "value", "key", "intermediate.dense", "output.dense"), ("query",)),
    "llama": (
        ("q_proj", "v_proj", "up_proj", "down_proj", "gate_proj", "k_proj", "o_proj"),
        ("q_proj", "v_proj"),
    ),
}


def chosen_layers(model: PreTrainedModel, *, all_modules: bool) -> list[str]:
    """The names of the linear layers that are projected or get adapters.

    all_modules: whether they are all of attention and MLP; else as few as in GaLore's script.
    Raises UserError for a kind of model that MODULES does not have.
    """
    kind = model.config.model_type
    row = next((names for part, names in MODULES.items() if part in kind), None)
    if row is None:
        raise UserError(f"--model_name_or_path: a model of type {kind}; known are those with {' or '.join(MODULES)}.")
    parts = row[0 if all_modules else 1]
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _any(parts, name)]


def _any(parts: tuple[str, ...], name: str) -> bool:
    return any(part in name for part in parts)
