"""Pictures of arena.py's records, in docs/, for light and for dark pages.

python benchmarks/arena_pictures.py benchmarks/results/arena_small.jsonl --updates 300 --name arena_small

NAME-rates      perplexity by the rate of the matrices, one line a method, at its best other rates
NAME-curves     validation loss less AdamW's, by tokens, at the best rates, where runs were evaluated on the way
"""

import argparse
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.arena_tables import BASELINE, Record, at_best, best_of, score
from benchmarks.readme_figures import DARK, LIGHT, themed
from benchmarks.support import read_records
from peft_pretraining.report.drawing import NUMBERS, colour, dashes, drawing

ROOT = Path(__file__).parent.parent
SEQUENCE = 256  # tokens
MORE = (("#8c6d00", "#5b4fc4"), ("#d9b44a", "#a79bff"))  # colours of lines beside LIGHT's and DARK's
MAX_RATIO = 1.35  # times the lowest perplexity: the top of the picture of rates


def rates(axes: Axes, records: Sequence[Record], methods: Sequence[str]) -> None:
    """Perplexity by the rate of the matrices, with the first seed."""
    lowest = min(map(score, records))
    for number, method in enumerate(methods):
        mine = [r for r in records if r["method"] == method]
        first = min(r["seed"] for r in mine)
        best = best_of(r for r in mine if r["seed"] == first)
        same = (first, best["lr"], best["beta2"])
        swept = sorted((r["matrix_lr"], score(r)) for r in mine if (r["seed"], r["lr"], r["beta2"]) == same)
        axes.plot(*zip(*swept, strict=True), "o", linestyle=dashes(number), color=colour(number), markersize=4,
                  label=method)  # fmt: skip
    axes.set_xscale("log", base=2)
    run = sorted({r["matrix_lr"] for r in records})
    axes.set_xticks(run, [f"{rate:.2g}" for rate in run], rotation=40, rotation_mode="anchor", ha="right")
    axes.set_ylim(lowest * 0.985, lowest * MAX_RATIO)
    axes.set_xlabel("peak learning rate of the matrices")
    axes.set_ylabel("validation perplexity")


def curves(axes: Axes, records: Sequence[Record], methods: Sequence[str]) -> None:
    """Validation loss less AdamW's, mean over the seeds that both have."""
    baseline = at_best(records, BASELINE)
    for number, method in enumerate(methods):
        mine = at_best(records, method)
        shared = sorted(mine.keys() & baseline.keys())
        pairs = [(dict(mine[seed]["validation"]), dict(baseline[seed]["validation"])) for seed in shared]
        if not pairs:
            continue
        tokens = mine[shared[0]]["batch_size"] * SEQUENCE
        points = sorted(set.intersection(*(set(ours) & set(theirs) for ours, theirs in pairs)))
        gaps = [sum(ours[point] - theirs[point] for ours, theirs in pairs) / len(pairs) for point in points]
        axes.plot([point * tokens for point in points], gaps, "o", linestyle=dashes(number), color=colour(number),
                  markersize=4, label=method)  # fmt: skip
    axes.xaxis.set_major_formatter(NUMBERS)
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"validation loss less {BASELINE}'s")


def picture(draw: Callable[..., None], *given: Any) -> str:
    """The SVG, in colours that stand for those of a theme."""
    with drawing():
        figure = Figure(figsize=(8.6, 4.2))
        axes = figure.add_axes((0.09, 0.2, 0.52, 0.76))
        draw(axes, *given)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False)
        for part in (figure, axes):
            part.patch.set_visible(False)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)


def write_themed(svg: str, name: str, *, folder: Path) -> None:
    """NAME-light.svg and NAME-dark.svg."""
    for theme, colours in (("light", (*LIGHT, *MORE[0])), ("dark", (*DARK, *MORE[1]))):
        (folder / f"{name}-{theme}.svg").write_text(themed(svg, colours))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--lr", type=float, help="only this learning rate of embedding, head and norms")
    parser.add_argument("--name", required=True)
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the pictures (default: docs)")
    args = parser.parse_args(argv)
    records = [r for path in args.records for r in read_records(path) if r["updates"] == args.updates]
    records = [r for r in records if args.lr in (None, r["lr"])]
    methods = args.methods or list(dict.fromkeys(r["method"] for r in records))
    for kind, draw in (("rates", rates), ("curves", curves)):
        write_themed(picture(draw, records, methods), f"{args.name}-{kind}", folder=args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
