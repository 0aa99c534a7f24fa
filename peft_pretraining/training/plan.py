"""What a run is going to do: decided, checked and logged before anything slow, then built."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_pretraining.checkpoint.run_folder import RunFolder, check_save_dir
from peft_pretraining.checkpoint.start import StartingPoint, check_data, check_tokenizer, check_validation, choose_start
from peft_pretraining.checkpoint.writer import CheckpointWriter
from peft_pretraining.cli.args import set_length, settings_of
from peft_pretraining.cli.config_file import save_config
from peft_pretraining.cli.flags import MAY_CHANGE
from peft_pretraining.cli.no_effect import without_effect
from peft_pretraining.cli.presets import load_preset
from peft_pretraining.data.chat import ChatTemplate, chat_tokenizer
from peft_pretraining.data.epochs import measure_epoch
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.sources import DocumentSource, open_documents
from peft_pretraining.data.token_shards import check_tokens
from peft_pretraining.data.tokenizer import Tokenizer, TransformersTokenizer, check_fits, load_tokenizer
from peft_pretraining.data.validation import ValidationSet
from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from peft_pretraining.export.tokenizer import to_transformers
from peft_pretraining.model.adapters import Adapters
from peft_pretraining.model.build import check_compiler, freeze_by_flags, meta_model, prepare_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.dtypes import DTYPES, resolve_dtype
from peft_pretraining.model.sharding import Sharding, check_rows, is_sharded
from peft_pretraining.progress import LongWait
from peft_pretraining.training.expectation import expectation_sinks
from peft_pretraining.training.interruption import Interruption
from peft_pretraining.training.metrics import Record, open_record
from peft_pretraining.training.provenance import circumstances, device_name
from peft_pretraining.training.report import format_table
from peft_pretraining.training.run import Run
from qgalore.factory import create_optimizer, create_updates, find_recipe
from qgalore.param_groups import ParameterGroup, frozen_parameters, split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage import int8_products
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is going to do. A plan takes hardly any memory or time."""

    args: argparse.Namespace  # the completed command line
    world: World  # this process among the others
    config: PreTrainedConfig  # the model's shape
    dtype: torch.dtype  # dtype of the model's weights
    groups: list[dict[str, Any]]  # how each group of parameters is trained, see describe_groups
    start: StartingPoint  # where the run begins
    save_dir: Path | None  # the run's folder; only the main rank knows that of a new run without --save_dir
    tokenizer: Tokenizer  # a tokenizer that fits the model's vocabulary
    source: DocumentSource  # the training documents
    held_out: DocumentSource  # the validation documents
    fingerprint: dict[str, str]  # identifies the training data, see DocumentSource
    validation_fingerprint: dict[str, str]  # identifies the validation data

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments that training batches and validation batches share."""
        return dict(
            batch_size=self.args.batch_size,
            max_length=self.args.max_length,
            packing=self.args.packing,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.world.device,
        )


def make_plan(args: argparse.Namespace, *, world: World, cleanup: ExitStack) -> Plan:
    """Decides, checks and logs what a run is going to do, and makes its folder. Raises UserError.

    `cleanup` gives the folder back to others.
    """
    config, dtype = _check_model(args, world=world)
    if args.num_train_epochs is not None:
        set_length(args, updates=updates_of_epochs(args, config=config))
    structure = meta_model(config, adapters=Adapters.of(vars(args)))
    freeze_by_flags(structure, args)
    groups = describe_groups(structure, args)
    check_sharding(args, model=structure, ranks=world.rows_over(args.parallel))
    log_plan(args, groups=groups, dtype=dtype, world=world)
    trains = world.is_main and not (args.dry_run or args.eval_only)
    folder = RunFolder(args.save_dir, named=args.model_config, owned=trains, cleanup=cleanup)
    start = choose_start(args, config=config, may_change=MAY_CHANGE)
    tokenizer = open_tokenizer(args, config=config)
    source, held_out = _open_documents(args, tokenizer)
    logger.info(f"training on {source.name}, validating on {held_out.name}, tokenizer {tokenizer.name}")
    fingerprint, validation_fingerprint = source.fingerprint(), held_out.fingerprint()
    check_data(fingerprint, start=start, args=args)
    check_validation(validation_fingerprint, start=start)
    check_tokenizer(tokenizer.digest(), start=start, args=args)
    save_dir = folder.path(checkpoint=start.folder)
    if args.dry_run and save_dir:
        check_save_dir(save_dir)
    return Plan(
        args=args, world=world, config=config, dtype=dtype, groups=groups, start=start, save_dir=save_dir,
        tokenizer=tokenizer, source=source, held_out=held_out, fingerprint=fingerprint,
        validation_fingerprint=validation_fingerprint,
    )  # fmt: skip


def open_tokenizer(args: argparse.Namespace, *, config: PreTrainedConfig) -> Tokenizer:
    """The tokenizer that --tokenizer names; for dialogues with a chat template. Raises UserError if it does not fit."""
    tokenizer = load_tokenizer(args.tokenizer)
    check_fits(tokenizer, vocab_size=config.vocab_size)
    if args.task != "sft":
        return tokenizer
    converted = to_transformers(tokenizer, max_length=config.max_position_embeddings)
    return chat_tokenizer(TransformersTokenizer(converted, name=args.tokenizer), vocab_size=config.vocab_size)


def check_sharding(args: argparse.Namespace, *, model: PreTrainedModel, ranks: int) -> None:
    """Raises UserError if so many processes cannot share out this model's rows. model: may be on the meta device."""
    if args.parallel != "ddp":
        recipe, settings = find_recipe(args.optimizer), settings_of(args)
        check_rows(model, ranks=ranks, settings=settings, recipe=recipe, quantized=args.weight_quant)


