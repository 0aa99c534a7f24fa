"""Whether two checkouts train to the same last bit: every optimizer, projection and way of driving them.

    python benchmarks/bit_equality.py record --checkout ../before --out before.json
    python benchmarks/bit_equality.py record --checkout . --out after.json
    python benchmarks/bit_equality.py compare before.json after.json

Losses depend on the processor in their last bits, so equality is judged on one machine: the commit before a change
beside the one after it. `record` trains configs/llama_3m.json for a few updates with each entry of RUNS through that
checkout's torchrun_main.py and writes losses, gradient norms and the validation loss; finished entries are kept, so an
interrupted record goes on. `compare` names what differs and exits with status 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BASE = "--model_config configs/llama_3m.json --dataset pydocs --tokenizer pydocs --batch_size 2 --max_length 64 "
BASE += "--lr 0.01 --num_training_steps 6 --warmup_steps 1 --eval_tokens 1K --eval_every 3 --workers 0 --num_threads 1 "
BASE += "--wandb_mode disabled --save_every 4 --dtype float32"
LOW_RANK = "--rank 24 --update_proj_gap 3 --galore_scale 0.5"
INT8 = "--weight_quant --stochastic_round"
QUANT = f"{LOW_RANK} {INT8} --proj_quant"
TWO = "processes"  # a run of two processes
RUNS: dict[str, str] = {
    **{name: f"--optimizer {name} --weight_decay 0.01" for name in ("adam", "adamw", "sgd", "adafactor")},
    **{f"{name}, bfloat16": f"--optimizer {name} --dtype bfloat16" for name in ("adamw", "galore_adamw", "lion")},
    "adamw, clipped, accumulation 2": "--optimizer adamw --grad_clipping 0.5 --gradient_accumulation 2",
    "adam8bit": "--optimizer adam8bit --weight_decay 0.01",
    "adamw8bit": "--optimizer adamw8bit --weight_decay 0.01",
    "adamw8bit per layer": "--optimizer adamw8bit_per_layer --embedding_state_bits 32",
    "lion": "--optimizer lion --weight_decay 0.01",
    "lion per layer": "--optimizer lion_per_layer",
    "galore_adamw": f"--optimizer galore_adamw {LOW_RANK} --weight_decay 0.01",
    "galore_adamw, svd": f"--optimizer galore_adamw {LOW_RANK} --subspace svd",
    "galore_adamw, svd, gap 12": "--optimizer galore_adamw --rank 24 --update_proj_gap 12 --subspace svd",
    "galore_adamw, keep": f"--optimizer galore_adamw {LOW_RANK} --moments_on_refresh keep",
    "galore_adamw, reset": f"--optimizer galore_adamw {LOW_RANK} --moments_on_refresh reset",
    "galore_adamw, lazy": f"--optimizer galore_adamw {LOW_RANK} --cos_threshold 0.1 --queue_size 1",
    **{
        f"galore_adamw, {side}": f"--optimizer galore_adamw {LOW_RANK} --proj_type {side}"
        for side in ("reverse_std", "left", "right", "full")
    },
    "galore_adamw, clipped": f"--optimizer galore_adamw {LOW_RANK} --grad_clipping 0.5 --matrix_lr_ratio 0.5",
    "galore_adamw, accumulation 4": f"--optimizer galore_adamw {LOW_RANK} --gradient_accumulation 4",
    "galore_adamw per layer, accumulation 4, clipped": f"--optimizer galore_adamw_per_layer {LOW_RANK} "
    "--gradient_accumulation 4 --grad_clipping 0.1 --weight_decay 0.01",
    "galore_adamw, details": f"--optimizer galore_adamw {LOW_RANK} --log_details",
    "galore_lion": f"--optimizer galore_lion {LOW_RANK}",
    "galore_adafactor": f"--optimizer galore_adafactor {LOW_RANK}",
    "galore_adafactor per layer": f"--optimizer galore_adafactor_per_layer {LOW_RANK}",
    "galore_adamw8bit": f"--optimizer galore_adamw8bit {LOW_RANK}",
    "galore_adamw8bit, reset": f"--optimizer galore_adamw8bit {LOW_RANK} --moments_on_refresh reset",
    **{
        f"galore_adamw, {learner}": f"--optimizer galore_adamw {LOW_RANK} --proj_type {learner}"
        for learner in ("continuous", "continuous_adam8bit", "continuous_lion", "continuous_adafactor", "random")
    },
    "galore_adamw, continuous_sgd": f"--optimizer galore_adamw {LOW_RANK} --proj_type continuous_sgd --proj_lr 0.01",
    "galore_lion per layer, continuous, INT4": f"--optimizer galore_lion_per_layer {LOW_RANK} --proj_type continuous "
    "--proj_quant --gradient_accumulation 2",
    "galore_adamw, residual": f"--optimizer galore_adamw {LOW_RANK} --residual fira",
    "q_galore, residual, clipped": f"--optimizer q_galore_adamw8bit {QUANT} --residual fira --grad_clipping 0.5",
    "q_galore": f"--optimizer q_galore_adamw8bit {QUANT} --weight_decay 0.01",
    "q_galore, bases INT8": f"--optimizer q_galore_adamw8bit {QUANT} --proj_bits 8",
    "q_galore, to nearest": f"--optimizer q_galore_adamw8bit {LOW_RANK} --weight_quant --proj_quant",
    "q_galore, simulation": f"--optimizer q_galore_adamw8bit {QUANT} --simulation",
    "q_galore per layer": f"--optimizer q_galore_adamw8bit_per_layer {QUANT}",
    "q_galore per layer, bfloat16": f"--optimizer q_galore_adamw8bit_per_layer {QUANT} --dtype bfloat16",
    "q_galore per layer, accumulation 4": f"--optimizer q_galore_adamw8bit_per_layer {QUANT} --gradient_accumulation 4 "
    "--accumulation_dtype float32",
    "q_galore per layer, random": f"--optimizer q_galore_adamw8bit_per_layer {QUANT} --proj_type random "
    "--gradient_accumulation 2",
    "lion, INT8": f"--optimizer lion {INT8}",
    "adamw8bit, INT8, checkpointing": f"--optimizer adamw8bit {INT8} --activation_checkpointing",
    **{f"peft {kind}": f"--optimizer adamw --peft {kind} --rank 8" for kind in ("lora", "low_rank")},
    "peft relora": "--optimizer adamw8bit --peft relora --rank 8 --reset_every 3",
    "galore_adamw, compiled": f"--optimizer galore_adamw {LOW_RANK} --compile",
    "q_galore per layer, compiled": f"--optimizer q_galore_adamw8bit_per_layer {QUANT} --compile",
    "galore_adamw, residual, compiled": f"--optimizer galore_adamw8bit {LOW_RANK} --residual fira --compile",
    "galore_adamw, continuous, compiled": f"--optimizer galore_adamw {LOW_RANK} --proj_type continuous --compile",
    f"adamw, two {TWO}": "--optimizer adamw --grad_clipping 0.5",
    f"galore_adamw, two {TWO}": f"--optimizer galore_adamw {LOW_RANK}",
    f"q_galore per layer, two {TWO}": f"--optimizer q_galore_adamw8bit_per_layer {QUANT} --gradient_accumulation 2",
}
COMPARED = (
    "update",
    "loss",
    "grad_norm",
    "lr",
    "perplexity",
    "overlap",
    "reconstruction_error",
    "orthonormality_error",
)
EVENTS = ("update", "eval", "subspace_details")


def train(checkout: Path, name: str, flags: str) -> list[dict[str, Any]]:
    """The compared figures of one run, in the order of its record."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if name.endswith(TWO) else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, "torchrun_main.py", *BASE.split(), *flags.split(), "--save_dir", folder]
        result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        if result.returncode:
            return [{"failed": result.stderr[-2000:]}]
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in COMPARED if key in line} for line in lines if line["event"] in EVENTS]


