"""The table and the picture on the first screen of README.md, from the files in benchmarks/results.

    python benchmarks/readme_figures.py --plan    # plans LLaMA-7B by each method into memory_7b.jsonl; under a minute
    python benchmarks/readme_figures.py           # prints the table, draws docs/methods-light.svg and -dark.svg

Peaks are planned for a GPU, perplexities were measured on a CPU, tokens/s on a CPU and an H100; the files say how.
"""

import argparse
import io
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.compare import INT8, METHODS, RECOMMENDED
from peft_pretraining.cli.args import parse_args
from peft_pretraining.report.drawing import VARIABLES, colour, drawing
from peft_pretraining.training.memory_plan import MemoryPlan, plan_memory

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "configs/llama_7b.json"
RUN = ["--rank", "1024", "--batch_size", "16", "--activation_checkpointing"]
TUNED = "AdamW, full rank, the matrices at a sixteenth of the rate"
ONLINE_PCA = "Online Subspace Descent: AdamW, basis by AdamW, steps of 0.04"
KINDS = ("weights", "moments", "bases", "gradients", "the rest")  # the colours of a bar, from the left
LIGHT = ("#1b1f24", "#6b7280", "#e5e7eb", "#0072b2", "#d55e00", "#007a5a", "#b0478c", "#9aa3af")
DARK = ("#e6e8eb", "#9aa3af", "#2b3038", "#5cb3f0", "#ff8f4a", "#3ccf9e", "#ec92ca", "#6b7280")
NONE = "not measured"


@dataclass(frozen=True)
class Row:
    """One method. keeps: what an optimizer keeps, in words. flags: those of its plan.

    compared: its title in compare.py; None where it was not compared. timed: its title in train_step.py.
    """

    title: str
    keeps: str
    optimizer: str
    flags: tuple[str, ...] = ()
    compared: str | None = None
    timed: str | None = None
    per_layer: bool = True


LORA = "LoRA, the factors at a sixteenth of the rate"
ROWS = (
    Row("AdamW, tuned", "float32 moments and weights beside the bfloat16 ones", "adamw", (), TUNED, "AdamW", False),
    Row("LoRA", "the same, of the factors; a frozen weight", "adamw", ("--peft", "lora"), LORA, None, False),
    Row("8-bit AdamW", "8-bit moments", "adamw8bit", timed="8-bit AdamW"),
    Row("Online Subspace Descent", "32-bit moments at rank r, bases", "galore_adamw", ("--proj_type", "continuous"),
        ONLINE_PCA, "Online Subspace Descent"),
    Row("GaLore", "32-bit moments at rank r, bases", "galore_adamw", (),
        "GaLore: iteration, gap 10, first moment carried over", "GaLore"),
    Row("GaLore, 8-bit moments", "8-bit moments at rank r, bases", "galore_adamw8bit"),
    Row("Q-GaLore", "the same; INT8 weights, INT4 bases", "q_galore_adamw8bit", tuple(INT8),
        "Q-GaLore, lazy (the default)", "Q-GaLore per layer"),
    Row("Q-GaLore, residual", "the same", "q_galore_adamw8bit", (*INT8, "--residual", "fira"), RECOMMENDED,
        "Q-GaLore, residual"),
)  # fmt: skip


# What was planned and measured


def flags_of(row: Row, *, per_layer: bool) -> list[str]:
    """The flags of one method, which torchrun_main.py and qgalore.memory understand."""
    return [*RUN, "--optimizer", row.optimizer + ("_per_layer" if per_layer else ""), *row.flags]


def plan_of(row: Row, *, per_layer: bool) -> MemoryPlan:
    """The plan of LLaMA-7B with one micro-batch of 16 x 256 tokens, in bfloat16."""
    flags = ["--model_config", MODEL, *flags_of(row, per_layer=per_layer), "--dataset", "pydocs", "--dry_run"]
    return plan_memory(parse_args(flags), dtype=torch.bfloat16)


def by_colour(kinds: dict[str, int]) -> dict[str, int]:
    """Bytes by the names of KINDS; scales belong to their weights."""
    found = {kind: kinds.get(kind, 0) for kind in KINDS[:-1]}
    found["weights"] += kinds.get("scales", 0)
    return found | {"the rest": sum(kinds.values()) - sum(found.values())}


