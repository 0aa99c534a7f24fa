"""What the benchmarks share: the machine's name, processes that take turns, tables, JSON lines."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from peft_pretraining.training.provenance import git_commit, versions


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
        self.ready = self._answer()

    def work(self, updates: int) -> Any:
        """What so many updates have given."""
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