def record(args: argparse.Namespace) -> int:
    """Trains every run that is not in --out yet."""
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name, flags in RUNS.items():
        if name in found or (args.only and args.only not in name):
            continue
        began = time.monotonic()
        found[name] = train(args.checkout, name, flags)
        args.out.write_text(json.dumps(found, indent=1))
        status = "FAILED" if "failed" in found[name][0] else "done"
        print(f"{name}: {status} in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Prints what differs. Returns 1 if anything does."""
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    different = 0
    for name in [name for name in before if name in after]:
        if before[name] != after[name] or "failed" in before[name][0]:
            different += 1
            rows = [f"{a} {b}" for a, b in zip(before[name], after[name], strict=False) if a != b]
            print(f"DIFFERS: {name}: {(rows or ['another number of figures'])[0]}")
    missing = sorted(before.keys() ^ after.keys())
    print(f"{len(before.keys() & after.keys()) - different} runs equal, {different} differ, not in both: {missing}")
    return int(different > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record", help="train every run with one checkout")
    recording.add_argument("--checkout", type=Path, default=ROOT)
    recording.add_argument("--out", type=Path, required=True)
    recording.add_argument("--only", help="runs whose name contains this")
    recording.set_defaults(run=record)
    comparing = commands.add_parser("compare", help="say which runs differ")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.set_defaults(run=compare)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
