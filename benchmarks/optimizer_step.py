"""Milliseconds of one update of one matrix, by every optimizer, beside what the machine makes necessary.

    python benchmarks/optimizer_step.py --shape 2736x1024 --rank 256 --threads 1 --rounds 9

All cases take turns in one process, so that a busy machine slows down all of them; figures are medians of the rounds.
Ours run eager and compiled. Beside them: torch's fused AdamW, torchao's and bitsandbytes' 8-bit AdamW and galore-torch
where they are installed, and two floors: `products`, the projection of the gradient and the way back, in the dtype of
the weight; `copy`, reading and writing of the bytes of weight, gradient and two float32 moments once.
No update of the measured ones refreshes a basis.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

from benchmarks.support import machine, print_table, save_lines
from qgalore.factory import Settings, create_optimizer
from qgalore.param_groups import split_parameters
from qgalore.storage.convert import quantize_linear_layers

OURS: dict[str, dict[str, Any]] = {
    "8-bit AdamW": dict(name="adamw8bit"),
    "GaLore": dict(name="galore_adamw"),
    "8-bit GaLore": dict(name="galore_adamw8bit"),
    "Q-GaLore": dict(name="q_galore_adamw8bit", quantized=True, proj_bits=4),
    "GaLore, residual": dict(name="galore_adamw", lift="fira"),
    "Q-GaLore, residual": dict(name="q_galore_adamw8bit", quantized=True, proj_bits=4, lift="fira"),
    "GaLore, online PCA": dict(name="galore_adamw", proj_type="continuous"),
    "APOLLO": dict(name="apollo"),
    "FOAM": dict(name="foam"),
    "SCALE": dict(name="scale"),
    "Muon": dict(name="muon"),
}
FLOORS = ("products", "copy", "AdamW, torch, fused")
FOREIGN = {  # title: module and class
    "torchao 8-bit AdamW": ("torchao.optim", "AdamW8bit"),
    "bitsandbytes 8-bit AdamW": ("bitsandbytes.optim", "AdamW8bit"),
    "galore-torch AdamW": ("galore_torch", "GaLoreAdamW"),
}


def matrix(shape: tuple[int, int], *, dtype: torch.dtype, quantized: bool = False) -> nn.Module:
    """A module whose only parameter is a matrix, with a gradient."""
    net = nn.ModuleDict({"mlp": nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)})
    if quantized:
        quantize_linear_layers(net, select=lambda name: True, seed=0)
    weight = net["mlp"].weight
    weight.grad = torch.randn(shape).mul_(1e-3).to(dtype)
    return net


def ours(case: dict[str, Any], *, shape: tuple[int, int], rank: int, dtype: torch.dtype, compile: bool) -> Callable:
    case = dict(case)
    name, quantized = case.pop("name"), case.pop("quantized", False)
    settings = Settings(**case, rank=rank, update_proj_gap=10**6, lr=1e-4, compile=compile)
    net = matrix(shape, dtype=dtype, quantized=quantized)
    return create_optimizer(name, groups=split_parameters(net), settings=settings).step


def foreign(module: str, kind: str, *, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> Callable | None:
    try:
        found = getattr(importlib.import_module(module), kind)
    except ImportError:
        return None
    group: dict[str, Any] = dict(params=list(matrix(shape, dtype=dtype).parameters()))
    if module == "galore_torch":
        group |= dict(rank=rank, update_proj_gap=10**6, scale=0.25, proj_type="std")
    return found([group], lr=1e-4).step


def floors(shape: tuple[int, int], *, rank: int, dtype: torch.dtype) -> dict[str, Callable]:
    """The products of GaLore, the bytes of AdamW, and torch's own AdamW."""
    m, n = shape
    G, Q, D = (torch.randn(size).to(dtype) for size in (shape, (n, rank), (m, rank)))
    kept = torch.empty(m * n * (2 * dtype.itemsize + 8), dtype=torch.uint8)
    target, parameters = torch.empty_like(kept), list(matrix(shape, dtype=dtype).parameters())

    def products() -> None:
        torch.mm(G, Q)
        torch.mm(D, Q.mT)

    return {
        "products": products,
        "copy": lambda: target.copy_(kept),
        "AdamW, torch, fused": torch.optim.AdamW(parameters, lr=1e-4, fused=True).step,
    }


def prepare(args: argparse.Namespace) -> tuple[dict[str, Callable], dict[str, float]]:
    """The cases, each run twice, and the seconds of its first run."""
    shape = args.shape
    shared: dict[str, Any] = dict(shape=shape, rank=args.rank, dtype=getattr(torch, args.dtype))
    cases: dict[str, Callable | None] = dict(floors(**shared))
    for title, case in OURS.items():
        cases[title] = ours(case, compile=False, **shared)
        cases[f"{title}, compiled"] = ours(case, compile=True, **shared)
    for title, (module, kind) in FOREIGN.items():
        cases[title] = foreign(module, kind, **shared)
    kept = {
        title: step for title, step in cases.items() if step is not None and (args.only in title or title in FLOORS)
    }
    first = {}
    for title, step in kept.items():
        first[title] = _seconds(step)
        step()
    return kept, first


def _seconds(step: Callable[[], Any]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def measure(cases: dict[str, Callable], *, rounds: int, threads: int) -> dict[str, float]:
    """Median milliseconds of each case."""
    torch.set_num_threads(threads)
    found: dict[str, list[float]] = {title: [] for title in cases}
    for _ in range(rounds):
        for title, step in cases.items():
            step()  # the caches are another case's
            found[title].append(_seconds(step))
    return {title: 1e3 * median(times) for title, times in found.items()}


def _shape(text: str) -> tuple[int, int]:
    m, n = text.split("x")
    return int(m), int(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=_shape, default=(2736, 1024), metavar="MxN")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose name contains this; floors too")
    parser.add_argument("--output", type=Path, help="a file for JSON lines")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads[0])
    cases, first = prepare(args)
    rows = []
    for threads in args.threads:
        found = measure(cases, rounds=args.rounds, threads=threads)
        for title, milliseconds in found.items():
            ratios = {f"/ {floor}": milliseconds / found[floor] for floor in ("products", "AdamW, torch, fused")}
            rows.append({"case": title, "threads": threads, "ms": milliseconds, **ratios, "first, s": first[title]})
    print_table(rows)
    save_lines(args.output, rows, machine=machine(), arguments=vars(args))


if __name__ == "__main__":
    main()
