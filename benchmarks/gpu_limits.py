"""LLaMA-7B trained on a GPU of which torch may take so many GB and no more: plan, peak, tokens per second, losses.

    python benchmarks/gpu_limits.py --dataset data/books --tokenizer data/spiece.model --output gpu_limits.jsonl

Each row of CASES is a process that trains as torchrun_main.py does, under a limit that torch's allocator keeps
(set_per_process_memory_fraction): what it reserves beside what is in use counts, the context of the GPU, some hundred
MB, does not. They take turns, as on a smaller GPU; with --together all are set up at once, and then train one by one.

    plan, GB        the peak that peft_pretraining/training/memory_plan.py plans for these flags
    peak, GB        the most that was allocated at one time
    reserved, GB    the most that the allocator has taken from the GPU for that
    tokens/s        median over the updates but the first two
    losses          of the first and the last update
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.support import Worker, add_data_flags, command_line, machine, print_table, save_lines
from benchmarks.train_step import INT8, ROOT, WORKER
from peft_pretraining.cli.args import parse_args
from peft_pretraining.model.dtypes import DTYPES
from peft_pretraining.training.memory_plan import plan_memory

AUTO, OFFLOAD, LEAN = ["--proj_type", "auto"], ["--offload_activations"], ["--moments_bits", "4"]
CASES: list[tuple[float, list[str]]] = [  # GB of 1e9 bytes, flags beside the defaults
    (16, []),
    (14, []),
    (13, AUTO),
    (12, [*AUTO, *OFFLOAD]),
    (11, [*AUTO, *OFFLOAD, *LEAN]),
    (15, ["--weight_group_size", "-1", "--int8_matmul", "all"]),
]


def flags_of(args: argparse.Namespace, flags: list[str], *, folder: str) -> list[str]:
    """The command line of one case."""
    common = {
        "model_config": args.model_config, "dataset": args.dataset, "tokenizer": args.tokenizer, "dtype": args.dtype,
        "batch_size": args.batch_size, "max_length": args.max_length, "rank": args.rank, "lr": args.lr,
        "optimizer": "q_galore_adamw8bit_per_layer", "galore_scale": 0.25, "num_training_steps": 10**6,
        "warmup_steps": 0, "workers": 0, "wandb_mode": "disabled", "save_dir": folder,
    }  # fmt: skip
    return [*command_line(common), *INT8, "--activation_checkpointing", *flags]


def planned(flags: list[str]) -> float:
    """Bytes at the planned peak."""
    args = parse_args(flags)
    return plan_memory(args, dtype=DTYPES[args.dtype]).peak.bytes


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One record for each case."""
    cases = [case for case in CASES if not args.limits or case[0] in args.limits]
    cases += [(limit, [*flags, "--compile"]) for limit, flags in cases if limit in args.compile]
    lines = [flags_of(args, flags, folder=str(folder / str(number))) for number, (_, flags) in enumerate(cases)]
    with ProcessPoolExecutor(len(cases), mp_context=multiprocessing.get_context("spawn")) as pool:
        plans = pool.map(planned, lines)  # while the workers work
        started = (_start(limit, line) for (limit, _), line in zip(cases, lines, strict=True))
        told = [_finish(worker, args.updates) for worker in (_all_ready(started) if args.together else started)]
        planned_bytes = list(plans)
    rows = []
    for number, ((limit, flags), plan, told_by) in enumerate(zip(cases, planned_bytes, told, strict=True)):
        row = {"limit, GB": limit, "flags": " ".join(flags), "plan, GB": plan / 1e9}
        rows.append(row | _figures(told_by, tokens=args.batch_size * args.max_length, folder=folder / str(number)))
    return rows


def _start(limit: float, line: list[str]) -> Worker:
    return Worker(WORKER, str(ROOT), str(limit * 1e9), *line, OMP_NUM_THREADS="1")


def _all_ready(started: Iterable[Worker]) -> list[Worker]:
    """Waits until none of them is busy."""
    workers = list(started)
    for worker in workers:
        with suppress(SystemExit):  # it has ended; _finish says so
            assert worker.ready
    return workers


def _finish(worker: Worker, updates: int) -> list[dict[str, Any]] | None:
    """What a worker has told at its start and at its end; None if it has ended before, out of memory, say."""
    try:
        return [worker.ready, worker.work(updates - 1)]
    except SystemExit:
        return None
    finally:
        worker.close()


def _figures(told: list[dict[str, Any]] | None, *, tokens: int, folder: Path) -> dict[str, Any]:
    """The measured part of a row."""
    if told is None:
        return {"losses": "it has ended with an error"}
    first, rest = told
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "update"]
    return {
        "peak, GB": rest["peak"] / 1e9,
        "reserved, GB": (rest["reserved"] or 0) / 1e9,
        "first, s": first["seconds"][0],
        "tokens/s": tokens / median(rest["seconds"][1:]),
        "losses": f"{losses[0]:.2f}, {losses[-1]:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="configs/llama_7b.json", metavar="JSON")
    add_data_flags(parser)
    parser.add_argument("--limits", type=float, nargs="+", help="rows of CASES by their GB; all by default")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--compile", type=float, nargs="+", default=(), help="rows to run compiled as well, by their GB"
    )
    parser.add_argument("--together", action="store_true", help="set up all cases at once")
    parser.add_argument("--output", type=Path, help="a file for JSON lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    print_table(rows)
    save_lines(args.output, rows, machine=machine(), arguments=vars(args))


if __name__ == "__main__":
    main()
