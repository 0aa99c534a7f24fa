"""Pre-trains a LLaMA model: `torchrun --standalone torchrun_main.py --model_config configs/llama_60m.json ...`.

Plain `python torchrun_main.py ...` trains in one process. `--help` lists every flag.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

# Deterministic cuBLAS needs this before the first CUDA call: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from loguru import logger
from transformers import PreTrainedConfig, PreTrainedModel

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.checkpoint.start import check_data, choose_start
from peft_pretraining.checkpoint.writer import CheckpointWriter, choose_save_dir, prepare_save_dir
from peft_pretraining.cli.args import parse_args, schedule_of
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.sources import DocumentSource, open_documents
from peft_pretraining.data.tokenizer import Tokenizer, check_fits, load_tokenizer
from peft_pretraining.data.validation import ValidationSet
from peft_pretraining.distributed import World, make_deterministic, use_threads
from peft_pretraining.errors import UserError
from peft_pretraining.export.folder import save_model
from peft_pretraining.model.adapters import Adapters, reset_if_due
from peft_pretraining.model.build import check_compiler, meta_model, prepare_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.dtypes import DTYPES, resolve_dtype
from peft_pretraining.model.loss import token_loss_sum
from peft_pretraining.schedules import lr_ratio
from peft_pretraining.training import report
from peft_pretraining.training.evaluate import evaluate, evaluate_only
from peft_pretraining.training.interruption import BY_HAND, Interrupted, Interruption
from peft_pretraining.training.metrics import memory_bytes, open_metrics, set_up_log
from peft_pretraining.training.run import Run, State
from peft_pretraining.training.saving import begin, give_up, last_checkpoint, react, save
from qgalore.factory import Recipe, Settings, create_optimizer, create_updates, find_recipe, set_lr
from qgalore.memory import adamw_bytes, kept_bytes
from qgalore.outcome import Outcome
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates


def main(argv: list[str] | None = None) -> None:
    """The whole run. Raises UserError, before anything slow, for what the user can mend; Interrupted after a signal."""
    # Where am I?
    world = World.from_environment()
    set_up_log(is_main=world.is_main)
    args = parse_args(argv, world_size=world.size)
    threads = use_threads(world, num_threads=args.num_threads)
    make_deterministic(args.seed)

    # What do I train?
    config, dtype = read_shape(args, device=world.device)

    # How is it updated?
    recipe = find_recipe(args.optimizer)
    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    table = describe_training(args, config=config, recipe=recipe, settings=settings)
    report.log_plan(args, groups=table, dtype=dtype, world=world, threads=threads)

    # From where?
    start = choose_start(args, config=config)
    save_dir = choose_save_dir(args.save_dir, model_config=args.model_config, checkpoint=start.folder)
    if world.is_main and not (args.dry_run or args.eval_only):
        prepare_save_dir(save_dir)

    # What do I read?
    tokenizer, source, held_out = open_data(args, vocab_size=config.vocab_size)
    fingerprint = check_data(source.fingerprint(), start=start, args=args)
    if args.dry_run:
        return

    # Across which devices?
    with world.connected(), contextlib.ExitStack() as cleanup:
        save_dir = Path(world.gather(str(save_dir))[0])  # its name may hold the time, which ranks read for themselves
        interruption = cleanup.enter_context(Interruption().listening())
        sync = GradSync(at_rank_size=recipe.ours and (recipe.per_layer or not args.grad_clipping))
        reading = reading_options(args, world=world)
        validation = ValidationSet(held_out, tokenizer, tokens=args.eval_tokens, **reading)
        prepare = partial(prepare_model, args, config=config, dtype=dtype, device=world.device)
        if args.eval_only:
            evaluate_only(args.continue_from, model=prepare(), validation=validation, world=world)
            return
        # Before the model is there: the workers are forks of this process.
        batches = train_batches(source, tokenizer, workers=args.workers, resume=start.saved.get("positions"), **reading)
        cleanup.callback(batches.close)
        model = prepare()
        updates = prepare_updates(args, model=model, settings=settings, sync=sync)
        writer = CheckpointWriter(save_dir, keep_last=args.keep_last, keep_every=args.keep_every)
        cleanup.callback(writer.wait)
        metrics = open_metrics(args, save_dir=save_dir, enabled=world.is_main, wandb_id=start.saved.get("wandb_id"))
        cleanup.callback(metrics.close)
        metrics.start(**report.circumstances(args, world=world, threads=threads, groups=table, norm=updates.norm_of))

        # The loop, and what came of it
        run = Run(
            args, world, save_dir, model, updates, batches, validation, metrics, interruption,
            writer if world.is_main else None, fingerprint,
        )  # fmt: skip
        begin(run, start)
        loop(run)
        report_end(run)


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
    """Who is trained how, one record a group of parameters, before any of them exists."""
    adapters = Adapters.of(vars(args))
    blueprint = meta_model(config, adapters=adapters)
    return report.describe_groups(
        blueprint, recipe=recipe, settings=settings, int8=args.weight_quant, adapters=adapters
    )


def reading_options(args: argparse.Namespace, *, world: World) -> dict[str, Any]:
    """What training and validation data have in common."""
    return dict(
        batch_size=args.batch_size,
        max_length=args.max_length,
        packing=args.packing,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
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


def prepare_updates(
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


def loop(run: Run) -> None:
    """Updates until num_training_steps, with evaluations and checkpoints where they are due and at the end.

    Raises Interrupted, having saved, where a signal has asked to stop.
    """
    args = run.args
    while True:
        state = run.state
        last = state.update == args.num_training_steps
        if (last or due(state, args.eval_every)) and state.evaluated != state.update and not run.stopping:
            evaluate_and_log(run)
        if last or run.stopping or due(state, args.save_every):
            save(run)
        if last or run.stopping:
            break
        train_step(run)
    if run.stopping:
        checkpoint = last_checkpoint(run)
        logger.info(f"stopped after update {state.update}; go on with --continue_from {checkpoint} or --resume auto")
        raise Interrupted(run.interruption.status)
    if run.world.is_main:
        save_model(run.model, run.save_dir / "model", adapters=Adapters.of(vars(args)))


def due(state: State, every: int) -> bool:
    return state.update > 0 and state.update % every == 0


def train_step(run: Run) -> None:
    """One update: the learning rate, micro-batches forward and backward, the optimizer, the record.

    The loss is a sum over target tokens divided by their number over all micro-batches and ranks.
    """
    args, state = run.args, run.state
    began = time.monotonic()
    micro_batches = read_batches(run)
    targets = sum(int((batch.targets != IGNORED).sum()) for batch in micro_batches)
    targets = max(1, int(run.world.sum(torch.tensor(float(targets), dtype=torch.float64))))
    set_lr(run.updates.optimizer, args.lr * lr_ratio(state.update + 1, **schedule_of(args)))
    loss = torch.zeros((), device=run.world.device)
    for batch in micro_batches:
        share = token_loss_sum(run.model, batch.input_ids, batch.targets) / targets
        share.backward()
        loss += share.detach()
    outcome = run.updates.finish()
    reset_if_due(args, run.model, run.updates.optimizer, update=state.update + 1)
    skipped = [line for batch in micro_batches for line in batch.skipped]
    # One message for all that the ranks must agree on.
    told = torch.tensor([float(loss), run.interruption.requested, len(skipped)], dtype=torch.float64)
    total, stops, bad_documents = run.world.sum(told).tolist()
    run.stopping = stops > 0
    log_step(run, loss=total, outcome=outcome, targets=targets, began=began)
    react(run, loss=total, outcome=outcome, bad_documents=int(bad_documents))


def read_batches(run: Run) -> list[Batch]:
    """The micro-batches of the next update. Where the data fails and this process is alone, the run is saved first."""
    state = run.state
    try:
        micro_batches = [next(run.batches) for _ in range(run.args.gradient_accumulation)]
    except UserError as error:
        raise give_up(run, str(error), advice="") if run.world.size == 1 else error from None
    for line in (line for batch in micro_batches for line in batch.skipped):
        logger.warning(f"skipped: {line}")
    state.position = micro_batches[-1].position
    if micro_batches[-1].epoch > state.epoch:
        state.epoch = micro_batches[-1].epoch
        logger.info(f"the data has ended: epoch {state.epoch + 1} begins, reshuffled")
    return micro_batches


def log_step(run: Run, *, loss: float, outcome: Outcome, targets: int, began: float) -> None:
    """Advances the state by one finished update and records it."""
    state = run.state
    seconds = time.monotonic() - began
    state.update += 1
    state.tokens_seen += targets
    state.seconds += seconds
    run.metrics.update(
        update=state.update,
        loss=loss,
        lr=max(group["lr"] / group["lr_ratio"] for group in run.updates.optimizer.param_groups),
        grad_norm=outcome.norm,
        tokens_seen=state.tokens_seen,
        tokens_per_second=targets / seconds,
        memory_bytes=memory_bytes(run.world.device),
    )
    if run.args.log_details:
        for measured in report.describe_details(run.model, run.updates.optimizer):
            run.metrics.details(update=state.update, **measured)


def evaluate_and_log(run: Run) -> None:
    """Loss and perplexity on the validation set, over all ranks."""
    state, stop = run.state, run.interruption
    evaluation = evaluate(run.model, run.validation, reduce_sum=run.world.sum, stop=lambda: stop.requested)
    if evaluation is None:
        run.stopping = True
        return
    state.evaluation, state.evaluated = evaluation, state.update
    run.metrics.evaluation(update=state.update, **evaluation._asdict())
    matrices = report.describe_refreshes(split_parameters(run.model), run.updates.optimizer)
    if matrices:
        run.metrics.subspaces(update=state.update, matrices=matrices)


def report_end(run: Run) -> None:
    """The last line of the record, and where everything is."""
    state = run.state
    assert state.evaluation is not None
    perplexity, seconds = state.evaluation.perplexity, time.monotonic() - state.began
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
    plain = meta_model(run.model.config, dtype=run.model.dtype)
    logger.info("kept between updates, in bytes:\n" + report.memory_table(kept, adamw=adamw_bytes(plain)))
    logger.info(
        f"{state.update} updates, {state.tokens_seen:,} tokens in {seconds:.0f} s "
        f"({state.tokens_seen / state.seconds:,.0f} tokens/s while training)"
    )
    logger.info(
        f"validation perplexity {perplexity:.2f}; record: {run.save_dir}/metrics.jsonl; model: {run.save_dir}/model"
    )


def command_line(argv: list[str] | None = None) -> int:
    """Runs main; turns what the user can mend into one line and exit status 2, a signal into the status it asks for."""
    warnings.showwarning = lambda message, *_, **__: logger.warning(str(message))
    try:
        main(argv)
    except UserError as error:
        # What is wrong with the arguments, every rank finds; what is wrong with one rank's documents, only that one.
        if error.on_one_rank or int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        return interrupted.status
    except KeyboardInterrupt:
        return BY_HAND
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
