"""Work in chunks of rows, so that the temporaries of eager code stay in a CPU's cache, and small on a GPU."""

from collections.abc import Iterator

import torch

CPU_ELEMENTS = 1 << 17  # 512 kB in float32
GPU_ELEMENTS = 1 << 24
PRODUCT_ROWS = 256  # a matrix product of fewer rows takes up to twice as long for each of them


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
        count = (CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS) // max(1, width)
    step = max(1, -(-count // multiple)) * multiple
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))
