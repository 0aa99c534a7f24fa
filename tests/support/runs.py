"""Runs of the main script, in this process and in others, and what they record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torchrun_main

ROOT = Path(__file__).parents[2]


def record(save_dir: Path, event: str) -> list[dict]:
    """The lines of one event in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def losses(save_dir: Path) -> list[float]:
    """Of the updates, in their order."""
    return [line["loss"] for line in record(save_dir, "update")]


def run(tiny, save_dir: Path, **flags: object) -> None:
    """A short run on `tiny`, in this process, to its end."""
    assert torchrun_main.command_line(tiny.flags(save_dir, **flags)) == 0


def torchrun(
    flags: list[str],
    *,
    processes: int = 1,
    timeout: int = 120,
    script: str = "torchrun_main.py",
    options: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone torchrun_main.py ...` from the repository's root. options: torchrun's own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return shell([*command, *options, script, *flags], timeout=timeout)


def shell(command: list[str], *, timeout: int = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command from the repository's root; its output as text."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
