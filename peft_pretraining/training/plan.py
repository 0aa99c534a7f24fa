"""What a run is going to do, decided and checked before anything slow: model, optimizer, start, data."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from transformers import PreTrainedConfig

from peft_pretraining.checkpoint.start import StartingPoint, check_data, choose_start
from peft_pretraining.checkpoint.writer import choose_save_dir, prepare_save_dir
from peft_pretraining.cli.args import settings_of
from peft_pretraining.cli.flags import MAY_CHANGE
from peft_pretraining.data.sources import DocumentSource, open_documents
from peft_pretraining.data.tokenizer import Tokenizer, check_fits, load_tokenizer
from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from peft_pretraining.model.adapters import Adapters
from peft_pretraining.model.build import check_compiler, meta_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.dtypes import resolve_dtype
from peft_pretraining.training import report
from qgalore.factory import Recipe, Settings, find_recipe


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is going to do. Nothing of it takes memory or time to speak of.

    args: the completed command line.
    world: this process among the others.
    threads: CPU threads of this process.
    config: the model's shape.
    dtype: the dtype of its weights.
    recipe: what the optimizer's name stands for.
    settings: the optimizer's settings.
    groups: who is trained how, see report.describe_groups.
    start: where the run begins.
    save_dir: its folder, as this rank has chosen it.
    tokenizer: the tokenizer, which fits the model's vocabulary.
    source: the training documents.
    held_out: the validation documents.
    fingerprint: what the training data is, see DocumentSource.
    """

    args: argparse.Namespace
    world: World
    threads: int
    config: PreTrainedConfig
    dtype: torch.dtype
    recipe: Recipe
    settings: Settings
    groups: list[dict[str, Any]]
    start: StartingPoint
    save_dir: Path
    tokenizer: Tokenizer
    source: DocumentSource
    held_out: DocumentSource
    fingerprint: dict[str, str]

    @property
    def reading(self) -> dict[str, Any]:
        """What training and validation batches have in common."""
        return dict(
            batch_size=self.args.batch_size,
            max_length=self.args.max_length,
            packing=self.args.packing,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.world.device,
        )


def make_plan(args: argparse.Namespace, *, world: World, threads: int, preset: str | None = None) -> Plan:
    """Decides, checks and logs what a run is going to do, and makes its folder. Raises UserError.

    threads: CPU threads of this process.
    preset: what the preset is, in one line; None without one.
    """
    config, dtype = read_shape(args, device=world.device)
    recipe = find_recipe(args.optimizer)
    settings = settings_of(args)
    groups = describe_training(args, config=config, recipe=recipe, settings=settings)
    report.log_plan(args, groups=groups, dtype=dtype, world=world, threads=threads, preset=preset)
    start = choose_start(args, config=config, may_change=MAY_CHANGE)
    save_dir = choose_save_dir(args.save_dir, model_config=args.model_config, checkpoint=start.folder)
    if world.is_main and not (args.dry_run or args.eval_only):
        prepare_save_dir(save_dir)
    tokenizer, source, held_out = open_data(args, vocab_size=config.vocab_size)
    fingerprint = check_data(source.fingerprint(), start=start, args=args)
    return Plan(
        args=args, world=world, threads=threads, config=config, dtype=dtype, recipe=recipe, settings=settings,
        groups=groups, start=start, save_dir=save_dir, tokenizer=tokenizer, source=source, held_out=held_out,
        fingerprint=fingerprint,
    )  # fmt: skip


def read_shape(args: argparse.Namespace, *, device: torch.device) -> tuple[PreTrainedConfig, torch.dtype]:
    """The model's config and the dtype of its weights. Raises UserError where they cannot be trained here."""
    config = read_config(args.model_config)
    dtype = resolve_dtype(args.dtype, device)
    if args.compile:
        check_compiler(device)
    if args.max_length > config.max_position_embeddings:
        raise UserError(
            f"--max_length {args.max_length}: {args.model_config} ends at {config.max_position_embeddings}."
        )
    return config, dtype


def describe_training(
    args: argparse.Namespace, *, config: PreTrainedConfig, recipe: Recipe, settings: Settings
) -> list[dict[str, Any]]:
    """Who is trained how, a record for each group of parameters, before any of them exists."""
    adapters = Adapters.of(vars(args))
    blueprint = meta_model(config, adapters=adapters)
    return report.describe_groups(
        blueprint,
        recipe=recipe,
        settings=settings,
        weight_bits=args.weight_bits if args.weight_quant else None,
        adapters=adapters,
    )


def open_data(args: argparse.Namespace, *, vocab_size: int) -> tuple[Tokenizer, DocumentSource, DocumentSource]:
    """The tokenizer, the training and the validation documents, all of them checked. Raises UserError."""
    tokenizer = load_tokenizer(args.tokenizer)
    check_fits(tokenizer, vocab_size=vocab_size)
    source, held_out = (
        open_documents(args.dataset, split=split, seed=args.seed, validation=args.validation)
        for split in ("train", "validation")
    )
    source.check()
    held_out.check()
    logger.info(f"training on {source.name}, validating on {held_out.name}, tokenizer {tokenizer.name}")
    return tokenizer, source, held_out
