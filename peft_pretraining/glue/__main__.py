"""Fine-tunes a model for classification: plan, then train by the loop of torchrun_main.py."""

import argparse
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from loguru import logger
from transformers.utils import logging as transformers_logging

from peft_pretraining.checkpoint.run_folder import RunFolder
from peft_pretraining.checkpoint.start import StartingPoint, check_data, check_validation, choose_start
from peft_pretraining.checkpoint.writer import CheckpointWriter
from peft_pretraining.cli.args import settings_of
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.distributed import World, make_deterministic, use_threads
from peft_pretraining.errors import UserError
from peft_pretraining.glue.args import CHANGEABLE, complete_length, parse_args
from peft_pretraining.glue.batches import Encoded, training_batches
from peft_pretraining.glue.data import Examples, load_examples
from peft_pretraining.glue.evaluate import Judge, loss_sum
from peft_pretraining.glue.model import HubTokenizer, in_order_of_model, open_config, open_model, open_tokenizer
from peft_pretraining.glue.rates import lr_ratio
from peft_pretraining.model.build import check_compiler
from peft_pretraining.model.dtypes import resolve_dtype
from peft_pretraining.training.exit_status import exit_status
from peft_pretraining.training.interruption import Interruption
from peft_pretraining.training.loop import loop
from peft_pretraining.training.metrics import Record, open_record, set_up_log
from peft_pretraining.training.plan import open_updates
from peft_pretraining.training.provenance import circumstances, device_name
from peft_pretraining.training.report import format_table
from peft_pretraining.training.run import Run, Task
from peft_pretraining.training.saving import begin
from qgalore.factory import find_recipe
from qgalore.param_groups import ParameterGroup, frozen_parameters


def main(argv: list[str] | None = None, *, began: float) -> None:
    """The whole run. Raises UserError for what the user can repair, before anything slow; Interrupted on a signal.

    began: the start of --time_budget, on the clock of time.monotonic.
    """
    world = World.from_environment()
    set_up_log(is_main=world.is_main)
    args = parse_args(argv, world_size=world.size)
    if args.compile:
        check_compiler(world.device)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    use_threads(world, num_threads=args.num_threads)
    make_deterministic(args.seed)
    with ExitStack() as cleanup:
        examples, tokenizer = load_examples(args), open_tokenizer(args)
        complete_length(args, examples=len(examples.train))
        config = open_config(args, task=examples.task, tokenizer=tokenizer)
        examples = in_order_of_model(examples, config)
        start, save_dir = open_folder(args, config=config, examples=examples, world=world, cleanup=cleanup)
        cleanup.enter_context(world.connected())
        deadline = began + (args.time_budget or math.inf)
        interruption = cleanup.enter_context(Interruption(deadline=deadline).listening())
        run = open_run(
            args, config=config, examples=examples, tokenizer=tokenizer, start=start, save_dir=save_dir, world=world,
            interruption=interruption, cleanup=cleanup,
        )  # fmt: skip
        begin(run, start)
        loop(run)


def open_folder(
    args: argparse.Namespace, *, config: Any, examples: Examples, world: World, cleanup: ExitStack
) -> tuple[StartingPoint, Path | None]:
    """Where the run begins, and its folder, see RunFolder."""
    folder = RunFolder(args.save_dir, named=args.name, owned=world.is_main, cleanup=cleanup)
    start = choose_start(args, config=config, may_change=CHANGEABLE)
    if start.weights is not None and args.save_dir and start.weights.resolve() == Path(args.save_dir).resolve():
        raise UserError(f"--output_dir {args.save_dir} is the folder of the model to begin with. Choose another one.")
    now = examples.fingerprint()
    check_data({"train": now.pop("train")}, start=start, args=args)
    check_validation(now, start=start)
    return start, folder.path(checkpoint=start.folder)


