"""LLaMA-7B trained for a few updates by torchrun_main.py within a hard limit of memory, interrupted, and resumed.

    python benchmarks/train_7b.py --dataset data/books --tokenizer data/llama2.model --limit 16 --output train_7b.jsonl

Two processes run torchrun_main.py's own main, one after the other. The first gets SIGTERM in its last update, finishes
it, saves and ends. The second resumes from the checkpoint, trains one more update, evaluates and exports. On a
CPU the limit is RLIMIT_DATA: all private memory that a process may ever have written to, resident or not, so it is
stricter than one on resident memory. On a GPU, torch gets the limit's share of the card's memory.

Prints seconds and peak memory of each phase, the loss of each update, and the bytes that are kept between updates.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.support import add_data_flags, command_line, machine, print_table, save_lines

ROOT = Path(__file__).parent.parent
Q_GALORE = ["--optimizer", "q_galore_adamw8bit_per_layer", "--weight_quant", "--stochastic_round", "--proj_quant"]
RUNNER = """
import json, os, resource, signal, sys, time
limit, stop_after, log, root, *flags = sys.argv[1:]
sys.path.insert(0, root)
import torchrun_main as script  # before torch, for which it sets environment variables
import torch
from dataclasses import replace
from peft_pretraining.training import loop
from peft_pretraining.training.run import Run
from qgalore.memory import kept_bytes

GPU = torch.cuda.is_available()
if GPU:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, float(limit) / total))
else:
    resource.setrlimit(resource.RLIMIT_DATA, (int(float(limit)), int(float(limit))))

def reset_peak():
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        open("/proc/self/clear_refs", "w").write("5")

def peak():
    if GPU:
        return torch.cuda.max_memory_allocated()
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

def timed(name, function):
    def measured(*given, **named):
        run = given[0] if given and isinstance(given[0], Run) else None
        if name == "train_step" and run.state.update + 1 == int(stop_after):
            os.kill(os.getpid(), signal.SIGTERM)
        reset_peak()
        began = time.perf_counter()
        result = function(*given, **named)
        told = {"phase": name, "seconds": time.perf_counter() - began, "peak": peak()}
        if name == "train_step":
            told["update"] = run.state.update
        if name == "save":
            told["kept"] = kept_bytes(run.model, run.updates.optimizer)
        with open(log, "a") as file:
            file.write(json.dumps(told) + chr(10))
        return result
    return measured

for where, name in ((script, "open_run"), (script, "begin"), (loop, "train_step"), (loop, "save")):
    setattr(where, name, timed(name, getattr(where, name)))
task = {name: timed(name, getattr(loop.LANGUAGE, name)) for name in ("evaluate", "save_result")}
loop.LANGUAGE = replace(loop.LANGUAGE, **task)
sys.exit(script.command_line(flags))
"""
PHASES = {
    "open_run": "drawing and quantizing the weights",
    "begin": "reading the checkpoint",
    "train_step": "update",
    "evaluate": "evaluating",
    "save": "writing the checkpoint",
    "save_result": "exporting the model",
}


def flags_of(args: argparse.Namespace, save_dir: Path) -> list[str]:
    """The command line of torchrun_main.py."""
    given = {
        "model_config": args.model_config, "dataset": args.dataset, "tokenizer": args.tokenizer, "dtype": args.dtype,
        "batch_size": args.batch_size, "max_length": args.max_length, "rank": args.rank, "lr": args.lr,
        "galore_scale": 0.25,
        "num_training_steps": args.updates + 1, "warmup_steps": 0, "eval_tokens": args.max_length, "workers": 0,
        "num_threads": args.threads, "wandb_mode": "disabled", "save_dir": save_dir,
    }  # fmt: skip
    return [*Q_GALORE, "--activation_checkpointing", "--resume", "auto", *command_line(given)]


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Both processes. Returns the phases in their order."""
    log, flags = folder / "phases.jsonl", flags_of(args, folder / "run")
    for process, stop_after, expected in ((1, args.updates, 75), (2, 0, 0)):
        given = [str(args.limit * 1e9), str(stop_after), str(log), str(ROOT), *flags]
        status = subprocess.run([sys.executable, "-c", RUNNER, *given], cwd=ROOT).returncode
        if status != expected:
            raise SystemExit(f"error: process {process} has ended with status {status}, not {expected}, see above")
        if process == 1:
            first = len(log.read_text().splitlines())
    phases = [json.loads(line) for line in log.read_text().splitlines()]
    record = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["update"]: line["loss"] for line in record if line["event"] == "update"}
    for index, phase in enumerate(phases):
        phase["process"] = 1 if index < first else 2
        phase["loss"] = losses.get(phase.get("update"))
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="configs/llama_7b.json", metavar="JSON")
    add_data_flags(parser)
    parser.add_argument("--limit", type=float, default=16.0, help="GB, 1e9 bytes, of a process")
    parser.add_argument("--updates", type=int, default=3, help="of the first process")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=0.0004)
    parser.add_argument("--dtype", metavar="TYPE", help="default: bfloat16 where the device multiplies it natively")
    parser.add_argument("--threads", type=int, metavar="THREADS")
    parser.add_argument("--output", type=Path, help="a file for JSON lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        phases = run(args, Path(folder))
    rows = [
        {
            "process": phase["process"],
            "phase": PHASES[phase["phase"]] + (f" {phase['update']}" if "update" in phase else ""),
            "seconds": phase["seconds"],
            "peak, GB": phase["peak"] / 1e9,
            "loss": phase["loss"],
        }
        for phase in phases
    ]
    print_table(rows)
    kept = next(phase["kept"] for phase in reversed(phases) if "kept" in phase)
    print()
    print_table([{kind: size / 1e9 for kind, size in kept.items()} | {"kept, GB": sum(kept.values()) / 1e9}])
    save_lines(args.output, phases, machine=machine(), arguments=vars(args))


if __name__ == "__main__":
    main()
