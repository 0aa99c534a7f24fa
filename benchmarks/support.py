"""What the benchmarks share: the machine's name, flags, processes that take turns, memory, tables, JSON lines."""

import argparse
import contextlib
import functools
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from peft_pretraining.errors import UserError
from peft_pretraining.training.provenance import git_commit, versions

T = TypeVar("T")


def machine() -> dict[str, Any]:
    """What a figure depends on besides its command: processor or GPU, versions, commit, date."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "commit": git_commit(),
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """--dataset and --tokenizer, by default those that need no download."""
    parser.add_argument("--dataset", default="pydocs", metavar="NAME|PATH")
    parser.add_argument("--tokenizer", metavar="NAME|PATH", help="default: t5-base; for pydocs its own")


def command_line(values: Mapping[str, Any]) -> list[str]:
    """The flags of torchrun_main.py for these values; None leaves a flag out."""
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def recorded_run(main: Callable[[], object], *, folder: Path, trial: object) -> tuple[list[dict[str, Any]], str | None]:
    """Runs main, which says nothing and leaves its record in the folder, and removes the folder.

    trial: what it is, for the message.
    Returns the lines of the record, and what a run that could not be finished said. Raises RuntimeError if it has left
    no record.
    """
    failed = None
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            main()
        except UserError as error:
            failed = str(error)
    if not (folder / "metrics.jsonl").exists():
        raise RuntimeError(f"{trial}: {failed}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    return lines, failed


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, if it exists."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Worker:
    """A process that works when it is told to, so that several can take turns on one busy machine.

    Its program prints one line of JSON when it is ready, then one for each number that it reads: what that many updates
    have given.
    """

    def __init__(self, program: str, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert self.process.stdout is not None and self.process.stdin is not None
        self.answers, self.orders = self.process.stdout, self.process.stdin

    @functools.cached_property
    def ready(self) -> Any:
        """What it has told when it was ready; waits for that."""
        return self._answer()

    def work(self, updates: int) -> Any:
        """What so many updates have given."""
        assert self.ready is not None
        print(updates, file=self.orders, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self.answers.readline()
        if not line:
            raise SystemExit(
                f"error: a process of this benchmark has ended with status {self.process.wait()}, see above"
            )
        return json.loads(line)

    def close(self) -> None:
        self.orders.close()
        self.process.wait()


def allocated_at_most(work: Callable[[], T]) -> tuple[int, T]:
    """The most bytes that torch's CPU allocator had given out at one time for the work, and the work's result."""
    gc.collect()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = work()
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    told = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    before = told[0]["args"]["Total Allocated"] - told[0]["args"]["Bytes"]  # what was there before the work
    return max(event["args"]["Total Allocated"] for event in told) - before, result


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows as a Markdown table; numbers with three significant digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in lines), flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def save_lines(path: Path | None, rows: Sequence[dict[str, Any]], **common: Any) -> None:
    """Appends rows to a file of JSON lines, each with what they have in common and the command."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **common, "command": sys.argv}, default=str) + "\n")
