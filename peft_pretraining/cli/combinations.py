"""Which flags go together: those of the optimizer with each other, with adapters, and with several processes.

Each function raises UserError for what cannot be done, and fills in what follows from the rest.
"""

import argparse

from peft_pretraining.checkpoint.weights import is_transformers_folder
from peft_pretraining.errors import UserError
from peft_pretraining.model.adapters import LORA_KINDS
from qgalore.factory import find_recipe
from qgalore.options import has_momentum
from qgalore.rules.rules import RULES
from qgalore.rules.skips import SKIPS
from qgalore.subspace.bases import METHODS


def complete_int8_matmul(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """INT8 products need one scale a row: the group size follows, unless another one was asked for."""
    if args.int8_matmul is None or not args.weight_quant:
        return
    told = f"--int8_matmul {args.int8_matmul}"
    if args.weight_bits != 8 or args.simulation:
        raise UserError(f"{told} multiplies 8-bit codes: leave out --weight_bits {args.weight_bits} and --simulation.")
    if getattr(given, "weight_group_size", -1) != -1:
        raise UserError(f"{told} needs one group a row: leave out --weight_group_size {args.weight_group_size}.")
    args.weight_group_size = -1


def check_subspace(args: argparse.Namespace) -> None:
    """Whether bases can be computed as asked."""
    recipe = find_recipe(args.optimizer)
    chosen = recipe.projected and "subspace" not in recipe.matrix
    if chosen and METHODS[args.subspace].averages and args.proj_type == "full":
        raise UserError(
            f"--subspace {args.subspace} with --proj_type full: it has one projected side. Take --proj_type std."
        )


def check_skips(args: argparse.Namespace) -> None:
    """Whether updates can be skipped as asked."""
    recipe = find_recipe(args.optimizer)
    if not recipe.low_rank_engine or not SKIPS[args.skip_updates].remembers:
        return
    if not has_momentum(recipe.rule):
        raise UserError(
            f"--skip_updates {args.skip_updates} with --optimizer {args.optimizer}, which keeps no momentum of a "
            "matrix' size to compare gradients with. Take --skip_updates skip."
        )
    if args.parallel != "ddp":
        raise UserError(
            f"--parallel {args.parallel} with --skip_updates {args.skip_updates}, which compares all rows of a matrix. "
            "Take --skip_updates skip."
        )


def check_residual(args: argparse.Namespace) -> None:
    """Whether what the projection leaves out can be recovered as asked; gradient_accumulation is known."""
    recipe = find_recipe(args.optimizer)
    if args.residual == "none" or not recipe.projected:
        return
    if recipe.rule not in ("adam", "muon"):
        raise UserError(
            f"--residual {args.residual} with --optimizer {args.optimizer}: only *galore_adamw* and *galore_muon* can."
        )
    if args.proj_type == "full":
        raise UserError(f"--residual {args.residual} needs a side that is not projected: --proj_type full has none.")
    if recipe.per_layer and args.gradient_accumulation > 1 and args.accumulate_on == "device":
        whole = args.optimizer.removesuffix("_per_layer")
        raise UserError(
            f"--residual {args.residual} needs whole gradients, and a per-layer optimizer would keep them all over "
            f"{args.gradient_accumulation} micro-batches. Take --accumulate_on host, --optimizer {whole}, or one "
            "micro-batch per update."
        )


def check_feedback(args: argparse.Namespace) -> None:
    """Whether the first moment can take the rounding error of the weights in."""
    recipe, told = find_recipe(args.optimizer), f"--error_feedback {args.error_feedback}"
    if args.error_feedback == "none":
        return
    if not recipe.low_rank_engine or recipe.projected or RULES[recipe.rule].absorb is None or args.beta1 == 0:
        raise UserError(
            f"{told} with --optimizer {args.optimizer}: it needs Adam's first moment of every weight, with --beta1 "
            "above 0. Take --optimizer adamw8bit."
        )
    if not args.weight_quant:
        raise UserError(f"{told} without --weight_quant: there is no rounding error to feed back. Add --weight_quant.")
    if args.skip_updates != "none":
        raise UserError(f"{told} with --skip_updates {args.skip_updates}: leave one of them out.")


def check_adapters(args: argparse.Namespace) -> None:
    """Whether --peft can be had with the rest."""
    if args.peft is None:
        return
    if find_recipe(args.optimizer).projected:
        raise UserError(
            f"--peft {args.peft} with --optimizer {args.optimizer}, which projects gradients: factors are small "
            "already. Take one that does not project, such as adamw."
        )
    if args.weight_quant:
        _check_frozen_base(args)
    if args.reset_every is not None and args.peft != "relora":
        raise UserError(f"--reset_every {args.reset_every} with --peft {args.peft}: only --peft relora resets.")
    if args.peft not in LORA_KINDS and args.continue_from and is_transformers_folder(args.continue_from):
        raise UserError(
            f"--peft {args.peft} cannot begin with the weights of {args.continue_from}: it has factors in their place. "
            f"Use --peft {' or '.join(LORA_KINDS)}, or leave out --continue_from."
        )


def _check_frozen_base(args: argparse.Namespace) -> None:
    """Whether adapters can stand on quantized weights, which stay as they are (QLoRA)."""
    if args.peft != "lora":
        raise UserError(
            f"--peft {args.peft} with --weight_quant: only the weights below lora stay as they are. Take --peft lora, "
            "or leave out --weight_quant."
        )
    for flag in ("embedding_weight_bits", "int8_matmul"):
        if getattr(args, flag) is not None:
            raise UserError(
                f"--{flag} {getattr(args, flag)} with --peft lora: only the matrices are quantized. Leave it out."
            )


def complete_parallel(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Whether the rows of all parameters can be spread over processes; matrices are then projected on the right."""
    if args.parallel == "ddp":
        return
    mode = f"--parallel {args.parallel}"
    if args.freeze_others:
        raise UserError(f"{mode} with --freeze_others: rows of frozen weights are not spread. Leave one of them out.")
    recipe, told = find_recipe(args.optimizer), f"{mode} with --optimizer {args.optimizer}"
    if args.peft is not None:
        raise UserError(f"{mode} with --peft {args.peft}: adapters are small. Leave out --parallel.")
    kinds = (recipe.matrix, recipe.embedding, recipe.head, recipe.norm)
    needs_all = [rule for rule in (kind.get("rule", "adam") for kind in kinds) if RULES[rule].separable is None]
    if needs_all or args.optimizer == "adafactor":
        raise UserError(f"{told}, which needs all rows of a matrix at once. Take another one, such as galore_adamw.")
    if "lift" in recipe.matrix or (recipe.projected and args.residual != "none"):
        what = told if "lift" in recipe.matrix else f"{mode} with --residual {args.residual}"
        raise UserError(f"{what}, which needs the norms of all rows. Take galore_adamw without --residual, say.")
    if recipe.projected and getattr(given, "proj_type", "right") != "right":
        raise UserError(
            f"{mode} with --proj_type {args.proj_type}: rows are spread over the processes, so matrices are "
            "projected on the right. Leave it out, or take --proj_type right."
        )
    if recipe.projected and METHODS[args.subspace].averages:
        raise UserError(f"{mode} with --subspace {args.subspace}, which needs all rows of a gradient. Leave it out.")
    if recipe.projected:
        args.proj_type = "right"
    if args.check_replicas:
        args.ignored["--check_replicas"] = f"with {mode}: rows are spread over the processes"
