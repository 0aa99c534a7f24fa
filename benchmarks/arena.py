"""A fair comparison: every method with its own rate of the matrices and its own beta2, at equal tokens, with seeds.

    python benchmarks/arena.py --model_config configs/llama_arena_small.json --dataset data/books-tokens \\
        --tokenizer data/books-4096.model --updates 300 --seeds 0 1 2 --out benchmarks/results/arena_small.jsonl

Embedding, head and norms are trained alike, by AdamW at each of --lr, in every row but those of published recipes that
say otherwise. Of each method, and at each --lr, the rate of the matrices is swept on a grid of factors of two until the
best lies inside; a second beta2 is tried at that rate, and swept if it is better there; then the best of all is run
with the other seeds, which draw other weights and another order of the data, the same for all methods. `--begin_at N`
begins each sweep at the best rate of the trials with N updates. `--factors` takes the recommended method with one thing
changed at a time. Finished trials are read back from --out. Prints a Markdown table; see arena_tables.py for what it
has.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.arena_tables import Record, best_of, rates, score, summary, sweeps
from benchmarks.trials import Bench, Trial, finish

ELSEWHERE = ("--embedding_optimizer", "adamw")  # AdamW trains embedding, head and norms
ITERATE = ("--update_proj_gap", "10")
PUBLISHED = ("--subspace", "svd", "--update_proj_gap", "50", "--moments_on_refresh", "keep")
ONLINE = ("--update_proj_gap", "200", "--proj_type", "continuous", "--proj_lr", "0.04")
WEIGHTS = ("--weight_quant", "--stochastic_round")
INT8 = (*WEIGHTS, "--proj_quant")
FIRA = ("--residual", "fira")
AVERAGED = ("--subspace", "average")
INT8_EMBEDDING = ("--embedding_weight_bits", "8")
ADAMS, NONE = (0.95, 0.999), (None,)
MAX_STEPS = 8  # of a sweep away from where it began, in either direction


class Method(NamedTuple):
    """One row: the flags, first of them the optimizer, the rate of the matrices to begin at, and the beta2 to try."""

    flags: tuple[str, ...]
    matrix_lr: float
    beta2: tuple[float | None, ...] = ADAMS


METHODS: dict[str, Method] = {
    "AdamW": Method(("adamw",), 0.001),
    "8-bit AdamW": Method(("adamw8bit",), 0.001),
    "8-bit AdamW, INT8 weights": Method(("adamw8bit", *WEIGHTS), 0.001),
    "Muon": Method(("muon",), 0.004),
    "8-bit Muon, INT8 weights": Method(("muon8bit", *WEIGHTS), 0.004),
    "Lion": Method(("lion", *ELSEWHERE), 0.00025, (0.99,)),
    "Adafactor (torch)": Method(("adafactor",), 0.008, NONE),
    "SCALE": Method(("scale", *ELSEWHERE), 0.001),
    "SCALE as published": Method(("scale",), 0.001, NONE),
    "GaLore as published": Method(("galore_adamw", *PUBLISHED), 0.002),
    "GaLore": Method(("galore_adamw", *ITERATE), 0.002),
    "GaLore, residual": Method(("galore_adamw", *ITERATE, *FIRA), 0.002),
    "Fira as published": Method(("galore_adamw", *PUBLISHED, *FIRA), 0.002),
    "random bases": Method(("galore_adamw", "--proj_type", "random", "--update_proj_gap", "50"), 0.002),
    "Online Subspace Descent": Method(("galore_adamw", *ONLINE), 0.002),
    "APOLLO": Method(("apollo", "--update_proj_gap", "200"), 0.004),
    "APOLLO-Mini": Method(("apollo_mini", "--update_proj_gap", "200"), 0.004),
    "FOAM": Method(("foam",), 0.002),
    "FOAM, blocks of 8": Method(("foam3",), 0.002),
    "GaLore, averaged bases": Method(("galore_adamw", *ITERATE, *AVERAGED), 0.002),
    "GaLore, averaged bases, residual": Method(("galore_adamw", *ITERATE, *AVERAGED, *FIRA), 0.002),
    "GaLore, residual, SkipUpdate": Method(("galore_adamw", *ITERATE, *FIRA, "--skip_updates", "skip"), 0.002),
    "GaLore, residual, Magma": Method(("galore_adamw", *ITERATE, *FIRA, "--skip_updates", "magma"), 0.002),
    "GaLore Muon": Method(("galore_muon", *ITERATE), 0.004),
    "GaLore Muon, residual": Method(("galore_muon", *ITERATE, *FIRA), 0.004),
    "Q-GaLore": Method(("q_galore_adamw8bit_per_layer", *ITERATE, *INT8), 0.002),
    "Q-GaLore, lean": Method(
        ("q_galore_adamw8bit_per_layer", *ITERATE, *INT8, *INT8_EMBEDDING, "--proj_type", "auto"), 0.002
    ),
    "Q-GaLore, residual": Method(("q_galore_adamw8bit", *ITERATE, *INT8, *FIRA), 0.002),
    "Q-GaLore, averaged bases, residual": Method(("q_galore_adamw8bit", *ITERATE, *INT8, *AVERAGED, *FIRA), 0.002),
    "Q-GaLore, averaged bases, residual, INT8 embedding": Method(
        ("q_galore_adamw8bit", *ITERATE, *INT8, *AVERAGED, *FIRA, *INT8_EMBEDDING), 0.002
    ),
    "Q-GaLore Muon": Method(("q_galore_muon8bit_per_layer", *ITERATE, *INT8), 0.004),
    "Q-GaLore Muon, residual": Method(("q_galore_muon8bit", *ITERATE, *INT8, *FIRA), 0.004),
}


RECOMMENDED = "Q-GaLore, averaged bases, residual"


def _without(*left_out: str) -> tuple[str, ...]:
    return tuple(flag for flag in METHODS[RECOMMENDED].flags if flag not in left_out)


def _factor(*more: str, of: tuple[str, ...] = METHODS[RECOMMENDED].flags) -> Method:
    """The recommended method with other flags, of which the last counts."""
    recommended = METHODS[RECOMMENDED]
    return Method((*of, *more), recommended.matrix_lr, recommended.beta2[:1])


FACTORS: dict[str, Method] = {  # what it is that pays: the recommended method with one thing changed
    "as recommended": _factor(),
    "exact singular vectors": _factor("--subspace", "svd"),
    "bases from one gradient": _factor(of=_without(*AVERAGED)),
    "bases drawn at random": _factor("--proj_type", "random", of=_without(*AVERAGED)),
    "gap 50": _factor("--update_proj_gap", "50"),
    "gap 200": _factor("--update_proj_gap", "200"),
    "never lazy": _factor("--cos_threshold", "1"),
    "moments kept at a refresh": _factor("--moments_on_refresh", "keep"),
    "moments reset at a refresh": _factor("--moments_on_refresh", "reset"),
    "no residual": _factor(of=_without(*FIRA)),
    "rank 16": _factor("--rank", "16"),
    "rank 32": _factor("--rank", "32"),
    "rank 128": _factor("--rank", "128"),
    "rank 256": _factor("--rank", "256"),
    "float weights": _factor(of=_without(*WEIGHTS)),
    "weights rounded to nearest": _factor(of=_without("--stochastic_round")),
    "4-bit weights": _factor("--weight_bits", "4"),
    "INT8 embedding and head": _factor(*INT8_EMBEDDING),
    "float bases": _factor(of=_without("--proj_quant")),
    "32-bit moments": _factor("--cos_threshold", "0.6", of=("galore_adamw", *_without("q_galore_adamw8bit"))),
    "4-bit moments": _factor("--moments_bits", "4"),
}
ALL = METHODS | FACTORS


def wanted(
    records: list[Record], *, methods: Iterable[str], lrs: list[float], updates: int, seeds: list[int], begin_at: int
) -> Iterator[Trial]:
    """The trials wanted next: sweeps with the first seed, then the best of a finished sweep with the others.

    lrs: learning rates of embedding, head and norms; a method is swept at each of them.
    """
    first, *others = seeds
    later = []
    for name in methods:
        steps = [
            (lr, rate, beta2)
            for lr in lrs
            for rate, beta2 in _sweep(records, name, lr=lr, updates=updates, seed=first, begin_at=begin_at)
        ]
        trial = partial(Trial, name, ALL[name].flags, updates=updates)
        yield from (trial(*step, seed=first) for step in steps)
        mine = [r for r in records if (r["method"], r["updates"], r["seed"]) == (name, updates, first)]
        mine = [r for r in mine if r["lr"] in lrs]
        if set(steps) <= set(map(rates, mine)):
            later += [trial(*rates(best_of(mine)), seed=seed) for seed in others]
    yield from later


def _sweep(
    records: list[Record], name: str, *, lr: float, updates: int, seed: int, begin_at: int
) -> Iterator[tuple[float, float | None]]:
    """Pairs of a rate of the matrices and a beta2 that a sweep needs, as far as the records tell."""
    method = ALL[name]
    start, beta2s = method.matrix_lr, method.beta2
    before = [r for r in records if (r["method"], r["lr"], r["updates"]) == (name, lr, begin_at)]
    if before:
        best = best_of(before)
        start, beta2s = best["matrix_lr"], (best["beta2"],)
    lowest = math.inf  # of the beta2 before
    for number, beta2 in enumerate(beta2s):
        fits = (name, lr, updates, seed, beta2)
        found = {
            r["matrix_lr"]: score(r)
            for r in records
            if (r["method"], r["lr"], r["updates"], r["seed"], r["beta2"]) == fits
        }
        if number:  # a second beta2 is swept only if it is better at the best rate of the first
            yield start, beta2
            if found.get(start, math.inf) >= lowest:
                break
        centre = min(found, key=lambda rate: found[rate]) if found else start
        if found and found[centre] == math.inf:  # all have diverged
            centre = min(found) / 2
        if abs(math.log2(centre / method.matrix_lr)) > MAX_STEPS:
            continue
        steps = (centre, centre / 2, centre * 2)
        yield from ((rate, beta2) for rate in steps)
        if not found.keys() >= set(steps):
            break
        start, lowest = centre, found[centre]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model_config", "dataset", "tokenizer"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a trial")
    parser.add_argument("--work", type=Path, help="folder of unfinished runs, which then go on from their checkpoints")
    for name, default in (
        ("rank", 64),
        ("updates", 300),
        ("batch_size", 8),
        ("eval_tokens", 100_000),
        ("jobs", 1),
        ("evaluations", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[0.008, 0.016], help="learning rates of embedding, head and norms"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(ALL), metavar="METHOD")
    parser.add_argument("--factors", action="store_true", help="of the recommended method, one thing changed at a time")
    parser.add_argument("--begin_at", type=int, default=0, metavar="N", help="begin at the best rates after N updates")
    parser.add_argument("--seconds", type=float, default=math.inf, help="how long this may go on")
    parser.add_argument("--compile", action="store_true", help="run with --compile: the same to rounding, and faster")
    args = parser.parse_args()
    args.methods = list(FACTORS) if args.factors else args.methods
    shared = (
        "model_config",
        "dataset",
        "tokenizer",
        "rank",
        "batch_size",
        "eval_tokens",
        "evaluations",
        "compile",
        "work",
    )
    bench = Bench(**{name: getattr(args, name) for name in shared})
    ask = partial(
        wanted, methods=args.methods, lrs=args.lr, updates=args.updates, seeds=args.seeds, begin_at=args.begin_at
    )
    records = finish(ask, bench, out=args.out, jobs=args.jobs, seconds=args.seconds)
    mine = [r for r in records if r["updates"] == args.updates and r["lr"] in args.lr and r["method"] in args.methods]
    if mine:
        print(summary(mine), sweeps(mine), sep="\n\n")
    return 0 if mine else 1


if __name__ == "__main__":
    sys.exit(main())
