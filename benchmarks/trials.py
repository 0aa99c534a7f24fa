"""Training runs of a comparison, several side by side, each with its method, rates, seed and length, as JSON lines.

A trial is a call of torchrun_main.main with one thread, in a process that may have run others before. Finished ones are
read back from the file, so a comparison that was interrupted goes on where it was; with a folder for the runs
themselves, a trial that was interrupted goes on from its last checkpoint.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.support import command_line, read_records, recorded_run

POINTS = 20  # of the curve of training losses
Key = tuple[str, float, float | None, float | None, int, int]


@dataclass(frozen=True)
class Bench:
    """What all trials of a comparison share."""

    model_config: str
    dataset: str
    tokenizer: str
    rank: int = 64
    batch_size: int = 8  # sequences of 256 tokens an update
    eval_tokens: int = 100_000
    evaluations: int = 4  # of a trial, at equal distances
    compile: bool = False
    work: Path | None = None  # the folder of unfinished runs; None: they begin anew
    save_every: int = 1000  # updates between the checkpoints of an unfinished run
    more: tuple[str, ...] = ()  # flags of every trial


@dataclass(frozen=True)
class Trial:
    """One training run."""

    method: str  # its title
    flags: tuple[str, ...]  # what it adds to the command line
    lr: float  # peak learning rate of embedding, head and norms
    matrix_lr: float | None  # that of the matrices; None for what lr and flags say
    beta2: float | None  # decay rate of second moments; None for the optimizer's own
    seed: int  # of weights, data order and noise
    updates: int

    @property
    def key(self) -> Key:
        return self.method, self.lr, self.matrix_lr, self.beta2, self.seed, self.updates


def key_of(record: dict[str, Any]) -> Key:
    """The key of a record's trial; the first records had neither a rate of the matrices nor a beta2."""
    rates = record.get("matrix_lr"), record.get("beta2")
    return record["method"], record["lr"], *rates, record["seed"], record["updates"]


def arguments(trial: Trial, bench: Bench, *, folder: str) -> list[str]:
    """The command line of a trial."""
    ranked = "galore" in " ".join(trial.flags) or "apollo" in trial.flags or "--peft" in trial.flags
    values = {
        "model_config": bench.model_config, "dataset": bench.dataset, "tokenizer": bench.tokenizer, "lr": trial.lr,
        "matrix_lr_ratio": None if trial.matrix_lr is None else trial.matrix_lr / trial.lr, "beta2": trial.beta2,
        "rank": bench.rank if ranked and "--rank" not in trial.flags else None, "batch_size": bench.batch_size,
        "num_training_steps": trial.updates, "eval_tokens": bench.eval_tokens, "seed": trial.seed, "num_threads": 1,
        "eval_every": max(1, trial.updates // bench.evaluations), "workers": 0, "wandb_mode": "disabled",
        "save_dir": folder, "resume": "auto" if bench.work else None,
        "save_every": bench.save_every if bench.work else 10**9, "keep_last": 1,
    }  # fmt: skip
    shared = (*bench.more, "--no_report", *["--compile"] * bench.compile)
    return ["--optimizer", *trial.flags, *command_line(values), *shared]


def run_trial(trial: Trial, bench: Bench) -> dict[str, Any]:
    """Trains. Returns the record; its perplexity is None where the run has diverged, and `failed` says how."""
    if bench.work is None:
        folder = Path(tempfile.mkdtemp())
    else:
        name = hashlib.blake2b(repr((trial.key, trial.flags)).encode(), digest_size=8).hexdigest()
        folder = bench.work / name
    from torchrun_main import main

    began, flags = time.monotonic(), arguments(trial, bench, folder=str(folder))
    lines, failed = recorded_run(lambda: main(flags, began=began), folder=folder, trial=trial)
    return asdict(trial) | read_run(lines) | {"compile": bench.compile, "failed": failed and failed.partition("\n")[0]}


def read_run(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a run, from the lines of its metrics.jsonl."""
    start, end = lines[0], lines[-1]
    lines = [line for line in lines if line["event"] not in ("update", "eval") or isinstance(line["loss"], float)]
    updates = list({line["update"]: line for line in lines if line["event"] == "update"}.values())
    step = max(1, len(updates) // POINTS)
    chunks = [updates[i : i + step] for i in range(0, len(updates), step)]
    speeds = [line["tokens_per_second"] for line in updates[2:] or updates]  # the first updates compile
    return {
        "perplexity": end["perplexity"] if end["event"] == "end" else None,
        "validation": [[line["update"], round(line["loss"], 5)] for line in lines if line["event"] == "eval"],
        "training": [[chunk[-1]["update"], round(mean(line["loss"] for line in chunk), 5)] for chunk in chunks],
        "tokens_per_second": round(median(speeds)) if speeds else None,
        "kept_bytes": end.get("kept_bytes"),
        "refreshes": end.get("refreshes"),
        "seconds": end.get("seconds"),
        "parameters": start["parameters"],
        "rank": start["args"]["rank"],
        "batch_size": start["args"]["batch_size"],
        "model_config": Path(start["args"]["model_config"]).name,
        "commit": start["commit"],
        "device": start["device"],
        "versions": start["versions"],
    }


def finish(
    wanted: Callable[[list[dict[str, Any]]], Iterable[Trial]],
    bench: Bench,
    *,
    out: Path,
    jobs: int,
    seconds: float = float("inf"),
) -> list[dict[str, Any]]:
    """Runs trials until none is wanted that is not in `out`; returns all its records.

    wanted: from the records so far to the trials that are wanted next, the most urgent first.
    jobs: trials at a time.
    seconds: how long trials may begin; those that run then are ended without a record.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    records, deadline = read_records(out), time.monotonic() + seconds
    running: dict[Future[dict[str, Any]], Key] = {}
    # Forked processes could not use CUDA. Each has one core's work: threads of its own would only wait for others.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context)
    with out.open("a") as file:
        while True:
            known = {key_of(record) for record in records} | set(running.values())
            missing = [trial for trial in wanted(records) if trial.key not in known]
            for trial in missing[: jobs - len(running)]:
                running[pool.submit(run_trial, trial, bench)] = trial.key
            left = deadline - time.monotonic()
            if not running or left <= 0:
                break
            for done in wait(running, timeout=min(left, 60), return_when=FIRST_COMPLETED).done:
                running.pop(done)
                records.append(record := done.result())
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(_told(record), file=sys.stderr, flush=True)
    _end(pool, unfinished=bool(running))
    return records


def _end(pool: ProcessPoolExecutor, *, unfinished: bool) -> None:
    processes = list(pool._processes.values()) if unfinished else []
    pool.shutdown(wait=not unfinished, cancel_futures=True)
    for process in processes:
        process.kill()


def _told(record: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {record[name]:g}" for name in ("lr", "matrix_lr", "beta2") if record[name] is not None)
    found = "diverged" if record["perplexity"] is None else f"{record['perplexity']:.2f}"
    return f"{record['method']}, {rates}, seed {record['seed']}, {record['updates']} updates: {found}"
