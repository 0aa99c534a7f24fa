"""Work in chunks of rows, so that the temporaries of eager code stay in a CPU's cache, and small on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

CPU_ELEMENTS = 1 << 17  # 512 kB in float32
GPU_ELEMENTS = 1 << 21  # an operation on fewer takes an H100 no longer than its launch
COMPILED_ELEMENTS = 1 << 24  # compiled code has next to no temporaries
PRODUCT_ROWS = 256  # on a CPU, a matrix product of fewer rows takes up to twice as long for each of them

_META_STANDS_FOR = ContextVar("_META_STANDS_FOR", default="cuda")


@contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Code that runs on the meta device, to be planned, goes the way of that device: `cuda`, the default, or `cpu`."""
    token = _META_STANDS_FOR.set(device_type)
    try:
        yield
    finally:
        _META_STANDS_FOR.reset(token)


def on_cpu(device: torch.device) -> bool:
    """Whether code goes the way of a CPU, where small chunks are fast and values can be looked at."""
    return (_META_STANDS_FOR.get() if device.type == "meta" else device.type) == "cpu"


def row_chunks(
    rows: int, width: int, *, device: torch.device, multiple: int = 1, elements: int | None = None
) -> Iterator[slice]:
    """Ranges of rows that cover all of them. Compiled code has no temporaries, and gets all rows at once.

    width: elements of a row.
    device: chunks are larger on a GPU.
    multiple: rows of every chunk but the last are a multiple of this number.
    elements: elements of a chunk, if it is not the device that decides, in compiled code too; chunks have equal sizes.
    """
    if elements is not None:
        count = -(-rows // max(1, -(-rows * width // elements)))
    elif torch.compiler.is_compiling():
        count = rows
    else:
        count = (CPU_ELEMENTS if on_cpu(device) else GPU_ELEMENTS) // max(1, width)
    step = max(1, -(-count // multiple)) * multiple
    starts = range(0, max(1, rows), step)
    for start in starts:
        if device.type == "meta" and start not in (*starts[:2], starts[-1]):
            continue  # it would be like its neighbours, and there is nothing to compute
        yield slice(start, min(start + step, rows))
