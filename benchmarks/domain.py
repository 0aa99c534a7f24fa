"""A model goes on learning from text of another kind: validation loss by tokens, for every way to fine-tune.

    python benchmarks/domain.py --model runs/small_llama/model --updates 60 --out benchmarks/results/domain.jsonl

--model is a transformers folder with its tokenizer, pre-trained on something else than --dataset (default: pydocs, the
documentation that comes with Python and torch; a model that has read books is bad at it). A method's learning rate is
swept with the first seed on a grid of factors of 3 until the best lies inside, then run with the other seeds, which
draw another order of the data. It is one for all that a method trains, and `--galore_scale` gives projected matrices a
quarter of it; in rows with `/ 16` the matrices have a sixteenth of it, and so on. Finished trials are read back from
--out. Prints a table of losses along the way; `--picture NAME` draws them into docs/NAME-light.svg and -dark.svg.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.axes import Axes

from benchmarks.arena_pictures import ROOT, picture, write_themed
from benchmarks.arena_tables import Record, at_best, kept, score, with_error
from benchmarks.finetune import best_rate, next_rate
from benchmarks.trials import Bench, Trial, finish
from peft_pretraining.report.drawing import NUMBERS, colour, dashes

GAP = ("--update_proj_gap", "10")
OTHERS_FROZEN = ("--freeze_others",)
INT8 = ("--weight_quant", "--stochastic_round", "--proj_quant")
FOUR_BITS = ("--weight_bits", "4", "--weight_group_size", "64")
ADAPTERS = ("adamw", "--peft", "lora", *OTHERS_FROZEN)


class Method(NamedTuple):
    """One row: the flags, first of them the optimizer, and the rate at which its sweep begins."""

    flags: tuple[str, ...]
    lr: float


METHODS: dict[str, Method] = {
    "full": Method(("adamw",), 1e-3),
    "full, matrices / 4": Method(("adamw", "--matrix_lr_ratio", "0.25"), 3e-3),
    "full, matrices / 16": Method(("adamw", "--matrix_lr_ratio", "0.0625"), 9e-3),
    "full, 8-bit": Method(("adamw8bit",), 1e-3),
    "GaLore": Method(("galore_adamw", *GAP), 3e-3),
    "GaLore, 8-bit": Method(("galore_adamw8bit", *GAP), 3e-3),
    "Q-GaLore": Method(("q_galore_adamw8bit_per_layer", *GAP, *INT8), 3e-3),
    "Q-GaLore, matrices / 16": Method(
        ("q_galore_adamw8bit_per_layer", *GAP, *INT8, "--galore_scale", "0.0625"), 2.7e-2
    ),
    "APOLLO": Method(("apollo", *GAP), 3e-3),
    "GaLore, others frozen": Method(("galore_adamw", *GAP, *OTHERS_FROZEN), 3e-3),
    "Q-GaLore, others frozen": Method(("q_galore_adamw8bit_per_layer", *GAP, *INT8, *OTHERS_FROZEN), 3e-3),
    "Q-GaLore, others frozen, 4 bits": Method(
        ("q_galore_adamw8bit_per_layer", *GAP, *INT8, *OTHERS_FROZEN, *FOUR_BITS), 3e-3
    ),
    "LoRA": Method(ADAPTERS, 3e-3),
    "LoRA, others trained": Method(("adamw", "--peft", "lora"), 3e-3),
    "LoRA, others trained, factors / 4": Method(("adamw", "--peft", "lora", "--matrix_lr_ratio", "0.25"), 9e-3),
    "QLoRA": Method((*ADAPTERS, "--weight_quant", *FOUR_BITS), 3e-3),
}


def wanted(records: list[Record], *, methods: Iterable[str], updates: int, seeds: list[int]) -> Iterator[Trial]:
    """The trials wanted next: sweeps with the first seed, then the best rate of a finished sweep with the others."""
    first, *others = seeds
    later = []
    for name in methods:
        flags, begin = METHODS[name]
        found = {r["lr"]: -score(r) for r in records if _of(r, name, updates) and r["seed"] == first}
        trial = partial(Trial, name, flags, matrix_lr=None, beta2=None, updates=updates)
        rate = next_rate(found, begin=begin)
        if rate is None:
            later += [trial(best_rate(found, begin=begin), seed=seed) for seed in others]
        else:
            yield trial(rate, seed=first)
    yield from later


def _of(record: Record, method: str, updates: int) -> bool:
    return (record["method"], record["updates"]) == (method, updates)


def table(records: list[Record]) -> str:
    """Markdown: a row a method, the best first; perplexity at the end, losses on the way, bytes, speed."""
    found = {name: at_best(records, name) for name in METHODS if any(r["method"] == name for r in records)}
    points = [update for update, _ in next(iter(next(iter(found.values())).values()))["validation"]]
    heads = ["trained by", "rate", *(f"loss at {point}" for point in points), "perplexity", "seeds", "kept, MB",
             "tokens/s"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in sorted(found, key=lambda name: mean(map(score, found[name].values()))):
        mine = list(found[name].values())
        losses = [with_error([dict(r["validation"]).get(point, float("nan")) for r in mine], digits=3)
                  for point in points]  # fmt: skip
        speed = f"{max(r['tokens_per_second'] for r in mine):,}"
        end = with_error([score(r) for r in mine], digits=1)
        cells = [name, f"{mine[0]['lr']:g}", *losses, end, str(len(mine)), f"{kept(mine[0]) / 1e6:.1f}", speed]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(axes: Axes, records: list[Record], methods: Iterable[str]) -> None:
    """Validation loss by tokens, mean over the seeds, at each method's best rate."""
    for number, method in enumerate(methods):
        mine = list(at_best(records, method).values())
        tokens = mine[0]["batch_size"] * 256
        lines = [dict(r["validation"]) for r in mine]
        points = sorted(set.intersection(*map(set, lines)))
        axes.plot([p * tokens for p in points], [mean(line[p] for line in lines) for p in points], "o", markersize=4,
                  linestyle=dashes(number), color=colour(number), label=method)  # fmt: skip
    axes.xaxis.set_major_formatter(NUMBERS)
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    bench = Bench(
        model_config=str(args.model / "config.json"), dataset=args.dataset, tokenizer=str(args.model), rank=args.rank,
        batch_size=args.batch_size, eval_tokens=args.eval_tokens, evaluations=args.evaluations,
        more=("--continue_from", str(args.model)),
    )  # fmt: skip
    ask = partial(wanted, methods=args.methods, updates=args.updates, seeds=args.seeds)
    records = finish(ask, bench, out=args.out, jobs=args.jobs, seconds=args.seconds)
    mine = [r for r in records if r["updates"] == args.updates and r["method"] in args.methods]
    if mine:
        print(table(mine))
        if args.picture:
            run = [name for name in args.methods if any(r["method"] == name for r in mine)]
            write_themed(picture(curves, mine, run), args.picture, folder=ROOT / "docs")
    return 0 if mine else 1


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="transformers folder with its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a trial")
    parser.add_argument("--dataset", default="pydocs", metavar="NAME|PATH")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, default in (
        ("rank", 8),
        ("updates", 60),
        ("batch_size", 8),
        ("eval_tokens", 20_000),
        ("evaluations", 6),
        ("jobs", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long this may go on")
    parser.add_argument("--picture", metavar="NAME")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
