"""What a basis costs and what it is worth: exact factorizations, orthogonal iteration, online PCA, side by side.

    python benchmarks/subspace.py --shapes 1024x2736 2048x5461 --ranks 256 512 --repeats 5 --threads 2

The gradient has singular values that fall like 1 / sqrt(i), over noise. It has turned a little since the warm starts
saw it. All methods of one shape and rank run in turn, repeat by repeat, in one process, so that a busy machine slows
all of them alike. Prints a Markdown table: seconds (the median), how many times faster than the SVD, energy
(||P^T G||^2 over the most that any basis of that rank captures) and overlap with the exact subspace, ||P^T U||_F^2 / r.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from qgalore.online_pca import pca_gradient
from qgalore.subspace import exact_basis, iterate_basis, orthonormalize, randomized_basis

Method = Callable[[], Tensor]
STEP = 1 / 200  # of online PCA: the reference's usual gap


def gradients(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Two gradients, (m, n) float32; the subspace of the second has turned by about a tenth from that of the first."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.arange(1, m + 1) ** -0.5  # m <= n
    left, right = (torch.randn(k, m, generator=generator) for k in (m, n))
    turned = left + 0.1 * torch.randn(m, m, generator=generator)
    noise = [0.1 * torch.randn(m, n, generator=generator) for _ in range(2)]
    first, second = ((side * strength) @ right.mT / m**0.5 for side in (left, turned))
    return first + noise[0], second + noise[1]


def autograd_step(G: Tensor, P: Tensor) -> Tensor:
    """A step of online PCA as the reference takes it: autograd, through the projector of the whole side."""
    P = P.clone().requires_grad_()
    unit = G / G.norm()
    loss = (unit - P @ P.mT @ unit).square().sum()
    (gradient,) = torch.autograd.grad(loss, P)
    return P.detach() - STEP * gradient.sign()


def online_step(G: Tensor, P: Tensor) -> Tensor:
    """The same step by the closed form, its projection R counted in."""
    return P - STEP * pca_gradient(G.mT, G.mT @ P, P, reg=0.0).sign()


def methods(G: Tensor, *, old: Tensor, rank: int) -> dict[str, Method]:
    """By title: what gives a basis (m, rank) of G's left side. old: the exact basis of the gradient before."""
    return {
        "torch.linalg.svd": lambda: torch.linalg.svd(G, full_matrices=False).U[:, :rank],
        "Gram + eigh": lambda: exact_basis(G, rank=rank),
        "orthogonal iteration, cold": lambda: randomized_basis(G, rank=rank, seed=0),
        "orthogonal iteration, warm": lambda: iterate_basis(G, old),
        "online PCA, one step": lambda: online_step(G, old),
        "online PCA, by autograd": lambda: autograd_step(G, old),
        "the old basis": lambda: old,
    }


def measure(shape: tuple[int, int], rank: int, *, repeats: int) -> list[str]:
    """The table's rows for one shape and rank."""
    before, G = gradients(*shape)
    exact = exact_basis(G, rank=rank)
    most = (exact.mT @ G).square().sum()
    chosen = methods(G, old=exact_basis(before, rank=rank), rank=rank)
    seconds: dict[str, list[float]] = {title: [] for title in chosen}
    found: dict[str, Tensor] = {}
    for _ in range(repeats):
        for title, method in chosen.items():
            began = time.perf_counter()
            found[title] = method()
            seconds[title].append(time.perf_counter() - began)
    medians = {title: statistics.median(times) for title, times in seconds.items()}
    rows = []
    for title, basis in found.items():
        P = orthonormalize(basis)
        energy, overlap = (P.mT @ G).square().sum() / most, (P.mT @ exact).square().sum() / rank
        took = f"{medians[title]:.4f} | {medians['torch.linalg.svd'] / medians[title]:.1f}"
        took = "- | -" if title == "the old basis" else took
        rows.append(f"| {shape[0]}x{shape[1]} | {rank} | {title} | {took} | {energy:.4f} | {overlap:.4f} |")
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
    args = parser.parse_args(argv)
    too_large = [(shape, rank) for shape in args.shapes for rank in args.ranks if not 1 <= rank <= shape[0]]
    if too_large or args.repeats < 1 or args.threads < 1:
        print("error: ranks must lie between 1 and the shorter side, repeats and threads be 1 or more", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, median of {args.repeats} interleaved repeats\n")
    print("| shape | rank | method | seconds | times faster than the SVD | energy | overlap |")
    print("|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        for rank in args.ranks:
            print("\n".join(measure(shape, rank, repeats=args.repeats)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