def write_plans() -> None:
    """memory_7b.jsonl: a line for each method and each way of updating."""
    lines = []
    for row in ROWS:
        for per_layer in (False, True)[: 1 + row.per_layer]:
            peak = plan_of(row, per_layer=per_layer).peak
            lines.append({"method": row.title, "per_layer": per_layer, "peak": peak.bytes} | by_colour(peak.kinds))
            lines[-1]["command"] = ["-m", "qgalore.memory", MODEL, *flags_of(row, per_layer=per_layer)]
    (RESULTS / "memory_7b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def peaks(row: Row) -> list[dict[str, Any]]:
    """The plans of a method: updates after backward and, where it has them, inside backward."""
    return [line for line in read_lines("memory_7b.jsonl") if line["method"] == row.title]


def perplexities(title: str | None, name: str) -> list[float]:
    """Of all seeds, at the learning rate that is best with seed 0. Empty where the method was not run."""
    runs = [line for line in read_lines(name) if line["method"] == title]
    if not runs:
        return []
    best = min((run for run in runs if run["seed"] == 0), key=lambda run: run["perplexity"])["lr"]
    return [run["perplexity"] for run in sorted(runs, key=lambda run: run["seed"]) if run["lr"] == best]


def speed(row: Row, page: str) -> float | None:
    """Tokens/s over AdamW's, both compiled: of train_step.md on a CPU, or h100.md."""
    text = (RESULTS / page).read_text()
    if page == "train_step.md":
        found = re.search(rf"^\| {re.escape(str(row.timed))}, compiled \| [\d,]+ \| ([\d.]+) \|", text, re.M)
        return float(found[1]) if found else None

    def median(title: str) -> float | None:
        found = re.search(rf"^\| {re.escape(title)} \| [^|]* \| ([^|]*) \|$", text, re.M)
        return statistics.median(int(each.replace(",", "")) for each in found[1].split(", ")) if found else None

    ours, adamws = median(str(row.timed)), median("AdamW")
    return ours / adamws if ours and adamws else None


# The table


def table() -> str:
    """Markdown. A cell of what was not run says so."""
    heads = ["method", "`--optimizer`", "keeps", "peak of a 7B, GB", "tokens/s, CPU", "H100", "perplexity"]
    lines = [heads, ["---"] * len(heads)]
    for row in ROWS:
        found = [f"{line['peak'] / 1e9:.1f}" for line in peaks(row)]
        speeds = [speed(row, page) for page in ("train_step.md", "h100.md")]
        lines.append(
            [row.title, f"`{row.optimizer}`", row.keeps, " / ".join(found)]
            + [NONE if each is None else f"{each:.2f}" for each in speeds]
            + [perplexity(row)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def perplexity(row: Row) -> str:
    """After 1,200 updates; else after 300, with AdamW's beside it."""
    if found := perplexities(row.compared, "llama_9m_long.jsonl"):
        return f"{statistics.mean(found):.1f}" + (", one seed" if len(found) == 1 else "")
    if found := perplexities(row.compared, "llama_9m.jsonl"):
        adamws = statistics.mean(perplexities(TUNED, "llama_9m.jsonl"))
        return f"after 300 updates {statistics.mean(found):.1f}, AdamW {adamws:.1f}"
    return NONE


# The picture


def picture() -> str:
    """The SVG, in colours that stand for those of a theme."""
    with drawing():
        figure = Figure(figsize=(9.6, 3.7))
        memory, quality = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        figure.subplots_adjust(left=0.205, right=0.985, bottom=0.2, top=0.82, wspace=0.06)
        for axes in (memory, quality):
            axes.tick_params(length=0)
            axes.grid(axis="y", visible=False)
        draw_peaks(memory)
        draw_perplexities(quality)
        figure.patch.set_visible(False)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)


def draw_peaks(axes: Any) -> None:
    """A bar for each method, of the way of updating that needs less, in GB by kind."""
    for place, row in enumerate(ROWS):
        line, left = min(peaks(row), key=lambda line: line["peak"]), 0.0
        for number, kind in enumerate(KINDS):
            size = line[kind] / 1e9
            axes.barh(place, size, left=left, height=0.62, color=colour(number), label=kind if place == 0 else None)
            left += size
        axes.text(left + 1.2 if left > 16 else 17, place, f"{line['peak'] / 1e9:.1f}", va="center")
    axes.axvline(16, color=VARIABLES["ink"], linewidth=1, linestyle=(0, (3, 2)))
    axes.text(17, -0.62, "16 GB", va="bottom", color=VARIABLES["ink"])
    axes.set_yticks(range(len(ROWS)), [row.title for row in ROWS])
    axes.set_ylim(len(ROWS) - 0.5, -1.1)
    axes.set_xlim(0, 150)
    axes.set_xlabel("LLaMA-7B: planned peak of GPU memory, GB")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=5, frameon=False, handlelength=1, columnspacing=1)


def draw_perplexities(axes: Any) -> None:
    """A dot for each seed, and the mean beside them."""
    for place, row in enumerate(ROWS):
        if found := perplexities(row.compared, "llama_9m_long.jsonl"):
            axes.plot(found, [place] * len(found), "o", color=colour(0), markersize=6, alpha=0.85)
            axes.text(max(found) + 0.25, place, f"{statistics.mean(found):.1f}", va="center")
        else:
            axes.text(113.2, place, "not run", va="center", color=VARIABLES["muted"])
    axes.set_xlim(113, 121)
    axes.tick_params(labelleft=False)
    axes.set_xlabel("llama_9m, 1,200 updates: perplexity")


def themed(svg: str, colours: tuple[str, ...]) -> str:
    """The picture in the colours of one theme: ink, muted, grid, then one for each of KINDS."""
    for stand_in, real in zip(VARIABLES.values(), colours, strict=False):
        svg = svg.replace(stand_in, real)
    return svg


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="plan the memory of each method again")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the pictures (default docs)")
    args = parser.parse_args(argv)
    if args.plan:
        write_plans()
    svg = picture()
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        (args.output / f"methods-{name}.svg").write_text(themed(svg, colours))
    print(table())
    return 0


assert {row.compared for row in ROWS if row.compared} <= METHODS.keys()

if __name__ == "__main__":
    sys.exit(main())
