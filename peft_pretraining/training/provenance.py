"""What a run's figures depend on besides its arguments: versions, the commit of the code, the device."""

import argparse
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from peft_pretraining.distributed import World

PACKAGES = ("torch", "transformers", "datasets", "sentencepiece", "safetensors", "wandb", "peft")


def versions() -> dict[str, str | None]:
    """Versions of Python and of PACKAGES; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def circumstances(args: argparse.Namespace, *, world: World, groups: list[dict[str, Any]], norm: str) -> dict[str, Any]:
    """The first line of the record: everything that the later figures depend on.

    groups: one record for each parameter group, see plan.describe_groups.
    norm: which norm the record calls grad_norm.
    """
    return {
        "args": vars(args),
        "versions": versions(),
        "commit": git_commit(),
        "device": device_name(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "parameters": {"total": sum(g["elements"] for g in groups), **{g["name"]: g["elements"] for g in groups}},
        "groups": groups,
        "grad_norm": norm,
    }
