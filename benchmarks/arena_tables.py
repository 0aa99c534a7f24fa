"""The tables of arena.py, from its records.

perplexity      at the best rates, mean over the seeds and its standard error
/ AdamW         the perplexity divided by that of AdamW at its best rates, seed by seed, and its standard error
bytes           kept between updates (weights, bases, moments) of the matrices and all else, and beside AdamW's
tokens/s        median over a run; runs share the machine
"""

import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

BASELINE = "AdamW"
Record = dict[str, Any]


def score(record: Record) -> float:
    """Its perplexity; infinite where the run has diverged."""
    return math.inf if record["perplexity"] is None else record["perplexity"]


def best_of(records: Iterable[Record]) -> Record:
    """The one with the lowest perplexity."""
    return min(records, key=score)


def rates(record: Record) -> tuple[float, float, float | None]:
    """Learning rate of embedding, head and norms; that of the matrices; beta2."""
    return record["lr"], record["matrix_lr"], record["beta2"]


def at_best(records: Sequence[Record], method: str) -> dict[int, Record]:
    """A method's trials at its best rates of the first seed, by seed."""
    mine = [r for r in records if r["method"] == method]
    first = min(r["seed"] for r in mine)
    best = rates(best_of(r for r in mine if r["seed"] == first))
    return {r["seed"]: r for r in mine if rates(r) == best}


def lies_inside(best: Record, records: Sequence[Record]) -> bool:
    """Whether half and twice the rate of the matrices were tried, with the same other rates and some seed."""
    name, lr, rate, beta2 = best["method"], *rates(best)
    tried = {r["matrix_lr"] for r in records if (r["method"], r["lr"], r["beta2"]) == (name, lr, beta2)}
    return {rate / 2, rate * 2} <= tried


def with_error(values: Sequence[float], *, digits: int) -> str:
    """The mean and its standard error, if there are several values."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / math.sqrt(len(values)):.{digits}f}"


def summary(records: Sequence[Record]) -> str:
    """One row a method, the best first."""
    methods = list(dict.fromkeys(r["method"] for r in records))
    found = {method: at_best(records, method) for method in methods}
    order = sorted(methods, key=lambda method: mean(map(score, found[method].values())))
    heads = ("matrices trained by", "rate", "of the rest", "beta2", "perplexity", "/ AdamW", "seeds", "kept, MB",
             "/ AdamW", "tokens/s")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    baseline = found.get(BASELINE)
    for method in order:
        mine = found[method]
        one = next(iter(mine.values()))
        beside = sized = ""
        if baseline:
            ratios = [score(mine[seed]) / score(baseline[seed]) for seed in sorted(mine.keys() & baseline.keys())]
            beside = with_error(ratios, digits=3) if ratios else ""
            sized = f"{kept(one) / kept(next(iter(baseline.values()))):.2f}" if one["kept_bytes"] else ""
        beta2 = "-" if one["beta2"] is None else f"{one['beta2']:g}"
        perplexity = with_error([score(r) for r in mine.values()], digits=2)
        size = f"{kept(one) / 1e6:.1f}" if one["kept_bytes"] else ""
        speed = f"{max(r['tokens_per_second'] for r in mine.values()):,}"
        cells = (
            method,
            f"{one['matrix_lr']:g}",
            f"{one['lr']:g}",
            beta2,
            perplexity,
            beside,
            str(len(mine)),
            size,
            sized,
            speed,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kept(record: Record) -> int:
    """Bytes that a run keeps between updates."""
    return sum(record["kept_bytes"].values())


def sweeps(records: Sequence[Record]) -> str:
    """Every trial of the first seed: perplexities by the rate of the matrices, a row for each other pair of rates."""
    first = min(r["seed"] for r in records)
    lines = [
        "| matrices trained by | rate of the rest | beta2 | perplexity at each rate of the matrices |",
        "|---|---|---|---|",
    ]
    groups: dict[tuple[str, float, float | None], list[Record]] = {}
    for record in records:
        if record["seed"] == first:
            groups.setdefault((record["method"], record["lr"], record["beta2"]), []).append(record)
    for (method, lr, beta2), mine in groups.items():
        found = (f"{r['matrix_lr']:g}: {score(r):.1f}" for r in sorted(mine, key=rates))
        lines.append(f"| {method} | {lr:g} | {'-' if beta2 is None else f'{beta2:g}'} | {', '.join(found)} |")
    return "\n".join(lines)
