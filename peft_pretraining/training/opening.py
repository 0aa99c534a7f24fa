"""A run, put together from its plan: data, model, optimizer, writer and record."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedModel

from peft_pretraining.checkpoint.writer import CheckpointWriter
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.validation import ValidationSet
from peft_pretraining.model.build import prepare_model
from peft_pretraining.model.dtypes import DTYPES
from peft_pretraining.training import provenance
from peft_pretraining.training.interruption import Interruption
from peft_pretraining.training.metrics import Record, open_record
from peft_pretraining.training.plan import Plan
from peft_pretraining.training.run import Run
from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates


def open_validation(plan: Plan) -> ValidationSet:
    """The validation batches of this rank. Raises UserError where there is no document."""
    return ValidationSet(plan.held_out, plan.tokenizer, tokens=plan.args.eval_tokens, **plan.reading)


def open_model(plan: Plan) -> PreTrainedModel:
    """The model on this rank's device, with weights drawn from the seed."""
    return prepare_model(plan.args, config=plan.config, dtype=plan.dtype, device=plan.world.device)


def open_run(plan: Plan, *, interruption: Interruption, cleanup: ExitStack) -> Run:
    """The run before its first update. What it holds open is closed by `cleanup`, in reverse order."""
    args, world, saved = plan.args, plan.world, plan.start.saved
    save_dir = Path(world.gather(str(plan.save_dir))[0])  # its name may hold the time, which ranks read for themselves
    validation = open_validation(plan)
    # Before the model is there: the workers are forks of this process.
    positions = saved.get("positions")
    batches = train_batches(plan.source, plan.tokenizer, workers=args.workers, resume=positions, **plan.reading)
    cleanup.callback(batches.close)
    model = open_model(plan)
    sync = GradSync(at_rank_size=plan.recipe.low_rank_engine and (plan.recipe.per_layer or not args.grad_clipping))
    updates = open_updates(args, model=model, settings=plan.settings, sync=sync)
    writer = CheckpointWriter(save_dir, keep_last=args.keep_last, keep_every=args.keep_every)
    cleanup.callback(writer.wait)
    record = open_record(args, save_dir=save_dir, wandb_id=saved.get("wandb_id")) if world.is_main else Record()
    cleanup.callback(record.close)
    threads, norm = plan.threads, updates.norm_of
    if world.is_main:
        record.event(
            "start", **provenance.circumstances(args, world=world, threads=threads, groups=plan.groups, norm=norm)
        )
    return Run(
        args=args, world=world, save_dir=save_dir, model=model, updates=updates, batches=batches, validation=validation,
        record=record, interruption=interruption, writer=writer if world.is_main else None,
        fingerprint=plan.fingerprint,
    )  # fmt: skip


def open_updates(
    args: argparse.Namespace, *, model: PreTrainedModel, settings: Settings, sync: GradSync
) -> WholeModelUpdates | PerLayerUpdates:
    """The optimizer that the arguments name over the model's parameters, and what drives it."""
    optimizer = create_optimizer(args.optimizer, groups=split_parameters(model), settings=settings, sync=sync)
    return create_updates(
        args.optimizer,
        optimizer=optimizer,
        sync=sync,
        accumulation=args.gradient_accumulation,
        clip=args.grad_clipping,
        accumulation_dtype=DTYPES.get(args.accumulation_dtype),
    )
