"""Pre-trains a LLaMA model: `torchrun --standalone torchrun_main.py --model_config configs/llama_60m.json ...`.

Plain `python torchrun_main.py ...` trains in one process. `--help` tells the rest.
"""

import contextlib
import math
import os
import sys
import time
import warnings

# Deterministic cuBLAS needs this before the first CUDA call: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# The largest tensors of a model come and go in sizes of their own, and leave holes: without segments that grow, a 7B
# needs 0.7 GB more of a GPU than it uses. https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# Threads that wait for others spin before they sleep. Where another process is busy on the same cores, torch's default
# makes them take turns with the very threads they wait for: see docs/notebook.md, "A busy machine".
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from loguru import logger

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.cli.args import parse_args, schedule_of
from peft_pretraining.distributed import World, make_deterministic, use_threads
from peft_pretraining.errors import UserError
from peft_pretraining.failure import report_failure, tell_torchrun
from peft_pretraining.model.adapters import reset_if_due
from peft_pretraining.model.loss import accumulate_gradients
from peft_pretraining.progress import LongWait
from peft_pretraining.schedules import lr_ratio
from peft_pretraining.training.evaluate import evaluate_only
from peft_pretraining.training.incidents import react
from peft_pretraining.training.interruption import BY_HAND, Interrupted, Interruption, process_start
from peft_pretraining.training.memory_fit import fit_memory
from peft_pretraining.training.memory_report import log_memory, watch_memory
from peft_pretraining.training.metrics import set_up_log
from peft_pretraining.training.plan import make_plan, open_model, open_run, open_validation
from peft_pretraining.training.replicas import check_replicas
from peft_pretraining.training.report import count_too_long, evaluate_and_log, log_step, report_end
from peft_pretraining.training.run import Run, State
from peft_pretraining.training.saving import begin, give_up, last_checkpoint, leave_time_to_save, save, save_result
from qgalore.factory import set_lr


def main(argv: list[str] | None = None, *, began: float) -> None:
    """The whole run. Raises UserError for what the user can repair, before anything slow; Interrupted on a signal.

    began: the start of --time_budget, on the clock of time.monotonic.
    """
    # Which process is this, and what was it told?
    world = World.from_environment()
    set_up_log(is_main=world.is_main)
    args = fit_memory(parse_args(argv, world_size=world.size), world=world)
    use_threads(world, num_threads=args.num_threads)
    make_deterministic(args.seed)

    with contextlib.ExitStack() as cleanup:  # in reverse order
        # What is it going to do?
        plan = make_plan(args, world=world, cleanup=cleanup)
        if args.dry_run:
            open_validation(plan)
            if world.is_main:
                log_memory(args, dtype=plan.dtype, device=world.device, world_size=world.size)
            return
        memory = watch_memory(args, dtype=plan.dtype, world=world)
        cleanup.enter_context(world.connected())
        deadline = began + (args.time_budget or math.inf)
        interruption = cleanup.enter_context(Interruption(deadline=deadline).listening())

        # Evaluate a checkpoint,
        if args.eval_only:
            validation = open_validation(plan)
            evaluate_only(args.continue_from, model=open_model(plan), validation=validation, world=world)
            return

        # or train
        run = open_run(plan, interruption=interruption, cleanup=cleanup)
        run.memory = memory
        begin(run, plan.start)
        loop(run)
        report_end(run)


def loop(run: Run) -> None:
    """Trains until update num_training_steps. Evaluates and saves when it is due, and at the end.

    Raises Interrupted, after saving, if a signal has asked to stop or the time budget is nearly used up.
    """
    args, begun_at = run.args, run.state.update
    # It waits for data, compiles, and computes bases.
    first_update = LongWait("first update, with compilation" if args.compile else "first update")
    while True:
        state = run.state
        last = state.update == args.num_training_steps
        if args.check_replicas and args.parallel == "ddp" and due(state, args.check_replicas):
            check_replicas(run.model, run.updates.optimizer, world=run.world, update=state.update)
        if (last or due(state, args.eval_every)) and state.evaluated != state.update and not run.stopping:
            evaluate_and_log(run)
        if last or run.stopping or due(state, args.save_every):
            save(run)
        if last or run.stopping:
            break
        with first_update if state.update == begun_at else contextlib.nullcontext():
            train_step(run)
    if run.stopping:
        checkpoint = last_checkpoint(run)
        said = f"stopped after update {state.update}; go on with --continue_from {checkpoint} or --resume auto"
        logger.info(said)
        raise Interrupted(said, status=run.interruption.status)
    save_result(run)


