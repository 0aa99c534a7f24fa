"""Which machines give the same last bits."""

import hashlib
import platform
from pathlib import Path

import torch


def platform_key() -> str:
    """What decides the last bit: the processor's vector instructions and torch's build."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.exists() else []
    digest = hashlib.sha256("".join(flags[:1]).encode()).hexdigest()[:16]
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {digest} torch {torch.__version__}"