def open_run(
    args: argparse.Namespace,
    *,
    config: Any,
    examples: Examples,
    tokenizer: HubTokenizer,
    start: StartingPoint,
    save_dir: Path | None,
    world: World,
    interruption: Interruption,
    cleanup: ExitStack,
) -> Run:
    """The run before its first update. `cleanup` closes in reverse order what the run holds open."""
    folder = Path(world.gather(str(save_dir))[0])  # the main rank has made it
    data, judge = open_data(args, examples=examples, tokenizer=tokenizer)
    model, groups = open_model(args, config=config, dtype=resolve_dtype(args.dtype, world.device), device=world.device)
    described = describe_groups(model, groups, args)
    log_plan(args, described, examples=examples, world=world)
    try:
        updates = open_updates(args, model=model, groups=groups)
    except ValueError as error:  # options that exclude each other
        raise UserError(f"--method {args.method}: {error}.") from error
    for group in updates.optimizer.param_groups:  # as transformers and GaLore's script have it
        if all(p.ndim < 2 for p in group["params"]):
            group["weight_decay"] = 0.0
    batches = training_batches(
        data, batch_size=args.batch_size, accumulation=args.gradient_accumulation, seed=args.seed, world=world,
        resume=start.saved.get("position"),
    )  # fmt: skip
    writer = CheckpointWriter(folder, keep_last=args.keep_last)
    cleanup.callback(writer.wait)
    record = Record()
    if world.is_main:
        record = open_record(args, save_dir=folder, wandb_id=start.saved.get("wandb_id"))
        record.event("start", **circumstances(args, world=world, groups=described, norm=updates.norm_of))
    cleanup.callback(record.close)
    fingerprint = examples.fingerprint()
    return Run(
        args=args, world=world, save_dir=folder, model=model, updates=updates, batches=batches, validation=None,
        record=record, interruption=interruption, writer=writer if world.is_main else None,
        tokenizer=cast(Tokenizer, tokenizer),  # of which a run asks its files and digest only
        fingerprint={"train": fingerprint.pop("train")}, validation_fingerprint=fingerprint,
        task=Task(loss_sum=loss_sum, lr_ratio=lr_ratio, evaluate=judge.evaluate, save_result=judge.finish),
    )  # fmt: skip


def open_data(args: argparse.Namespace, *, examples: Examples, tokenizer: HubTokenizer) -> tuple[Encoded, Judge]:
    """The tokenized examples to learn from, and those to be judged by."""
    pad_to = args.max_length if args.pad_to_max_length else None

    def encode(split: Any) -> Encoded:
        return Encoded(split, tokenizer=tokenizer.tokenizer, max_length=args.max_length, pad_to=pad_to)

    splits = {name: encode(split) for name, split in examples.evaluations.items()}
    return encode(examples.train), Judge(examples.task.metrics, splits, tokenizer.tokenizer, numbers=examples.numbers)


def describe_groups(model: Any, groups: tuple[ParameterGroup, ...], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each group of parameters: name, tensors, elements, trained_by. Frozen parameters come last."""
    recipe, settings = find_recipe(args.optimizer), settings_of(args)
    adapters = f"LoRA, rank {args.rank}, alpha {args.peft_alpha}" if args.peft else "full rank"
    rows = [
        (group, recipe.describe(group, settings, unprojected=adapters if group.kind == "matrix" else "full rank"))
        for group in groups
    ]
    bits = f", {args.weight_bits}-bit weights of linear layers" if args.weight_quant else ""
    rows += [(group, f"nothing{bits}") for group in frozen_parameters(model)]
    return [
        {"name": group.name, "tensors": len(group.parameters), "elements": group.elements, "trained_by": trained_by}
        for group, trained_by in rows
    ]


def log_plan(args: argparse.Namespace, groups: list[dict[str, Any]], *, examples: Examples, world: World) -> None:
    """Logs how each group of parameters is trained, flags without effect, and the run's length."""
    total = sum(group["elements"] for group in groups)
    bits = f", linear layers in INT{args.weight_bits}" if args.weight_quant else ""
    logger.info(f"{args.model_name_or_path}: {total:,} parameters{bits} on {device_name(world.device)}")
    logger.info(f"--method {args.method} trains each group of parameters by:\n" + format_table(groups))
    for flag, why in args.ignored.items():
        logger.warning(f"{flag} has no effect {why}")
    sizes = ", ".join(f"{len(split)} of {name}" for name, split in examples.evaluations.items())
    logger.info(
        f"{args.num_training_steps} updates of {args.total_batch_size} examples, {args.updates_per_epoch} to an epoch "
        f"of {len(examples.train)}; judged by {sizes}: {', '.join(examples.task.metrics)}"
    )


def command_line(argv: list[str] | None = None, *, began: float | None = None) -> int:
    """Runs main. Returns the exit status, see exit_status. began: the start of --time_budget; None for now."""
    return exit_status(lambda: main(argv, began=time.monotonic() if began is None else began))
