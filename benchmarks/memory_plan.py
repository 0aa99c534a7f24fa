"""Where the memory of a run will be at its peak: a plan, made by running without data; and how true it is.

    python benchmarks/memory_plan.py --model_config configs/llama_7b.json --batch_size 16 --activation_checkpointing \\
        --optimizer q_galore_adamw8bit_per_layer --rank 1024 --weight_quant --stochastic_round --proj_quant

takes the flags of torchrun_main.py, which it need not be able to run, and plans a GPU. With --check, it plans this
machine's CPU, runs the same updates there for real, and prints beside the plan what was alive, and the most that
torch's allocator had given out, which knows what a kernel takes for itself, too.

MB are 1e6 bytes. A plan knows nothing of the allocator's reserve, of a GPU's context and of libraries' workspaces.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.support import allocated_at_most, machine, print_table, save_lines
from peft_pretraining.cli.args import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.model.dtypes import known_dtype
from peft_pretraining.training.memory_plan import MemoryPlan, plan_memory


def rows_of(plan: MemoryPlan) -> list[dict[str, Any]]:
    """A row for what is held, and one for each phase."""
    kinds = list(dict.fromkeys(kind for peak in plan.peaks.values() for kind in peak.kinds))
    held = {"": "held between updates", "line": "", "MB": sum(plan.held.values()) / 1e6}
    rows = [held | {kind: plan.held.get(kind, 0) / 1e6 for kind in kinds}]
    for phase, peak in plan.peaks.items():
        own = {kind: peak.kinds.get(kind, 0) / 1e6 for kind in kinds}
        rows.append({"": phase, "line": peak.line, "MB": peak.bytes / 1e6} | own)
    return rows


def check(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The plan of this CPU beside a run for real."""
    plan = plan_memory(args, dtype=dtype, device_type="cpu")
    most, run = allocated_at_most(lambda: plan_memory(args, dtype=dtype, device_type="cpu", real=True))
    rows = [
        {"": phase, "plan, MB": peak.bytes / 1e6, "alive, MB": run.peaks[phase].bytes / 1e6}
        for phase, peak in plan.peaks.items()
    ]
    rows.append({"": "peak", "plan, MB": plan.peak.bytes / 1e6, "alive, MB": run.peak.bytes / 1e6})
    rows[-1] |= {"allocator, MB": most / 1e6, "plan / allocator": plan.peak.bytes / most}
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="plan the CPU, and run for real")
    parser.add_argument("--output", type=Path, help="a file for JSON lines")
    own, flags = parser.parse_known_args(argv)
    began = time.perf_counter()
    try:
        args = parse_args([*flags, "--dataset", "pydocs"])
        dtype = known_dtype(args.dtype or "bfloat16")
        rows = check(args, dtype) if own.check else rows_of(plan_memory(args, dtype=dtype))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\n{time.perf_counter() - began:.0f} s, {most / 1e9:.1f} GB of this machine's memory")
    save_lines(own.output, rows, machine=machine(), flags=flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
