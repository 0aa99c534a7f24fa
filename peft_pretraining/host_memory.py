"""The host memory that this process may still take."""

from pathlib import Path

_CGROUPS = (  # limit and use of version 2, and of version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_host_memory() -> int | None:
    """Bytes that are free on the machine and within the limit of the container; None if the system does not say.

    What files have left in the cache counts as free on the machine, but not within the limit of a container.
    """
    found = [_available()] + [_within(limit, use) for limit, use in _CGROUPS]
    return min((size for size in found if size is not None), default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _within(limit: str, use: str) -> int | None:
    try:
        return int(Path(limit).read_text()) - int(Path(use).read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None
