"""The command line, parsed, checked and completed. What needs neither data nor model is checked here."""

import argparse
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.start import inherited_args
from peft_pretraining.checkpoint.weights import is_transformers_folder
from peft_pretraining.cli.combinations import (
    check_adapters,
    check_feedback,
    check_residual,
    check_skips,
    check_subspace,
    complete_int8_matmul,
    complete_parallel,
)
from peft_pretraining.cli.config_file import read_config_file
from peft_pretraining.cli.flags import FLAGS, add_flags, defaults, required
from peft_pretraining.cli.help import show_help
from peft_pretraining.cli.no_effect import without_effect
from peft_pretraining.cli.presets import preset_flags
from peft_pretraining.errors import Parser, UserError
from peft_pretraining.model.adapters import LORA_KINDS
from peft_pretraining.schedules import check_schedule
from qgalore.factory import find_recipe
from qgalore.options import Settings, declared

PATHS = ("model_config", "dataset", "validation", "tokenizer", "continue_from", "save_dir")
LENGTHS = ("num_training_steps", "max_train_tokens", "num_train_epochs")  # how long a run is, said in three ways


def parse_args(argv: list[str] | None = None, *, world_size: int = 1) -> argparse.Namespace:
    """The arguments, checked and completed.

    Filled in are gradient_accumulation, total_batch_size, num_training_steps, the schedule, tokenizer and name;
    `ignored` holds the given flags that have no effect, and why; with --fit, `given` has the names of all given flags.
    The command line wins over the file of --config, this over --preset, and this over what an evaluation inherits.
    argv: the command line without the program; None for sys.argv. With --help, prints that and exits.
    world_size: processes of this run.
    Raises UserError for anything that cannot be meant.
    """
    argv = sys.argv[1:] if argv is None else argv
    show_help(argv)
    parser = Parser(prog="torchrun_main.py", allow_abbrev=False, add_help=False)
    add_flags(parser)
    given = parser.parse_args(argv)
    if hasattr(given, "config"):
        given = argparse.Namespace(**over(read_config_file(Path(given.config), parser=parser), vars(given)))
    inherited = _layers(given, world_size=world_size)
    if missing := [f"--{name}" for name in required() if inherited.get(name) is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    args = argparse.Namespace(**defaults() | inherited)
    if args.fit is not None:
        args.given = sorted(vars(given))
    _check_ranges(args)
    _check_recovery(args)
    _check_task(args, inherited)
    _complete_optimizer(args, given)
    _complete_batch(args, world_size)
    complete_int8_matmul(args, given)
    check_subspace(args)
    check_skips(args)
    check_residual(args)
    check_feedback(args)
    check_adapters(args)
    complete_parallel(args, given)
    _complete_restarts(args)
    _complete_length(args)
    if args.tokenizer is None:
        if args.task == "sft":
            raise UserError("--task sft needs --tokenizer, or --continue_from a transformers folder that holds one.")
        args.tokenizer = default_tokenizer(args.dataset)
    if args.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard.")
    if args.unset_wandb:
        args.wandb_mode = "disabled"
    if args.name is None:
        args.name = f"{Path(args.model_config).stem}-{args.optimizer}" + (f"-{args.peft}" if args.peft else "")
    return args


def _layers(given: argparse.Namespace, *, world_size: int) -> dict[str, Any]:
    """The given flags over those of a preset, over what an evaluation or a fine-tuning inherits."""
    inherited = inherited_args(given.continue_from) if _evaluates(given) else _of_start(given)
    inherited = over(inherited, preset_flags(getattr(given, "preset", None)))
    if getattr(given, "fit", None) is not None:
        inherited |= _open_batch(given, inherited, world_size)
    inherited = over(inherited, vars(given))
    if inherited.get("task") == "sft" and inherited.get("packing") is None:
        inherited["packing"] = "whole"
    return inherited


def over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Two layers of flags as one: the upper wins. Of flags that say the same in several ways, it wins over all."""
    found = lower | upper
    for ways in LENGTHS, ("gradient_accumulation", "total_batch_size"):
        for name, twin in permutations(ways, 2):
            if upper.get(name) is not None and twin not in upper:
                found.pop(twin, None)
    return found


def _of_start(given: argparse.Namespace) -> dict[str, Any]:
    """Model and tokenizer of the transformers folder that is fine-tuned, for which no others need be named."""
    start = getattr(given, "continue_from", None)
    if getattr(given, "task", None) != "sft" or start is None or not is_transformers_folder(start):
        return {}
    return {name: value for name, value in inherited_args(start).items() if name in ("model_config", "tokenizer")}


def _check_task(args: argparse.Namespace, chosen: Mapping[str, Any]) -> None:
    """Whether the data flags fit the task. Epochs, whose length is not known yet, give way to a given length.

    chosen: the flags that were given, also by a file or a preset.
    """
    if args.task == "sft" and args.packing == "concat":
        raise UserError(
            "--packing concat with --task sft: dialogues would see each other. Take whole, or truncate for one in each "
            "sequence."
        )
    if args.task == "pretrain" and args.packing == "whole":
        raise UserError("--packing whole is for the dialogues of --task sft. Take concat or truncate.")
    if args.task == "pretrain" and args.num_train_epochs is not None:
        raise UserError(
            f"--num_train_epochs {args.num_train_epochs:g} is for --task sft. Give --num_training_steps or "
            "--max_train_tokens."
        )
    if any(chosen.get(name) is not None for name in LENGTHS if name != "num_train_epochs"):
        args.num_train_epochs = None
    if args.freeze_others is None:
        args.freeze_others = args.task == "sft" and args.peft in LORA_KINDS


def default_tokenizer(dataset: str) -> str:
    """The tokenizer of a data set for which none is named."""
    return "pydocs" if dataset == "pydocs" else "t5-base"


def _open_batch(given: argparse.Namespace, inherited: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The batch before --fit has chosen it: whole. Empty where it is given. Ranges are checked later."""
    if getattr(given, "batch_size", None) is not None:
        return {}
    total = (inherited | vars(given)).get("total_batch_size")
    if total is None or getattr(given, "gradient_accumulation", None) is not None:
        raise UserError(
            "--fit chooses --batch_size so that an update stays the same: give --total_batch_size, the sequences of an "
            "update, and leave out --gradient_accumulation. Or give --batch_size, and only savings are chosen."
        )
    return {"batch_size": max(1, total // world_size), "gradient_accumulation": None}


def with_flags(args: argparse.Namespace, flags: Mapping[str, Any], *, world_size: int = 1) -> argparse.Namespace:
    """Completed arguments with other values of some flags; the update keeps its sequences.

    Raises UserError for flags that contradict the others or have no effect beside them.
    """
    changed = argparse.Namespace(**{**vars(args), **flags})
    recipe = find_recipe(changed.optimizer)
    if changed.weight_quant and changed.peft is None and not recipe.low_rank_engine:
        raise UserError(f"--weight_quant with --optimizer {changed.optimizer}")
    if useless := sorted(flags.keys() & without_effect(changed).keys()):
        raise UserError(f"--{useless[0]} would have no effect")
    if "proj_quant" in flags:
        changed.proj_bits = (args.proj_bits or 4) if changed.proj_quant else None
    changed.gradient_accumulation = None
    _complete_batch(changed, world_size)
    complete_int8_matmul(changed, argparse.Namespace())
    check_residual(changed)
    check_adapters(changed)
    return changed


def _evaluates(given: argparse.Namespace) -> bool:
    """Whether only an evaluation is wanted; then what it needs to know comes from what is evaluated."""
    if getattr(given, "eval_only", False) and not hasattr(given, "continue_from"):
        raise UserError("--eval_only needs --continue_from DIR: a checkpoint, a run's folder or a transformers folder.")
    return getattr(given, "eval_only", False)


def _check_recovery(args: argparse.Namespace) -> None:
    if args.resume and not args.save_dir:
        raise UserError("--resume auto needs --save_dir DIR: the folder that it looks into.")
    names = [name.strip() for name in (args.allow_changed or "").split(",")]
    for name in names:
        if name and name not in defaults():
            raise UserError(f"--allow_changed {name}: there is no flag of that name. See --help.")
    args.allow_changed = args.allow_changed and ",".join(names)


def schedule_of(args: argparse.Namespace) -> dict[str, Any]:
    """What schedules.lr_ratio wants to know besides the update."""
    names = "scheduler num_training_steps warmup_steps min_lr_ratio cycle_length restart_warmup_steps".split()
    return {name: getattr(args, name) for name in names}


def _check_ranges(args: argparse.Namespace) -> None:
    """Refuses what no option may be: out of range, or empty, as by --continue_from "$FORGOTTEN"."""
    for name, each in FLAGS.items():
        if problem := each.option.problem(getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)}: {problem}.")
    for name in PATHS:
        if getattr(args, name, None) == "":
            raise UserError(f"--{name} is empty: give it a value, or leave it out.")


def _complete_optimizer(args: argparse.Namespace, given: argparse.Namespace) -> None:
    args.optimizer = args.optimizer.lower()
    try:
        recipe = find_recipe(args.optimizer)
    except ValueError as error:
        raise UserError(str(error).replace("unknown optimizer", "unknown --optimizer", 1)) from None
    if args.weight_quant and args.peft is None and not recipe.low_rank_engine:
        raise UserError(
            f"--weight_quant with --optimizer {args.optimizer}: torch's own optimizers cannot write quantized weights. "
            "Take another one, such as q_galore_adamw8bit."
        )
    args.ignored = {
        f"--{name}": why
        for name, why in without_effect(args).items()
        if hasattr(given, name) and getattr(given, name) is not None and getattr(given, name) is not False
    }
    args.proj_bits = (args.proj_bits or 4) if args.proj_quant else None
    if args.cos_threshold is None:
        args.cos_threshold = recipe.lazy_threshold


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
    """num_training_steps from the tokens, where they are given, and the schedule's warm-up.

    A run of epochs is completed when their dialogues have been counted, see set_length.
    """
    if args.num_train_epochs is not None:
        return
    per_update = args.total_batch_size * args.max_length
    if args.max_train_tokens is not None:
        args.num_training_steps = args.max_train_tokens // per_update
        if args.num_training_steps == 0:
            raise UserError(f"--max_train_tokens {args.max_train_tokens}: one update alone takes {per_update} tokens.")
    _complete_schedule(args)


def set_length(args: argparse.Namespace, *, updates: int) -> None:
    """Gives a run of epochs its length in updates, and its schedule."""
    args.num_training_steps = updates
    _complete_schedule(args)


def _complete_schedule(args: argparse.Namespace) -> None:
    if args.warmup_steps is None:
        args.warmup_steps = min(1000, args.num_training_steps // 10)
    check_schedule(**schedule_of(args))


def settings_of(args: argparse.Namespace) -> Settings:
    """What the arguments choose of the optimizer."""
    chosen = {each.name: getattr(args, each.flag) for each in declared(Settings)}
    return Settings(**chosen, seed=args.seed, compile=args.compile)
