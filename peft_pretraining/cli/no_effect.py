"""Flags that mean nothing beside others, and why. An option says what it needs to have an effect, see Option.needs."""

import argparse

from peft_pretraining.cli.flags import FLAGS
from peft_pretraining.model.adapters import LORA_KINDS
from qgalore.factory import Recipe, find_recipe
from qgalore.options import GROUP_OPTIONS
from qgalore.rules.rules import RULES
from qgalore.subspace.projector import LEARNERS, SIDE_TYPES, SMALLEST


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    """Flags that mean nothing as things are, each with the reason."""
    recipe = find_recipe(args.optimizer)
    missing = {name: why for name, (holds, why) in _conditions(args, recipe).items() if not holds}
    found = {}
    for name, each in FLAGS.items():
        if why := next((missing[condition] for condition in each.option.needs if condition in missing), None):
            found[name] = why
        elif each.name in recipe.matrix and each.name in GROUP_OPTIONS:
            found[name] = f"with --optimizer {args.optimizer}"
    return found


def _conditions(args: argparse.Namespace, recipe: Recipe) -> dict[str, tuple[bool, str]]:
    """What options need to have an effect (Option.needs): whether it holds, and what is said where it does not."""
    optimizer, proj_type = f"with --optimizer {args.optimizer}", f"with --proj_type {args.proj_type}"
    learns, lora = args.proj_type in LEARNERS, args.peft in LORA_KINDS
    return {
        "projected": (recipe.projected, optimizer),
        "skips": (recipe.low_rank_engine, optimizer),
        "per_layer": (recipe.per_layer, optimizer),
        "rank": (recipe.projected or args.peft is not None, optimizer),
        "scaled": ((recipe.projected and RULES[recipe.rule].finish is None) or "scale" in recipe.uses, optimizer),
        "beta1": ("beta1" in recipe.uses, optimizer),
        "beta2": ("beta2" in recipe.uses, optimizer),
        "elsewhere": (recipe.rule_elsewhere, optimizer),
        "moments8": (recipe.state_bits == 8, optimizer),
        "ranked": (recipe.ranked, optimizer),
        "sided": (args.proj_type in (*SIDE_TYPES, SMALLEST), proj_type),
        "learns": (learns, proj_type),
        "refreshed": (not learns, proj_type),
        "computed": (args.proj_type != "random", proj_type),
        "packed": (args.proj_quant, "without --proj_quant"),
        "lazy": (args.cos_threshold is not None or recipe.lazy_threshold is not None, "without --cos_threshold"),
        "texts": (args.task == "pretrain", f"with --task {args.task}"),
        "weight_quant": (args.weight_quant, "without --weight_quant"),
        "recomputes": (args.activation_checkpointing, "without --activation_checkpointing"),
        "peft": (args.peft is not None, "without --peft"),
        "lora": (args.peft is None or lora, f"with --peft {args.peft}"),
    }
