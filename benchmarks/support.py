"""What the benchmarks share: the machine's name, tables, JSON lines."""

import json
import os
import platform
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
