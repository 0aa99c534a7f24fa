"""What a basis costs and what it is worth: exact factorizations, orthogonal iteration, online PCA, side by side.

    python benchmarks/subspace.py --shapes 1024x2736 2048x5461 --ranks 256 512 --repeats 5 --threads 2

The gradient's singular values fall like i^-decay; its left vectors have turned, by --turn of their length, since the
warm starts saw it. Products run in --dtype, as in training; the SVD in float32, for there is none below. All methods of
one shape and rank run in turn, repeat by repeat, in one process, so that a busy machine slows all of them alike.

Prints two Markdown tables. Bases: seconds (the median), how many times faster than the SVD, energy (||P^T G||^2 over
the most that any basis of that rank captures) and overlap with the exact subspace, ||P^T U||_F^2 / r. Online PCA, in
float32: the gradient for a basis of either side by the closed form, and by autograd through the projector P P^T of
the whole side; the projected gradient R, which the update of the weights needs in any case, counts in neither.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from qgalore.subspace.bases import exact_basis, iterate_basis, randomized_basis
from qgalore.subspace.online_pca import pca_gradient

Method = Callable[[], Tensor]


def gradients(m: int, n: int, *, decay: float, turn: float) -> tuple[Tensor, Tensor]:
    """Two gradients, (m, n) float32: the left vectors of the second have turned by `turn` from those of the first."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.arange(1, m + 1) ** -decay  # m <= n
    left, right, noise = (torch.randn(k, m, generator=generator) for k in (m, n, m))
    first, second = ((side * strength) @ right.mT / m**0.5 for side in (left, left + turn * noise))
    return first, second


def autograd_gradient(G: Tensor, P: Tensor) -> Tensor:
    """What online PCA follows, by autograd and the projector of the whole side. (m, n), (n, r) -> (n, r)"""
    P = P.clone().requires_grad_()
    unit = G / G.norm()
    loss = (unit - unit @ (P @ P.mT)).square().sum()
    return torch.autograd.grad(loss, P)[0]


def bases(G: Tensor, *, old: Tensor, rank: int) -> dict[str, Method]:
    """By title: what gives a basis (m, rank) of G's left side. old: the exact basis of the gradient before."""
    return {
        "torch.linalg.svd": lambda: torch.linalg.svd(G.float(), full_matrices=False).U[:, :rank],
        "Gram + eigh": lambda: exact_basis(G, rank=rank),
        "orthogonal iteration, cold": lambda: randomized_basis(G, rank=rank, seed=0),
        "orthogonal iteration, warm": lambda: iterate_basis(G, old),
        "the old basis": lambda: old,
    }


def race(methods: dict[str, Method], *, repeats: int) -> dict[str, tuple[float, Tensor]]:
    """By title: the median seconds that a method took, and what it gave. All of them in turn, `repeats` times."""
    seconds: dict[str, list[float]] = {title: [] for title in methods}
    found: dict[str, Tensor] = {}
    for _ in range(repeats):
        for title, method in methods.items():
            began = time.perf_counter()
            found[title] = method()
            seconds[title].append(time.perf_counter() - began)
    return {title: (statistics.median(times), found[title]) for title, times in seconds.items()}


def compare_bases(shape: tuple[int, int], rank: int, *, args: argparse.Namespace) -> list[str]:
    """The first table's rows for one shape and rank."""
    before, G = (g.to(getattr(torch, args.dtype)) for g in gradients(*shape, decay=args.decay, turn=args.turn))
    exact, wide = exact_basis(G, rank=rank), G.float()
    most = (exact.mT @ wide).square().sum()
    results = race(bases(G, old=exact_basis(before, rank=rank), rank=rank), repeats=args.repeats)
    svd, _ = results["torch.linalg.svd"]
    rows = []
    for title, (seconds, P) in results.items():
        energy, overlap = (P.mT @ wide).square().sum() / most, (P.mT @ exact).square().sum() / rank
        took = "- | -" if title == "the old basis" else f"{seconds:.4f} | {svd / seconds:.1f}"
        rows.append(f"| {shape[0]}x{shape[1]} | {rank} | {title} | {took} | {energy:.4f} | {overlap:.4f} |")
    return rows


def compare_gradients(shape: tuple[int, int], rank: int, *, args: argparse.Namespace) -> list[str]:
    """The second table's rows for one shape and rank."""
    _, G = gradients(*shape, decay=args.decay, turn=args.turn)
    rows = []
    for side, H in (("shorter", G.mT), ("longer", G)):  # the basis is of H's right side
        P = randomized_basis(H.mT, rank=rank, seed=0)
        R = H @ P
        methods = {"closed": partial(pca_gradient, H, R, P, reg=0.0), "autograd": partial(autograd_gradient, H, P)}
        results = race(methods, repeats=args.repeats)
        (closed, ours), (autograd, theirs) = results["closed"], results["autograd"]
        apart = (ours - theirs).norm() / theirs.norm()
        times = f"{closed:.4f} | {autograd:.4f} | {autograd / closed:.1f}"
        rows.append(f"| {shape[0]}x{shape[1]} | {rank} | {side} | {times} | {apart:.0e} |")
    return rows


def parse_shape(text: str) -> tuple[int, int]:
    """1024x2736; the shorter side comes first, for it is the one that is projected."""
    sides = sorted(int(side) for side in text.split("x") if side.isdigit() and int(side) > 0)
    if len(sides) != 2 or len(text.split("x")) != 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a shape such as 1024x2736")
    return sides[0], sides[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=[(1024, 2736), (2048, 5461)], metavar="MxN")
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 512], metavar="COLUMNS")
    parser.add_argument("--repeats", type=int, default=5, metavar="TIMES")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the gradient's products"
    )
    parser.add_argument("--decay", type=float, default=0.5, help="of the singular values: i^-decay")
    parser.add_argument("--turn", type=float, default=0.1, help="of the left vectors since the warm start")
    args = parser.parse_args(argv)
    too_large = [(shape, rank) for shape in args.shapes for rank in args.ranks if not 1 <= rank <= shape[0]]
    if too_large or args.repeats < 1 or args.threads < 1:
        print("error: ranks must lie between 1 and the shorter side, repeats and threads be 1 or more", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    pairs = [(shape, rank) for shape in args.shapes for rank in args.ranks]
    print(f"torch {torch.__version__}, {args.threads} threads, median of {args.repeats} interleaved repeats\n")
    print(f"{args.dtype} gradient, decay {args.decay:g}, turn {args.turn:g}\n")
    print("| shape | rank | basis by | seconds | times faster than the SVD | energy | overlap |")
    print("|---|---|---|---|---|---|---|")
    for shape, rank in pairs:
        print("\n".join(compare_bases(shape, rank, args=args)), flush=True)
    print("\n| shape | rank | side | closed form, seconds | autograd, seconds | times faster | apart |")
    print("|---|---|---|---|---|---|---|")
    for shape, rank in pairs:
        print("\n".join(compare_gradients(shape, rank, args=args)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
