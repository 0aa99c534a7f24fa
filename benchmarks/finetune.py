"""Fine-tuning by every method at its own best learning rate, with seeds, in the layout of GLUE's tables.

    python scripts/train_mlm.py --dataset data/books --out runs/small_roberta --minutes 60
    python benchmarks/text_tasks.py --dataset data/books --out runs/tasks
    python benchmarks/finetune.py --model runs/small_roberta --tasks runs/tasks/* --out runs/finetune.jsonl

For each task and method, rates are tried with the first seed, on a grid of factors of 3 that begins at the method's
usual rate, until the best lies inside; then the best rate is run with the other seeds, which draw another classifier,
another order and other dropout. A score is that of the last evaluation; no epoch is chosen. Finished trials are read
back from --out, so a comparison that was interrupted goes on; --seconds ends it in time. The table has means and half
the range over the seeds, the bytes that are kept between updates, the peak of the process or GPU, and milliseconds a
micro-batch.
"""

import argparse
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.support import command_line, machine, read_records, recorded_run

METHODS = {  # the rate at which a sweep begins
    "full": 3e-4, "full_8bit": 3e-4, "galore": 3e-4, "galore_8bit": 3e-4, "q_galore": 3e-4, "apollo": 3e-4,
    "q_galore_frozen": 3e-4, "q_galore_frozen_4bit": 3e-4, "lora": 1e-3, "qlora": 1e-3,
}  # fmt: skip
FROZEN = ("--method", "q_galore", "--freeze_others")
FLAGS = {"q_galore_frozen": FROZEN, "q_galore_frozen_4bit": (*FROZEN, "--weight_bits", "4")}  # else --method alone
STEP = 3.0
MAX_STEPS = 4  # of a sweep away from where it began, in either direction


@dataclass(frozen=True)
class Trial:
    """One run of run_glue."""

    task: str
    method: str
    lr: float
    seed: int

    def same(self, record: dict[str, Any]) -> bool:
        """Whether a record is this trial's."""
        return all(record[name] == value for name, value in asdict(self).items())


def wanted(
    records: list[dict[str, Any]], *, tasks: Iterable[str], methods: Iterable[str], seeds: list[int]
) -> Iterator[Trial]:
    """The trials that are still to run: sweeps first, of all tasks and methods, then the other seeds."""
    later = []
    for task in tasks:
        for method in methods:
            found = sweep(records, task, method, seed=seeds[0])
            rate = next_rate(found, begin=METHODS[method])
            if rate is not None:
                yield Trial(task, method, rate, seeds[0])
            else:
                best = best_rate(found, begin=METHODS[method])
                later += [Trial(task, method, best, seed) for seed in seeds[1:]]
    for trial in later:
        if not any(map(trial.same, records)):
            yield trial


def sweep(records: list[dict[str, Any]], task: str, method: str, *, seed: int) -> dict[float, float]:
    """The scores by rate of one seed."""
    return {r["lr"]: r["score"] for r in records if (r["task"], r["method"], r["seed"]) == (task, method, seed)}


def best_rate(found: dict[float, float], *, begin: float) -> float:
    """The rate with the best score; of equal ones, the one nearest to where the sweep began."""
    return max(found, key=lambda rate: (found[rate], -abs(math.log(rate / begin))))


def next_rate(found: dict[float, float], *, begin: float) -> float | None:
    """The rate to try next; None when the best lies inside of those tried, or the sweep has gone far enough.

    found: scores by rate.
    """
    if not found:
        return begin
    best = best_rate(found, begin=begin)
    for factor in (STEP, 1 / STEP):
        rate = float(f"{best * factor:.3g}")
        near = any(abs(other / rate - 1) < 0.02 for other in found)
        if not near and STEP**-MAX_STEPS * 0.9 < rate / begin < STEP**MAX_STEPS * 1.1:
            return rate
    return None


