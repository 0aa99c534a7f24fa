"""Seconds of an optimizer's update in two checkouts, measured in turn, so that a busy machine slows down both.

    python benchmarks/side_by_side.py --before ../before --after . --rounds 9

One process for each checkout waits for its turn and runs a few updates in it. Prints the medians, and the median of the
ratios after / before, round by round. Cases: the update of a 2736 x 1024 matrix at rank 256, eager and compiled, and of
all parameters of configs/llama_9m.json. Name the same checkout twice to see how much the machine varies by itself.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.support import Worker

CASES: dict[str, dict[str, Any]] = {
    "GaLore": dict(name="galore_adamw", rank=256),
    "GaLore, compiled": dict(name="galore_adamw", rank=256, compile=True),
    "Q-GaLore": dict(name="q_galore_adamw8bit", rank=256, int8=True, proj_bits=4),
    "Q-GaLore, compiled": dict(name="q_galore_adamw8bit", rank=256, int8=True, proj_bits=4, compile=True),
    "GaLore, residual": dict(name="galore_adamw", rank=256, residual="fira"),
    "8-bit AdamW, full rank": dict(name="adamw8bit"),
    "llama_9m, GaLore": dict(name="galore_adamw", rank=32, model="configs/llama_9m.json"),
    "llama_9m, Q-GaLore": dict(
        name="q_galore_adamw8bit", rank=32, int8=True, proj_bits=4, model="configs/llama_9m.json"
    ),
}
WORKER = """
import json, sys, time
case, checkout = json.loads(sys.argv[1]), sys.argv[2]
sys.path.insert(0, checkout)
import torch
torch.set_num_threads(1)
from dataclasses import fields
from qgalore.factory import Settings, create_optimizer
from qgalore.param_groups import split_parameters
try:
    from qgalore.storage.convert import quantize_linear_layers
except ImportError:  # before there were packages
    from qgalore.quantize_model import quantize_linear_layers

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Linear(1024, 2736, bias=False)

if "model" in case:
    from transformers import LlamaConfig, LlamaForCausalLM
    config = json.load(open(f"{checkout}/{case['model']}"))
    config.pop("pad_token_id")
    model = LlamaForCausalLM(LlamaConfig(**config))
else:
    model = Net()
if case.get("int8"):
    quantize_linear_layers(model, select=lambda name: "mlp" in name or "attn" in name, seed=0)
known = {f.name for f in fields(Settings)}
chosen = {("lift" if k == "residual" and "lift" in known else k): v for k, v in case.items()}
settings = Settings(**{k: v for k, v in chosen.items() if k in known}, update_proj_gap=1000, lr=1e-4)
optimizer = create_optimizer(case["name"], groups=split_parameters(model), settings=settings)
for p in model.parameters():
    p.grad = torch.randn(p.shape) * 1e-3
for _ in range(3):
    optimizer.step()
print("true", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    for _ in range(int(line)):
        optimizer.step()
    print((time.perf_counter() - began) / int(line), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--updates", type=int, default=3, help="in a turn")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    print("| case | before, ms | after, ms | ratio |\n|---|---|---|---|")
    for name, case in CASES.items():
        if args.only not in name:
            continue
        workers = [Worker(WORKER, json.dumps(case), str(path.resolve())) for path in (args.before, args.after)]
        pairs = [[worker.work(args.updates) for worker in workers] for _ in range(args.rounds)]
        before, after = (1e3 * median(column) for column in zip(*pairs, strict=True))
        ratio = median(b / a for a, b in pairs)
        print(f"| {name} | {before:.1f} | {after:.1f} | {ratio:.3f} |", flush=True)
        for worker in workers:
            worker.close()


if __name__ == "__main__":
    main()