def due(state: State, every: int) -> bool:
    return state.update > 0 and state.update % every == 0


def train_step(run: Run) -> None:
    """One update: the learning rate, micro-batches forward and backward, the optimizer, the record.

    The loss is the sum over the target tokens of all micro-batches and ranks, divided by their number.
    """
    args, state = run.args, run.state
    began = time.monotonic()
    micro_batches = read_batches(run)
    targets = sum(int((batch.targets != IGNORED).sum()) for batch in micro_batches)
    targets = max(1, int(run.world.sum(torch.tensor(float(targets), dtype=torch.float64))))
    set_lr(run.updates.optimizer, args.lr * lr_ratio(state.update + 1, **schedule_of(args)))
    loss = accumulate_gradients(run.model, micro_batches, targets=targets, device=run.world.device)
    outcome = run.updates.finish()
    reset_if_due(args, run.model, run.updates.optimizer, update=state.update + 1)
    skipped = [line for batch in micro_batches for line in batch.skipped]
    leave_time_to_save(run, update_seconds=time.monotonic() - began)
    # One all-reduce for everything that the ranks must agree on.
    too_long = [sum(counts) for counts in zip(*(batch.too_long for batch in micro_batches), strict=True)]
    told = torch.tensor([float(loss), run.interruption.requested, len(skipped), *too_long], dtype=torch.float64)
    total, stops, bad_documents, *too_long = run.world.sum(told).tolist()
    run.stopping = stops > 0
    log_step(run, loss=total, outcome=outcome, batch=micro_batches[-1], targets=targets, began=began)
    if run.memory is not None:
        evaluated = state.evaluation is not None
        run.memory.after_update(run.record, update=state.update, optimizer=run.updates.optimizer, evaluated=evaluated)
    count_too_long(run, *map(int, too_long))
    react(run, loss=total, outcome=outcome, skipped=skipped, bad_documents=bad_documents > 0)


def read_batches(run: Run) -> list[Batch]:
    """The micro-batches of the next update. The state still describes the last finished one.

    Raises UserError if the data cannot be read; a process that is alone saves the run first.
    """
    state = run.state
    try:
        micro_batches = [next(run.batches) for _ in range(run.args.gradient_accumulation)]
    except UserError as error:
        raise give_up(run, str(error), advice="") if run.world.size == 1 else error from None
    for line in (line for batch in micro_batches for line in batch.skipped):
        logger.warning(f"skipped: {line}")
    epoch = micro_batches[-1].epoch
    if epoch > state.epoch:
        logger.info(f"the data has ended: epoch {epoch + 1} begins, reshuffled")
    return micro_batches


def command_line(argv: list[str] | None = None, *, began: float | None = None) -> int:
    """Runs main. Returns the exit status: 2, after one line on stderr, for what the user can repair; or a signal's.

    Any other error is raised, unless it is the loss of another process, whose message counts.
    began: the start of --time_budget; None for now.
    """
    warnings.showwarning = lambda message, *_, **__: logger.warning(str(message))
    try:
        main(argv, began=time.monotonic() if began is None else began)
    except UserError as error:
        # All ranks of a machine find what is wrong with the arguments or its files; one, what is wrong with a document.
        if error.on_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
            tell_torchrun(f"error: {error}")
        return 2
    except Interrupted as interrupted:
        tell_torchrun(str(interrupted))
        return interrupted.status
    except KeyboardInterrupt:
        return BY_HAND
    except Exception as error:
        return report_failure(error)
    return 0


if __name__ == "__main__":
    sys.exit(command_line(began=process_start()))
