"""One update of one matrix on a GPU, by the size of the chunks of eager code, and compiled.

    python benchmarks/gpu_chunks.py --shapes 4096x4096 11008x4096 --rank 1024 --output gpu_chunks.jsonl

    host, ms     until the last kernel has been asked for: where it is near `wall`, the GPU waits for Python
    wall, ms     until the last kernel has ended; mean of --updates
    peak, MB     the most that was allocated beside what is kept
    kernels, kernels ms    of one update, from the profiler: what the GPU has worked

bfloat16 weights, or INT8 ones where the optimizer's name begins with q_. No update refreshes a basis.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.optimizer_step import matrix
from benchmarks.support import machine, print_table, save_lines
from qgalore.factory import Settings, create_optimizer
from qgalore.param_groups import split_parameters
from qgalore.storage import chunks


def update_of(shape: tuple[int, int], name: str, *, rank: int, compile: bool) -> Callable[[], None]:
    """The update of a matrix on the GPU from a gradient that stays the same."""
    net = matrix(shape, dtype=torch.bfloat16, quantized=name.startswith("q_")).cuda()
    weight = net["mlp"].weight
    gradient = torch.randn(shape, device="cuda").mul_(1e-3).to(torch.bfloat16)
    bits = 4 if name.startswith("q_") else None
    settings = Settings(rank=rank, proj_bits=bits, update_proj_gap=10**6, lr=1e-4, compile=compile)
    optimizer = create_optimizer(name, groups=split_parameters(net), settings=settings)
    update = optimizer.updates[weight]
    return lambda: update.complete(update.prepare(gradient))


@torch.no_grad()
def measure(update: Callable[[], None], *, updates: int) -> dict[str, Any]:
    """The figures of a row."""
    for _ in range(2):
        update()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    kept, began = torch.cuda.memory_allocated(), time.perf_counter()
    for _ in range(updates):
        update()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    wall, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() - kept
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        update()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    return {
        "host, ms": 1e3 * host / updates,
        "wall, ms": 1e3 * wall / updates,
        "peak, MB": peak / 1e6,
        "kernels": len(kernels),
        "kernels, ms": sum(event.device_time for event in kernels) / 1e3,
    }


def _shape(text: str) -> tuple[int, int]:
    m, n = text.split("x")
    return int(m), int(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(4096, 4096), (11008, 4096)], metavar="MxN")
    parser.add_argument("--optimizers", nargs="+", default=["q_galore_adamw8bit", "galore_adamw", "adamw8bit"])
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--elements", type=int, nargs="+", default=[1 << 21, 1 << 23, 1 << 25], help="of a chunk")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--output", type=Path, help="a file for JSON lines")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a GPU")
    rows, usual = [], chunks.GPU_ELEMENTS
    for shape in args.shapes:
        for name in args.optimizers:
            for elements in [*args.elements, None]:
                chunks.GPU_ELEMENTS = elements or usual
                update = update_of(shape, name, rank=args.rank, compile=elements is None)
                row = {"matrix": "{} x {}".format(*shape), "optimizer": name, "elements": elements or "compiled"}
                rows.append(row | measure(update, updates=args.updates))
    print_table(rows)
    save_lines(args.output, rows, machine=machine(), arguments=vars(args))


if __name__ == "__main__":
    main()