def run_trial(trial: Trial, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes and returns the record. A run that diverges has score 0."""
    from peft_pretraining.glue.__main__ import main

    folder, task = Path(tempfile.mkdtemp()), Path(args.folders[trial.task])
    flags = command_line({
        "model_name_or_path": args.model, "train_file": task / "train.csv", "validation_file": task / "validation.csv",
        "learning_rate": trial.lr, "seed": trial.seed, "lora_r": args.rank,
        "lora_alpha": 2 * args.rank, "max_length": args.max_length, "num_train_epochs": args.epochs,
        "max_train_steps": args.max_steps, "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64, "update_proj_gap": args.gap, "galore_scale": args.scale, "dtype": args.dtype,
        "num_warmup_steps": args.warmup, "output_dir": folder, "num_threads": 1,
    })  # fmt: skip
    began = time.monotonic()
    method = FLAGS.get(trial.method, ("--method", trial.method))
    switches = ["--lora_all_modules", "--no_report", *["--compile"] * args.compile]
    run = functools.partial(main, [*flags, *method, *switches], began=began)
    lines, failed = recorded_run(run, folder=folder, trial=trial)
    return asdict(trial) | read_run(lines) | {"failed": failed, "rank": args.rank, "epochs": args.epochs, **machine()}


def read_run(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a run, from the lines of its metrics.jsonl."""
    scores = [next(iter(line["splits"].values())) for line in lines if line["event"] == "scores"]
    updates = [line for line in lines if line["event"] == "update"]
    end = lines[-1] if lines[-1]["event"] == "end" else {}
    return {
        "score": scores[-1]["score"] if end else 0.0,
        "best": max((each["score"] for each in scores), default=0.0),
        "scores": [round(each["score"], 4) for each in scores],
        "loss": scores[-1]["loss"] if end else None,
        "kept_bytes": end.get("kept_bytes"),
        "memory_bytes": end.get("memory_bytes"),
        "micro_batch_seconds": end.get("micro_batch_seconds"),
        "updates": len(updates),
        "groups": [group["trained_by"] for group in lines[0]["groups"]],
    }


def table(records: list[dict[str, Any]], *, tasks: list[str], seeds: list[int]) -> str:
    """Markdown: a row a method, a column a task, with means and half the range over the seeds."""
    heads = ["method", *tasks, "mean", "kept MB", "peak MB", "ms a micro-batch", "rates"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in METHODS:
        cells, means, own, rates = [], [], [], []
        for task in tasks:
            swept = sweep(records, task, method, seed=seeds[0])
            best = best_rate(swept, begin=METHODS[method]) if swept else None
            runs = [r for r in records if (r["task"], r["method"], r["lr"]) == (task, method, best)]
            scores = [100 * run["score"] for run in runs]
            half = f" ± {(max(scores) - min(scores)) / 2:.1f}" if len(scores) > 1 else ""
            cells.append(f"{mean(scores):.1f}{half}" if scores else "")
            means += [mean(scores)] if scores else []
            rates += [f"{best:g}"] if scores else []
            own += [run for run in runs if run["kept_bytes"]]
        if own:
            kept = mean(sum(run["kept_bytes"].values()) for run in own) / 1e6
            peaks, seconds = [r["memory_bytes"] or 0 for r in own], median(r["micro_batch_seconds"] for r in own)
            peak = f"{max(peaks) / 1e6:.0f}" if any(peaks) else ""
            overall = f"{mean(means):.1f}" if len(means) == len(tasks) else ""
            row = [method, *cells, overall, f"{kept:.2f}", peak, f"{1e3 * seconds:.0f}", ", ".join(rates)]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.folders = {Path(folder).name: folder for folder in args.tasks}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = read_records(args.out)
    deadline = time.monotonic() + args.seconds
    with args.out.open("a") as file:
        while time.monotonic() < deadline:
            trial = next(wanted(records, tasks=args.folders, methods=args.methods, seeds=args.seeds), None)
            if trial is None:
                break
            with get_context("spawn").Pool(1) as own:  # a process of its own, so that its peak is its own, too
                records.append(record := own.apply(run_trial, (trial, args)))
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{trial}: {record['scores']}", file=sys.stderr, flush=True)
    print(table(records, tasks=list(args.folders), seeds=args.seeds))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="transformers folder")
    parser.add_argument("--tasks", nargs="+", required=True, help="folders with train.csv and validation.csv")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--scale", type=float, default=4.0, help="of projected updates, 4 in GaLore's README")
    parser.add_argument("--gap", type=int, default=50, help="updates from one refresh to the next")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=20, help="updates")
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=160)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the updates of our own optimizers")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long trials may begin")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
