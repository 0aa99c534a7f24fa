"""Tokens per second of whole updates, by every optimizer, through the code of torchrun_main.py.

    python benchmarks/train_step.py --model_config configs/llama_20m.json --rank 64 --rounds 9 --output train_step.jsonl

Each case is a process that has set up its run as torchrun_main.py does, from its flags. The processes take turns, a few
updates each, so that a busy machine slows down all of them. Prints, for each case:

    tokens/s          median over all its timed updates
    / AdamW           tokens/s divided by those of AdamW, eager or compiled as the case is: median over the rounds
    longest / median  its slowest update against its median one; refreshes fall into these updates. AdamW has none,
                      so its figure is the machine's noise
    first, s          the first update: compiling, from an empty cache, and all the first bases
    compiled          how many graphs torch has compiled: at most one for each kind of parameter, and the layers'
    peak, MB          the largest resident memory of the process, from its start; on a GPU, of what torch has allocated
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.support import Worker, add_data_flags, command_line, machine, print_table, save_lines

ROOT = Path(__file__).parent.parent
INT8 = ["--weight_quant", "--stochastic_round", "--proj_quant"]
CASES = {  # title: optimizer and flags
    "AdamW": ("adamw", []),
    "8-bit AdamW": ("adamw8bit", []),
    "GaLore": ("galore_adamw", []),
    "GaLore per layer": ("galore_adamw_per_layer", []),
    "Q-GaLore per layer": ("q_galore_adamw8bit_per_layer", INT8),
    "Q-GaLore, residual": ("q_galore_adamw8bit", [*INT8, "--residual", "fira"]),
    "Online Subspace Descent": ("galore_adamw", ["--proj_type", "continuous"]),
}
WORKER = """
import contextlib, json, sys, time
root, limit, *flags = sys.argv[1:]
sys.path.insert(0, root)
import torchrun_main as script  # before torch, for which it sets environment variables
import torch
from torch._dynamo.utils import counters
from peft_pretraining.training.loop import train_step
from peft_pretraining.training.report import memory_bytes
with contextlib.ExitStack() as cleanup:
    world = script.World.from_environment()
    if on_gpu := world.device.type == "cuda":
        share = float(limit) / torch.cuda.get_device_properties(world.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), world.device)
    args = script.parse_args(flags)
    script.use_threads(world, num_threads=args.num_threads)
    script.make_deterministic(args.seed)
    plan = script.make_plan(args, world=world, cleanup=cleanup)
    interruption = cleanup.enter_context(script.Interruption().listening())
    run = script.open_run(plan, interruption=interruption, cleanup=cleanup)

    def update():
        began = time.perf_counter()
        train_step(run)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def told(seconds):
        print(json.dumps({
            "seconds": seconds,
            "peak": memory_bytes(world.device),
            "reserved": torch.cuda.max_memory_reserved() if on_gpu else None,
            "compiled": counters["stats"].get("unique_graphs", 0),
        }), flush=True)

    told([update()])
    for line in sys.stdin:
        told([update() for _ in range(int(line))])
"""


def flags_of(args: argparse.Namespace, optimizer: str, flags: list[str], *, compiled: bool, folder: str) -> list[str]:
    """The command line of one case."""
    projects = "galore" in optimizer
    common = {
        "model_config": args.model_config, "dataset": args.dataset, "tokenizer": args.tokenizer,
        "batch_size": args.batch_size, "dtype": args.dtype, "optimizer": optimizer, "num_threads": args.threads,
        "lr": 0.001, "num_training_steps": 10**6, "warmup_steps": 0, "workers": 0, "wandb_mode": "disabled",
        "save_dir": folder, "rank": args.rank if projects else None,
        "update_proj_gap": args.update_proj_gap if projects else None,
    }  # fmt: skip
    return [*command_line(common), *flags, *(["--compile"] if compiled else [])]


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One record for each case, with the seconds of its updates by rounds."""
    chosen = {
        (title, compiled): case
        for title, case in CASES.items()
        for compiled in ([False, True] if args.compile else [False])
        if re.search(args.only, title) or title == "AdamW"
    }
    workers = {}
    for number, ((title, compiled), (optimizer, flags)) in enumerate(chosen.items()):
        own = str(folder / str(number))
        line = flags_of(args, optimizer, flags, compiled=compiled, folder=own)
        worker = Worker(WORKER, str(ROOT), "inf", *line, TORCHINDUCTOR_CACHE_DIR=f"{own}-cache")
        workers[title, compiled] = worker
        if not args.together:
            assert worker.ready
    for worker in workers.values():
        worker.work(2)  # what is allocated or compiled in the second update
    rounds: dict[tuple[str, bool], list[list[float]]] = {case: [] for case in workers}
    last: dict[tuple[str, bool], dict[str, Any]] = {}
    for _ in range(args.rounds):
        for case, worker in workers.items():
            last[case] = worker.work(args.updates)
            rounds[case].append(last[case]["seconds"])
    for worker in workers.values():
        worker.close()
    return [
        {
            "case": title, "compiled": compiled, "first": workers[title, compiled].ready["seconds"][0],
            "rounds": rounds[title, compiled], "peak": last[title, compiled]["peak"],
            "graphs": last[title, compiled]["compiled"],
        }
        for title, compiled in workers
    ]  # fmt: skip


def summarize(records: list[dict[str, Any]], *, tokens: int) -> list[dict[str, Any]]:
    """The rows of the table. tokens: of one update."""
    rows = []
    for record in records:
        floor = next(r for r in records if r["case"] == "AdamW" and r["compiled"] == record["compiled"])
        seconds = [s for turn in record["rounds"] for s in turn]
        pairs = zip(floor["rounds"], record["rounds"], strict=True)
        rows.append(
            {
                "case": record["case"] + (", compiled" if record["compiled"] else ""),
                "tokens/s": tokens / median(seconds),
                "/ AdamW": median(median(theirs) / median(ours) for theirs, ours in pairs),
                "longest / median": max(seconds) / median(seconds),
                "first, s": record["first"],
                "compiled": record["graphs"],
                "peak, MB": record["peak"] / 1e6,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="configs/llama_20m.json", metavar="JSON")
    add_data_flags(parser)
    parser.add_argument("--dtype", metavar="TYPE", help="default: bfloat16 where the device multiplies it natively")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of 256 tokens")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--update_proj_gap", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--updates", type=int, default=4, help="of each case in a round")
    parser.add_argument("--compile", action="store_true", help="every case compiled as well")
    parser.add_argument("--together", action="store_true", help="set up all cases at once, which `first` then says")
    parser.add_argument("--only", default="", help="cases in whose name this regular expression is found; AdamW too")
    parser.add_argument("--output", type=Path, help="a file for JSON lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records = measure(args, Path(folder))
    rows = summarize(records, tokens=args.batch_size * 256)
    print_table(rows)
    save_lines(args.output, rows, machine=machine(), arguments=vars(args))


if __name__ == "__main__":
    main()
