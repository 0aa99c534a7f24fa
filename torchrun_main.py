"""Pre-trains a LLaMA model: `torchrun --standalone torchrun_main.py --model_config configs/llama_60m.json ...`.

Plain `python torchrun_main.py ...` trains in one process. `--help` lists every flag.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Deterministic cuBLAS needs this before the first CUDA call: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from loguru import logger
from transformers import LlamaForCausalLM

from peft_pretraining import report
from peft_pretraining.args import parse_args, schedule_of
from peft_pretraining.checkpoint import choose_save_dir, prepare_save_dir, save_model
from peft_pretraining.dataloader import IGNORED, Batch, ValidationSet, train_batches
from peft_pretraining.distributed import World, make_deterministic, use_threads
from peft_pretraining.documents import DocumentSource, open_documents
from peft_pretraining.errors import UserError
from peft_pretraining.evaluate import Evaluation, evaluate
from peft_pretraining.loss import token_loss_sum
from peft_pretraining.metrics import Metrics, memory_bytes, open_metrics, set_up_log
from peft_pretraining.model import (
    DTYPES,
    build_model,
    check_compiler,
    compile_layers,
    meta_model,
    read_config,
    resolve_dtype,
    weight_quantizer,
)
from peft_pretraining.schedules import lr_ratio
from peft_pretraining.tokenizer import Tokenizer, check_fits, load_tokenizer
from qgalore.factory import Settings, create_optimizer, create_updates, find_recipe, set_lr
from qgalore.grad_sync import GradSync
from qgalore.memory import adamw_bytes, kept_bytes
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.whole_model import WholeModelUpdates


@dataclass
class State:
    """What the loop has done so far. update: updates finished.  seconds: spent in them, evaluations left out."""

    began: float = field(default_factory=time.monotonic)
    update: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    epoch: int = 0
    evaluation: Evaluation | None = None


@dataclass
class Run:
    """Everything that a training step, an evaluation or a save needs."""

    args: argparse.Namespace
    world: World
    save_dir: Path
    model: LlamaForCausalLM
    updates: WholeModelUpdates | PerLayerUpdates
    batches: Generator[Batch, None, None]
    validation: ValidationSet
    metrics: Metrics
    state: State = field(default_factory=State)


def main(argv: list[str] | None = None) -> None:
    """The whole run. Raises UserError, before anything slow, for what the user can mend."""
    # Where am I?
    world = World.from_environment()
    set_up_log(is_main=world.is_main)
    args = parse_args(argv, world_size=world.size)
    threads = use_threads(world, num_threads=args.num_threads)
    make_deterministic(args.seed)
    save_dir = choose_save_dir(args.save_dir, model_config=args.model_config)
    if world.is_main and not args.dry_run:
        prepare_save_dir(save_dir)

    # What do I train?
    config = read_config(args.model_config)
    dtype = resolve_dtype(args.dtype, world.device)
    if args.compile:
        check_compiler(world.device)
    if args.max_length > config.max_position_embeddings:
        raise UserError(
            f"--max_length {args.max_length}: {args.model_config} ends at {config.max_position_embeddings}."
        )

    # How is it updated?
    recipe = find_recipe(args.optimizer)
    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    groups = split_parameters(meta_model(config))
    table = report.describe_groups(groups, recipe=recipe, settings=settings, int8=args.weight_quant)
    log_plan(args, groups=table, dtype=dtype, world=world, threads=threads)

    # What do I read?
    tokenizer, source, held_out = open_data(args, vocab_size=config.vocab_size)
    if args.dry_run:
        return

    # Across which devices?
    with world.connected(), contextlib.ExitStack() as cleanup:
        sync = GradSync(at_rank_size=recipe.ours and (recipe.per_layer or not args.grad_clipping))
        reading: dict[str, Any] = dict(
            batch_size=args.batch_size,
            max_length=args.max_length,
            packing=args.packing,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
        )
        validation = ValidationSet(held_out, tokenizer, tokens=args.eval_tokens, **reading)
        batches = train_batches(source, tokenizer, workers=args.workers, **reading)
        cleanup.callback(batches.close)

        # From where?
        model = build_model(
            config,
            device=world.device,
            dtype=dtype,
            seed=args.seed,
            activation_checkpointing=args.activation_checkpointing,
            finish=weight_quantizer(args, groups=groups) if args.weight_quant else None,
        )
        if args.compile:
            compile_layers(model)
        updates = prepare_updates(args, model=model, settings=settings, sync=sync)
        metrics = open_metrics(args, save_dir=save_dir, enabled=world.is_main)
        cleanup.callback(metrics.close)
        metrics.start(**report.circumstances(args, world=world, threads=threads, groups=table, norm=updates.norm_of))

        # The loop, and what came of it
        run = Run(args, world, save_dir, model, updates, batches, validation, metrics)
        loop(run)
        report_end(run)


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


def prepare_updates(
    args: argparse.Namespace, *, model: LlamaForCausalLM, settings: Settings, sync: GradSync
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


def log_plan(
    args: argparse.Namespace, *, groups: list[dict[str, Any]], dtype: torch.dtype, world: World, threads: int
) -> None:
    """Says what is about to happen: the size of the model, who is trained how, the length of the run."""
    total = sum(group["elements"] for group in groups)
    kind = str(dtype).removeprefix("torch.")
    logger.info(f"{args.model_config}: {total:,} parameters in {kind} on {report.device_name(world.device)}")
    logger.info("who is trained how:\n" + report.format_table(groups))
    for flag in args.ignored:
        logger.warning(f"{flag} has no effect with --optimizer {args.optimizer}")
    if args.grad_clipping and find_recipe(args.optimizer).per_layer:
        logger.info(f"clipping: each parameter's own projected gradient, to norm {args.grad_clipping:g}")
    logger.info(
        f"{args.num_training_steps} updates of {args.total_batch_size} x {args.max_length} tokens: "
        f"{args.gradient_accumulation} micro-batches of {args.batch_size} on {world.size} x {threads} threads"
    )


def loop(run: Run) -> None:
    """Updates until num_training_steps, with evaluations and saves where they are due and at the end."""
    args, state = run.args, run.state
    while True:
        last = state.update == args.num_training_steps
        if last or due(state, args.eval_every):
            evaluate_and_log(run)
        if last or due(state, args.save_every):
            save(run)
        if last:
            break
        train_step(run)


def due(state: State, every: int) -> bool:
    return state.update > 0 and state.update % every == 0


def train_step(run: Run) -> None:
    """One update: the learning rate, micro-batches forward and backward, the optimizer, the record.

    The loss is a sum over target tokens divided by their number over all micro-batches and ranks.
    """
    args, state = run.args, run.state
    began = time.monotonic()
    micro_batches = [next(run.batches) for _ in range(args.gradient_accumulation)]
    targets = sum(int((batch.targets != IGNORED).sum()) for batch in micro_batches)
    targets = max(1, int(run.world.sum(torch.tensor(float(targets), dtype=torch.float64))))
    ratio = lr_ratio(state.update + 1, **schedule_of(args))
    set_lr(run.updates.optimizer, args.lr * ratio)
    loss = torch.zeros((), device=run.world.device)
    for batch in micro_batches:
        share = token_loss_sum(run.model, batch.input_ids, batch.targets) / targets
        share.backward()
        loss += share.detach()
    outcome = run.updates.finish()
    log_step(run, loss=float(run.world.sum(loss)), norm=outcome.norm, targets=targets, began=began)
    if micro_batches[-1].epoch > state.epoch:
        state.epoch = micro_batches[-1].epoch
        logger.info(f"the data has ended: epoch {state.epoch + 1} begins, reshuffled")


def log_step(run: Run, *, loss: float, norm: float, targets: int, began: float) -> None:
    """Advances the state by one finished update and records it. Raises UserError where the loss is lost."""
    state = run.state
    seconds = time.monotonic() - began
    state.update += 1
    state.tokens_seen += targets
    state.seconds += seconds
    run.metrics.update(
        update=state.update,
        loss=loss,
        lr=max(group["lr"] / group["lr_ratio"] for group in run.updates.optimizer.param_groups),
        grad_norm=norm,
        tokens_seen=state.tokens_seen,
        tokens_per_second=targets / seconds,
        memory_bytes=memory_bytes(run.world.device),
    )
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at update {state.update}. A lower --lr or --grad_clipping 1.0 may help.")


def evaluate_and_log(run: Run) -> None:
    """Loss and perplexity on the validation set, over all ranks."""
    evaluation = evaluate(run.model, run.validation, reduce_sum=run.world.sum)
    run.state.evaluation = evaluation
    run.metrics.evaluation(
        update=run.state.update,
        loss=evaluation.loss,
        perplexity=evaluation.perplexity,
        tokens=evaluation.tokens,
    )
    matrices = report.describe_refreshes(split_parameters(run.model), run.updates.optimizer)
    if matrices:
        run.metrics.subspaces(update=run.state.update, matrices=matrices)


def save(run: Run) -> None:
    """The model as a transformers folder: SAVE_DIR/model at the end, SAVE_DIR/model_N after update N."""
    if run.world.is_main:
        last = run.state.update == run.args.num_training_steps
        save_model(run.model, run.save_dir / ("model" if last else f"model_{run.state.update}"))


def report_end(run: Run) -> None:
    """The last line of the record, and where everything is."""
    state = run.state
    assert state.evaluation is not None
    perplexity = state.evaluation.perplexity
    seconds = time.monotonic() - state.began
    matrices = report.describe_refreshes(split_parameters(run.model), run.updates.optimizer)
    kept = kept_bytes(run.model, run.updates.optimizer, accumulators=run.updates.sums.values())
    run.metrics.end(
        updates=state.update,
        tokens_seen=state.tokens_seen,
        perplexity=perplexity,
        seconds=round(seconds, 3),
        kept_bytes=kept,
        refreshes=sum(matrix["refreshes"] for matrix in matrices),
    )
    if matrices:
        logger.info(report.summarize_refreshes(matrices))
    logger.info("kept between updates, in bytes:\n" + report.memory_table(kept, adamw=adamw_bytes(run.model)))
    logger.info(
        f"{state.update} updates, {state.tokens_seen:,} tokens in {seconds:.0f} s "
        f"({state.tokens_seen / state.seconds:,.0f} tokens/s while training)"
    )
    logger.info(
        f"validation perplexity {perplexity:.2f}; record: {run.save_dir}/metrics.jsonl; model: {run.save_dir}/model"
    )


def command_line(argv: list[str] | None = None) -> int:
    """Runs main; turns what the user can mend into one line and exit status 2."""
    warnings.showwarning = lambda message, *_, **__: logger.warning(str(message))
    try:
        main(argv)
    except UserError as error:
        # What is wrong with the arguments, every rank finds; what is wrong with one rank's documents, only that one.
        if error.on_one_rank or int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