def _check_model(args: argparse.Namespace, *, world: World) -> tuple[PreTrainedConfig, torch.dtype]:
    """The model's config and the dtype of its weights. Raises UserError if they cannot be trained here."""
    config = read_config(args.model_config)
    dtype = resolve_dtype(args.dtype, world.device)
    if args.compile:
        check_compiler(world.device)
    if args.int8_matmul is not None and args.weight_quant:
        try:
            int8_products.check_device(world.device)
        except ValueError as error:
            raise UserError(f"--int8_matmul {args.int8_matmul}: {error}. Leave it out.") from None
    if args.weight_quant and args.embedding_weight_bits is not None and config.tie_word_embeddings:
        raise UserError(
            f"--embedding_weight_bits {args.embedding_weight_bits}: {args.model_config} ties the head to the "
            "embedding, and a shared weight cannot be quantized. Leave it out."
        )
    if args.max_length > (longest := config.max_position_embeddings):
        raise UserError(f"--max_length {args.max_length}: {args.model_config} allows at most {longest}.")
    return config, dtype


def _open_documents(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[DocumentSource, DocumentSource]:
    """The training and the validation documents.

    Raises UserError if one of them has no document, or was tokenized by another tokenizer.
    """
    template = ChatTemplate(tokenizer) if isinstance(tokenizer, TransformersTokenizer) and args.task == "sft" else None
    shared = dict(seed=args.seed, validation=args.validation, text_field=args.text_field, template=template)
    source, held_out = (open_documents(args.dataset, split=split, **shared) for split in ("train", "validation"))
    for documents in (source, held_out):
        documents.check()
        check_tokens(documents, tokenizer)
    return source, held_out


def updates_of_epochs(args: argparse.Namespace, *, config: PreTrainedConfig) -> int:
    """The updates that --num_train_epochs take, from the sequences of the first. The same on every rank."""
    tokenizer = open_tokenizer(args, config=config)
    source, _ = _open_documents(args, tokenizer)
    with LongWait("counting the dialogues of an epoch"):
        found = measure_epoch(source, tokenizer, packing=args.packing, max_length=args.max_length)
    logger.info(
        f"an epoch has {found.dialogues:,} dialogues in {found.sequences:,.0f} sequences, {found.filled:.0%} full"
    )
    if not found.sequences:
        raise UserError(
            f"{source.name}: none of {found.dialogues:,} dialogues has an answer within --max_length "
            f"{args.max_length}. Give a longer one."
        )
    return max(1, round(args.num_train_epochs * found.sequences / args.total_batch_size))


def describe_groups(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each group of parameters: name, tensors, elements, trained_by. Frozen parameters come last.

    model: the model with its adapters, which may be on the meta device.
    """
    recipe, settings, adapters = find_recipe(args.optimizer), settings_of(args), Adapters.of(vars(args))
    matrices = "full rank" if adapters is None else adapters.describe()
    rows = []
    try:
        split = recipe.split(split_parameters(model), settings)
    except ValueError as error:
        raise UserError(f"--{error}.") from None
    for group in split:
        unprojected = matrices if group.kind == "matrix" else "full rank"
        bits = args.weight_bits if group.kind == "matrix" else args.embedding_weight_bits
        quantized = args.weight_quant and adapters is None and bits is not None and group.kind != "norm"
        weights = f"INT{bits} weights, " if quantized else ""
        rows.append((group, weights + recipe.describe(group, settings, unprojected=unprojected)))
    bits = args.weight_bits if args.weight_quant else None
    kept = "nothing" if adapters is None else adapters.describe_frozen(bits=bits)
    rows += [(group, kept) for group in frozen_parameters(model)]
    return [
        {"name": group.name, "tensors": len(group.parameters), "elements": group.elements, "trained_by": trained_by}
        for group, trained_by in rows
    ]


def log_plan(args: argparse.Namespace, *, groups: list[dict[str, Any]], dtype: torch.dtype, world: World) -> None:
    """Logs the preset, the size of the model, how each group is trained, flags without effect, the run's length."""
    if args.preset is not None:
        logger.info(f"preset {args.preset}: {load_preset(args.preset).describe()}")
    total, kind = sum(group["elements"] for group in groups), str(dtype).removeprefix("torch.")
    logger.info(f"{args.model_config}: {total:,} parameters in {kind} on {device_name(world.device)}")
    logger.info("how each group of parameters is trained:\n" + format_table(groups))
    for flag, why in args.ignored.items():
        logger.warning(f"{flag} has no effect {why}")
    if args.grad_clipping and find_recipe(args.optimizer).per_layer:
        logger.info(f"clipping: each parameter's own projected gradient, to norm {args.grad_clipping:g}")
    epochs = "" if args.num_train_epochs is None else f", {args.num_train_epochs:g} epochs"
    logger.info(
        f"{args.num_training_steps} updates{epochs} of {args.total_batch_size} x {args.max_length} tokens: "
        f"{args.gradient_accumulation} micro-batches of {args.batch_size} on {world.size} x {torch.get_num_threads()} "
        "threads"
    )


def open_validation(plan: Plan) -> ValidationSet:
    """The validation batches of this rank. Raises UserError if there is no document."""
    return ValidationSet(plan.held_out, plan.tokenizer, tokens=plan.args.eval_tokens, **plan.reading)


def open_model(plan: Plan) -> PreTrainedModel:
    """The model on this rank's device, with weights drawn from the seed."""
    world, ranks = plan.world, plan.world.rows_over(plan.args.parallel)
    spread = ranks > 1 and not plan.args.eval_only
    sharding = Sharding(world.device, ranks=ranks, replicas=world.size // ranks) if spread else None
    return prepare_model(plan.args, config=plan.config, dtype=plan.dtype, device=world.device, sharding=sharding)


def open_run(plan: Plan, *, interruption: Interruption, cleanup: ExitStack) -> Run:
    """The run before its first update. `cleanup` closes in reverse order what the run holds open."""
    args, world, saved = plan.args, plan.world, plan.start.saved
    save_dir = Path(world.gather(str(plan.save_dir))[0])  # the main rank has made it
    validation = open_validation(plan)
    # Before the model exists, because the workers are forks of this process.
    position = saved.get("position", saved.get("positions"))  # until November 2026, one for each rank
    batches = train_batches(plan.source, plan.tokenizer, workers=args.workers, resume=position, **plan.reading)
    cleanup.callback(batches.close)
    model = open_model(plan)
    updates = open_updates(args, model=model)
    writer = CheckpointWriter(save_dir, keep_last=args.keep_last, keep_every=args.keep_every)
    cleanup.callback(writer.wait)
    record = Record()
    if world.is_main:
        expected = expectation_sinks(args, validation=plan.validation_fingerprint)
        record = open_record(args, save_dir=save_dir, wandb_id=saved.get("wandb_id"), last=expected)
    cleanup.callback(record.close)
    if world.is_main:
        begun_with_weights = plan.start.weights is not None  # else --continue_from is not part of the run
        save_config(args, save_dir, leave_out=[*without_effect(args), *["continue_from"] * (not begun_with_weights)])
        record.event("start", **circumstances(args, world=world, groups=plan.groups, norm=updates.norm_of))
    return Run(
        args=args, world=world, save_dir=save_dir, model=model, updates=updates, batches=batches, validation=validation,
        record=record, interruption=interruption, writer=writer if world.is_main else None,
        tokenizer=plan.tokenizer, fingerprint=plan.fingerprint, validation_fingerprint=plan.validation_fingerprint,
    )  # fmt: skip


def open_updates(
    args: argparse.Namespace, *, model: PreTrainedModel, groups: Sequence[ParameterGroup] | None = None
) -> WholeModelUpdates | PerLayerUpdates:
    """The optimizer that the arguments name over the model's parameters, and the object that applies its updates.

    groups: the parameters by kind; None for those of split_parameters.
    """
    recipe = find_recipe(args.optimizer)
    sync = GradSync(
        at_rank_size=recipe.low_rank_engine and (recipe.per_layer or not args.grad_clipping),
        enabled=not is_sharded(model),
        order=reversed(list(model.parameters())),
    )
    groups = split_parameters(model) if groups is None else groups
    optimizer = create_optimizer(args.optimizer, groups=groups, settings=settings_of(args), sync=sync)
    return create_updates(
        args.optimizer,
        optimizer=optimizer,
        sync=sync,
        accumulation=args.gradient_accumulation,
        clip=args.grad_clipping,
        accumulation_dtype=DTYPES.get(args.accumulation_dtype),
        accumulate_on_host=args.accumulate_on == "host",
    )
