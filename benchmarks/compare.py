"""Validation perplexity of several methods at equal tokens, learning rates swept, with seeds.

    python benchmarks/compare.py --model_config configs/llama_9m.json --dataset data/books \\
        --tokenizer data/spiece.model --rank 32 --updates 300 --jobs 2 --out benchmarks/results/llama_9m.jsonl

Every run has one thread, and there are `--jobs` of them side by side. Each method is run at all of its learning rates
with the first seed, and at the best of them with the others. Finished runs are read back from --out, so a comparison
that was interrupted goes on where it was. Prints a Markdown table. `arena.py` sweeps the rate of the matrices apart.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.trials import Bench, Trial, finish

RATES = (0.004, 0.008, 0.016)
QUARTER, SIXTEENTH = (["--matrix_lr_ratio", ratio] for ratio in ("0.25", "0.0625"))
LOW_RANK = ["--galore_scale", "0.25"]
ITERATE = [*LOW_RANK, "--update_proj_gap", "10"]
ONLINE = [*LOW_RANK, "--update_proj_gap", "200", "--proj_type"]  # its code's steps: 1 / 200
FIVEFOLD = ["--proj_lr", "0.04"]  # its paper's: five times the learning rate, here 0.008
NEAREST = ["--weight_quant", "--proj_quant"]
INT8 = [*NEAREST, "--stochastic_round"]
ROWS = ["--weight_group_size", "-1"]
NOT_LAZY = ["--cos_threshold", "1"]
FIRA = ["--residual", "fira"]
RECOMMENDED = "Q-GaLore, lazy, residual recovered (recommended)"
Methods = dict[str, tuple[str, list[str], tuple[float, ...]]]
METHODS: Methods = {  # title: optimizer, flags, learning rates
    "AdamW, full rank": ("adamw", [], (0.001, 0.002, 0.004)),
    "AdamW, full rank, the matrices at a quarter of the rate": ("adamw", QUARTER, RATES),
    "AdamW, full rank, the matrices at a sixteenth of the rate": ("adamw", SIXTEENTH, (0.008, 0.016, 0.032)),
    "AdamW, full rank, the matrices at a 64th of the rate": ("adamw", ["--matrix_lr_ratio", "0.015625"], (0.016,)),
    "GaLore as the reference: SVD, gap 50, moments kept": (
        "galore_adamw",
        [*LOW_RANK, "--subspace", "svd", "--update_proj_gap", "50", "--moments_on_refresh", "keep"],
        RATES,
    ),
    "GaLore: iteration, gap 10, first moment carried over": ("galore_adamw", ITERATE, RATES),
    "GaLore: iteration, gap 10, residual recovered": ("galore_adamw", [*ITERATE, *FIRA], RATES),
    "GaLore: random bases, gap 50": (
        "galore_adamw",
        [*LOW_RANK, "--update_proj_gap", "50", "--proj_type", "random"],
        RATES,
    ),
    "Q-GaLore, same settings": ("q_galore_adamw8bit_per_layer", [*ITERATE, *INT8, *NOT_LAZY], RATES),
    "Q-GaLore, rounded to nearest (control)": (
        "q_galore_adamw8bit_per_layer",
        [*ITERATE, *NEAREST, *NOT_LAZY],
        RATES,
    ),
    "Q-GaLore, lazy (the default)": ("q_galore_adamw8bit_per_layer", [*ITERATE, *INT8], (0.008, 0.016)),
    "Q-GaLore, lazy, 32-bit moments of embedding and head": (
        "q_galore_adamw8bit_per_layer",
        [*ITERATE, *INT8, "--embedding_state_bits", "32"],
        (0.016,),
    ),
    "Q-GaLore, lazy, 4-bit moments of the matrices": (
        "q_galore_adamw8bit_per_layer",
        [*ITERATE, *INT8, "--moments_bits", "4"],
        (0.008, 0.016),
    ),
    "Q-GaLore, lazy, 8-bit weights of embedding and head": (
        "q_galore_adamw8bit_per_layer",
        [*ITERATE, *INT8, "--embedding_weight_bits", "8"],
        (0.008, 0.016),
    ),
    "Q-GaLore, lazy, the side that keeps fewer bytes": (
        "q_galore_adamw8bit_per_layer",
        [*ITERATE, *INT8, "--proj_type", "auto"],
        (0.008, 0.016),
    ),
    "Q-GaLore, lazy, a scale a row": ("q_galore_adamw8bit_per_layer", [*ITERATE, *INT8, *ROWS], (0.016,)),
    "Q-GaLore, lazy, INT8 products in the forward pass": (
        "q_galore_adamw8bit_per_layer",
        [*ITERATE, *INT8, "--int8_matmul", "forward"],
        (0.016,),
    ),
    "Q-GaLore, lazy, all products in INT8": (
        "q_galore_adamw8bit_per_layer",
        [*ITERATE, *INT8, "--int8_matmul", "all"],
        (0.016,),
    ),
    RECOMMENDED: ("q_galore_adamw8bit", [*ITERATE, *INT8, *FIRA], RATES),
    "Q-GaLore, lazy, averaged bases, residual recovered": (
        "q_galore_adamw8bit",
        [*ITERATE, *INT8, *FIRA, "--subspace", "average"],
        (0.016,),
    ),
    "Online Subspace Descent: AdamW, basis by AdamW": ("galore_adamw", [*ONLINE, "continuous"], RATES),
    "Online Subspace Descent: AdamW, basis by AdamW, steps of 0.04": (
        "galore_adamw",
        [*ONLINE, "continuous", *FIVEFOLD],
        RATES,
    ),
    "Online Subspace Descent: Adafactor, basis by AdamW": ("galore_adafactor", [*ONLINE, "continuous"], (0.008,)),
    "Online Subspace Descent: Adafactor, basis by AdamW, steps of 0.04": (
        "galore_adafactor",
        [*ONLINE, "continuous", *FIVEFOLD],
        (0.008, 0.016),
    ),
    "Online Subspace Descent: Lion, basis by AdamW": ("galore_lion", [*ONLINE, "continuous"], (0.001,)),
    "Online Subspace Descent: Lion, basis by AdamW, the matrices at a quarter of the rate": (
        "galore_lion",
        [*ONLINE, "continuous", *QUARTER],
        (0.004,),
    ),
    "Online Subspace Descent: Lion, basis by AdamW, steps of 0.04, the matrices at a sixteenth of the rate": (
        "galore_lion",
        [*ONLINE, "continuous", *FIVEFOLD, *SIXTEENTH],
        (0.002, 0.004, 0.008),
    ),
    "Online Subspace Descent: AdamW, basis by SGD": ("galore_adamw", [*ONLINE, "continuous_sgd"], (0.008,)),
    "Online Subspace Descent: AdamW, basis by SGD, steps of 0.04": (
        "galore_adamw",
        [*ONLINE, "continuous_sgd", *FIVEFOLD],
        (0.008,),
    ),
    "LoRA": ("adamw", ["--peft", "lora"], (0.004,)),
    "LoRA, the factors at a sixteenth of the rate": ("adamw", ["--peft", "lora", *SIXTEENTH], (0.008, 0.016)),
    "ReLoRA, four cycles, the factors at a sixteenth of the rate": (
        "adamw",
        ["--peft", "relora", "--reset_every", "75", *SIXTEENTH],
        (0.008, 0.016),
    ),
    "low rank: W = B A": ("adamw", ["--peft", "low_rank"], (0.004,)),
    "low rank: W = B A, the factors at a sixteenth of the rate": (
        "adamw",
        ["--peft", "low_rank", *SIXTEENTH],
        (0.008, 0.016),
    ),
}


def trial(methods: Methods, method: str, *, lr: float, seed: int, updates: int) -> Trial:
    """The trial of a method at a learning rate."""
    optimizer, flags, _ = methods[method]
    return Trial(method, (optimizer, *flags), lr, None, None, seed=seed, updates=updates)


def best_rate(records: list[dict], method: str) -> float:
    return min((r for r in records if r["method"] == method), key=lambda r: r["perplexity"])["lr"]


def table(records: list[dict], methods: list[str]) -> str:
    """Perplexity by learning rate with the first seed, and the mean over the seeds at the best of them."""
    lines = [
        "| method | perplexity at each learning rate | best, all seeds | mean | refreshes |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        mine = [r for r in records if r["method"] == method]
        first = min(r["seed"] for r in mine)
        rates = ", ".join(
            f"{r['lr']:g}: {r['perplexity']:.1f}" for r in sorted(mine, key=lambda r: r["lr"]) if r["seed"] == first
        )
        best = [r for r in mine if r["lr"] == best_rate(records, method)]
        seeds = " / ".join(f"{r['perplexity']:.1f}" for r in sorted(best, key=lambda r: r["seed"]))
        mean = sum(r["perplexity"] for r in best) / len(best)
        lines.append(f"| {method} | {rates} | {seeds} | {mean:.1f} | {best[0]['refreshes'] or '-'} |")
    return "\n".join(lines)


def main(methods: Methods = METHODS, *, doc: str | None = __doc__) -> int:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model_config", "dataset", "tokenizer", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("rank", 32), ("updates", 300), ("batch_size", 8), ("eval_tokens", 100_000), ("jobs", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates in place of each method's own")
    parser.add_argument("--compile", action="store_true", help="run with --compile: the same to rounding, and faster")
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=list(methods))
    args = parser.parse_args()
    if args.rates:
        methods = {title: (optimizer, flags, tuple(args.rates)) for title, (optimizer, flags, _) in methods.items()}
    first, *others = args.seeds
    shared = ("model_config", "dataset", "tokenizer", "rank", "batch_size", "eval_tokens", "compile")
    bench = Bench(**{name: getattr(args, name) for name in shared}, evaluations=1)
    each = partial(trial, methods, updates=args.updates)
    swept = [each(method, lr=lr, seed=first) for method in args.methods for lr in methods[method][2]]
    records = finish(lambda _: swept, bench, out=Path(args.out), jobs=args.jobs)
    records = [record for record in records if record["updates"] == args.updates]
    again = [each(method, lr=best_rate(records, method), seed=seed) for seed in others for method in args.methods]
    records = finish(lambda _: again, bench, out=Path(args.out), jobs=args.jobs)
    print(table([record for record in records if record["updates"] == args.updates], args.methods))
    return 0


if __name__ == "__main__":
    sys.exit(main())
