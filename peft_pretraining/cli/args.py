"""The command line, parsed, checked and completed. What needs neither data nor model is checked here."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.start import inherited_args
from peft_pretraining.checkpoint.weights import is_transformers_folder
from peft_pretraining.cli.flags import FLAGS, add_flags, defaults, required
from peft_pretraining.cli.presets import preset_flags
from peft_pretraining.errors import Parser, UserError
from peft_pretraining.model.adapters import LORA_KINDS
from peft_pretraining.schedules import check_schedule
from qgalore.factory import Recipe, find_recipe
from qgalore.subspace.projector import LEARNERS, SIDE_TYPES


def parse_args(argv: list[str] | None = None, *, world_size: int = 1) -> argparse.Namespace:
    """The arguments, checked and completed: gradient_accumulation, total_batch_size, num_training_steps, the schedule,
    tokenizer and name are filled in; `ignored` has the given flags that have no effect, and why.

    argv: the command line without the program, None for sys.argv.  world_size: processes of this run.
    Raises UserError for anything that cannot be meant.
    """
    parser = Parser(
        prog="torchrun_main.py",
        description="Pre-trains a LLaMA model from scratch with a memory-efficient optimizer.",
        allow_abbrev=False,
    )
    add_flags(parser)
    given = parser.parse_args(argv)
    inherited = inherited_args(given.continue_from) if _evaluates(given) else {}
    inherited |= preset_flags(getattr(given, "preset", None))
    if missing := [f"--{name}" for name in required() if name not in vars(given) | inherited]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    args = argparse.Namespace(**defaults() | inherited | vars(given))
    _check_ranges(args)
    _check_recovery(args)
    _complete_optimizer(args, given)
    _complete_batch(args, world_size)
    _check_residual(args)
    _check_adapters(args)
    _complete_restarts(args)
    _complete_length(args)
    if args.tokenizer is None:
        args.tokenizer = "pydocs" if args.dataset == "pydocs" else "t5-base"
    if args.unset_wandb:
        args.wandb_mode = "disabled"
    if args.name is None:
        args.name = f"{Path(args.model_config).stem}-{args.optimizer}" + (f"-{args.peft}" if args.peft else "")
    return args


def _evaluates(given: argparse.Namespace) -> bool:
    """Whether only an evaluation is wanted; then what it needs to know comes from what is evaluated."""
    if getattr(given, "eval_only", False) and not hasattr(given, "continue_from"):
        raise UserError("--eval_only needs --continue_from DIR: a checkpoint, a run's folder or a transformers folder.")
    return getattr(given, "eval_only", False)


def _check_recovery(args: argparse.Namespace) -> None:
    if args.resume and not args.save_dir:
        raise UserError("--resume auto needs --save_dir DIR: the folder that it looks into.")
    for name in (args.allow_changed or "").split(","):
        if name and name not in defaults():
            raise UserError(f"--allow_changed {name}: there is no flag of that name. See --help.")


def schedule_of(args: argparse.Namespace) -> dict[str, Any]:
    """What schedules.lr_ratio wants to know besides the update."""
    names = "scheduler num_training_steps warmup_steps min_lr_ratio cycle_length restart_warmup_steps".split()
    return {name: getattr(args, name) for name in names}


def _check_ranges(args: argparse.Namespace) -> None:
    at_least_one = (
        "batch_size gradient_accumulation total_batch_size max_length num_training_steps max_train_tokens rank "
        "update_proj_gap save_every eval_every eval_tokens num_threads cycle_length max_bad_updates"
    )
    at_least_one += " queue_size gamma_proj peft_alpha"
    at_least_zero = "workers grad_clipping weight_decay warmup_steps restart_warmup_steps seed keep_last keep_every"
    at_least_zero += " max_bad_documents spike_rollback proj_lr proj_reg"
    _require(args, at_least_one, lambda value: value >= 1, "must be at least 1")
    _require(args, at_least_zero, lambda value: 0 <= value < math.inf, "must be 0 or more")
    _require(args, "lr matrix_lr_ratio galore_scale", lambda value: 0 < value < math.inf, "must be above 0")
    _require(args, "reset_every", lambda value: value >= 2, "must be at least 2: the learning rate restarts, too")
    _require(args, "beta1 beta2", lambda value: 0 <= value < 1, "must lie in [0, 1)")
    _require(args, "cos_threshold", lambda value: 0 <= value <= 1, "must lie in [0, 1]")
    _require(
        args, "weight_group_size proj_group_size", lambda value: value >= 1 or value == -1, "must be above 0, or -1"
    )
    _require(args, "weight_bits", lambda value: value == 8, "weights are kept in 8 bits only")
    _require(args, "proj_bits", lambda value: value in (4, 8), "must be 4 or 8")
    _require(args, "embedding_state_bits", lambda value: value in (8, 32), "must be 8 or 32")


def _require(args: argparse.Namespace, names: str, fits: Callable[[Any], bool], message: str) -> None:
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not fits(value):
            raise UserError(f"--{name} {value}: {message}.")


def _complete_optimizer(args: argparse.Namespace, given: argparse.Namespace) -> None:
    args.optimizer = args.optimizer.lower()
    try:
        recipe = find_recipe(args.optimizer)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.weight_quant and not recipe.ours:
        raise UserError(
            f"--weight_quant with --optimizer {args.optimizer}: only galore_*, q_galore_*, lion and *8bit can."
        )
    without_effect = _without_effect(args, recipe)
    args.ignored = {f"--{name}": why for name, why in without_effect.items() if hasattr(given, name)}
    args.proj_bits = args.proj_bits if args.proj_quant else None
    if args.cos_threshold is None:
        args.cos_threshold = recipe.lazy


def _check_residual(args: argparse.Namespace) -> None:
    """Whether what the projection leaves out can be recovered as asked; gradient_accumulation is known."""
    recipe = find_recipe(args.optimizer)
    if args.residual == "none" or not recipe.low_rank:
        return
    if recipe.rule != "adam":
        raise UserError(f"--residual {args.residual} with --optimizer {args.optimizer}: only *galore_adamw* can.")
    if args.proj_type == "full":
        raise UserError(f"--residual {args.residual} needs a side that is not projected: --proj_type full has none.")
    if recipe.per_layer and args.gradient_accumulation > 1:
        whole = args.optimizer.removesuffix("_per_layer")
        raise UserError(
            f"--residual {args.residual} needs whole gradients, and a per-layer optimizer would keep them all over "
            f"{args.gradient_accumulation} micro-batches. Take --optimizer {whole}, or one micro-batch per update."
        )


def _check_adapters(args: argparse.Namespace) -> None:
    """Whether --peft can be had with the rest."""
    if args.peft is None:
        return
    if find_recipe(args.optimizer).low_rank:
        raise UserError(
            f"--peft {args.peft} with --optimizer {args.optimizer}, which projects gradients: factors are small "
            "already. Take one without galore in its name, such as adamw."
        )
    if args.weight_quant:
        raise UserError(f"--peft {args.peft} with --weight_quant: adapters and INT8 weights exclude each other.")
    if args.reset_every is not None and args.peft != "relora":
        raise UserError(f"--reset_every {args.reset_every} with --peft {args.peft}: only --peft relora resets.")
    if args.peft not in LORA_KINDS and args.continue_from and is_transformers_folder(args.continue_from):
        raise UserError(
            f"--peft {args.peft} cannot begin with the weights of {args.continue_from}: it has factors in their place. "
            f"Use --peft {' or '.join(LORA_KINDS)}, or leave out --continue_from."
        )


def _complete_restarts(args: argparse.Namespace) -> None:
    """The scheduler and its restarts: ReLoRA's learning rate restarts with its adapters."""
    if args.peft != "relora":
        args.scheduler = args.scheduler or "cosine"
        args.restart_warmup_steps = args.restart_warmup_steps or 0
        return
    if args.reset_every is None:
        raise UserError("--peft relora needs --reset_every, the updates between resets: a quarter of the run, say.")
    for name, needed in [("scheduler", "cosine_restarts"), ("cycle_length", args.reset_every)]:
        if getattr(args, name) not in (None, needed):
            raise UserError(
                f"--{name} {getattr(args, name)} contradicts --peft relora --reset_every {args.reset_every}, where it "
                f"is {needed}. Leave it out."
            )
        setattr(args, name, needed)
    if args.restart_warmup_steps is None:
        args.restart_warmup_steps = max(1, min(100, args.reset_every // 10))


def _without_effect(args: argparse.Namespace, recipe: Recipe) -> dict[str, str]:
    """Flags that mean nothing as things are, each with what the first row that names it says of the cause."""
    low_rank = [flag.name for title, flags in FLAGS.items() if title.startswith("low-rank") for flag in flags]
    if args.peft:
        low_rank.remove("rank")
    optimizer, proj_type = f"with --optimizer {args.optimizer}", f"with --proj_type {args.proj_type}"
    lazy = args.cos_threshold is not None or recipe.lazy is not None
    learns = args.proj_type in LEARNERS
    packing = ["proj_bits", "proj_group_size"]
    rounding = ["weight_bits", "weight_group_size", "stochastic_round", "simulation"]
    rows = [
        (not recipe.low_rank, optimizer, [*low_rank, "proj_quant", *packing]),
        (args.proj_type not in SIDE_TYPES, proj_type, ["cos_threshold", "gamma_proj", "queue_size"]),
        (not learns, proj_type, ["proj_lr", "proj_reg"]),
        (learns, proj_type, ["moments_on_refresh"]),
        (args.proj_type == "random", proj_type, ["subspace"]),
        (not args.proj_quant, "without --proj_quant", packing),
        (not lazy, "without --cos_threshold", ["gamma_proj", "queue_size"]),
        (not args.weight_quant, "without --weight_quant", rounding),
        (recipe.state_bits != 8, optimizer, ["embedding_state_bits"]),
        (args.peft is None, "without --peft", ["peft_alpha", "reset_every"]),
        (args.peft not in LORA_KINDS, f"with --peft {args.peft}", ["peft_alpha"]),
        (True, optimizer, [beta for beta in ("beta1", "beta2") if beta not in recipe.betas]),
    ]
    return {name: why for holds, why, names in reversed(rows) if holds for name in names}


def _complete_batch(args: argparse.Namespace, world_size: int) -> None:
    """gradient_accumulation and total_batch_size, each from the other; where both are given they must agree."""
    if args.single_gpu and world_size > 1:
        raise UserError(f"--single_gpu with {world_size} processes: start it with --nproc_per_node 1.")
    together = args.batch_size * world_size
    processes = f"{world_size} process" + ("es" if world_size > 1 else "")
    if args.total_batch_size is None:
        args.total_batch_size = together * (args.gradient_accumulation or 1)
    micro_batches, rest = divmod(args.total_batch_size, together)
    if rest or micro_batches == 0:
        tries = " or ".join(str(n * together) for n in (micro_batches, micro_batches + 1) if n)
        raise UserError(
            f"--total_batch_size {args.total_batch_size} is not a multiple of --batch_size {args.batch_size} x "
            f"{processes}. Try {tries}."
        )
    if args.gradient_accumulation not in (None, micro_batches):
        raise UserError(
            f"--gradient_accumulation {args.gradient_accumulation} contradicts --total_batch_size "
            f"{args.total_batch_size}: at --batch_size {args.batch_size} x {processes} it is {micro_batches}. "
            "Leave one of them out."
        )
    args.gradient_accumulation = micro_batches


def _complete_length(args: argparse.Namespace) -> None:
    """num_training_steps from the tokens, where they are given, and the schedule's warm-up."""
    per_update = args.total_batch_size * args.max_length
    if args.max_train_tokens is not None:
        args.num_training_steps = args.max_train_tokens // per_update
        if args.num_training_steps == 0:
            raise UserError(f"--max_train_tokens {args.max_train_tokens}: one update alone takes {per_update} tokens.")
    if args.warmup_steps is None:
        args.warmup_steps = min(1000, args.num_training_steps // 10)
    check_schedule(**schedule_of(args))
