"""Pre-trains a LLaMA model: `torchrun --standalone torchrun_main.py --model_config configs/llama_60m.json ...`.

Plain `python torchrun_main.py ...` trains in one process. `--help` tells the rest.
"""

import contextlib
import math
import os
import sys
import time

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


from peft_pretraining.cli.args import parse_args
from peft_pretraining.distributed import World, make_deterministic, use_threads
from peft_pretraining.training.evaluate import evaluate_only
from peft_pretraining.training.exit_status import exit_status
from peft_pretraining.training.interruption import Interruption, process_start
from peft_pretraining.training.loop import loop
from peft_pretraining.training.memory_fit import fit_memory
from peft_pretraining.training.memory_report import log_memory, watch_memory
from peft_pretraining.training.metrics import set_up_log
from peft_pretraining.training.plan import make_plan, open_model, open_run, open_validation
from peft_pretraining.training.report import report_end
from peft_pretraining.training.saving import begin


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


def command_line(argv: list[str] | None = None, *, began: float | None = None) -> int:
    """Runs main. Returns the exit status, see exit_status.

    began: the start of --time_budget; None for now.
    """
    return exit_status(lambda: main(argv, began=time.monotonic() if began is None else began))


if __name__ == "__main__":
    sys.exit(command_line(began=process_start()))
