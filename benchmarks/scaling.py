"""Bytes an update and tokens/s on 1, 2 and 4 processes, beside plain torch; and what that means for many GPUs.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --output benchmarks/results/scaling.jsonl
    python benchmarks/scaling.py --simulate --model_config configs/llama_7b.json --rank 1024 --dtype bfloat16

Measured: every process trains all cases in turn, on gloo, so that a busy machine slows down all of them. Prints

    sent, MB    what a process sends in an update between refreshes, by a ring: 2 (N - 1) / N of what is all-reduced,
                (N - 1) / N of what is all-gathered or reduce-scattered. Counted from the collectives themselves
    formula     the same, from the shapes alone
    tokens/s    median over the rounds, all processes together
    / DDP       tokens/s divided by those of torch's DDP + AdamW on as many processes: median over the rounds

--simulate does not run the model. A GPU computes for as long as --mfu of its arithmetic takes; it sends the formula's
bytes over NVLink within 8 GPUs, and over its share of the network beyond. The true time lies between their sum and the
larger of both, where all of it overlaps: the two numbers, in per cent of the tokens/s without any sending.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torchrun_main as script  # before torch, for which it sets environment variables  # isort: skip
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.support import add_data_flags, command_line, machine, print_table, save_lines
from peft_pretraining.batch import IGNORED
from peft_pretraining.distributed import World
from peft_pretraining.model.build import meta_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.dtypes import DTYPES
from peft_pretraining.model.family import family_of
from peft_pretraining.model.sharding import TokenLoss
from peft_pretraining.training.loop import read_batches, train_step
from qgalore.param_groups import split_parameters

GALORE = dict(optimizer="galore_adamw", proj_type="right")
Q_GALORE = dict(optimizer="q_galore_adamw8bit_per_layer", proj_type="right", weight_quant="", proj_quant="")
CASES: dict[str, tuple[str, dict[str, str]]] = {  # title: what is around the model, flags
    "torch DDP + AdamW": ("torch ddp", dict(optimizer="adamw")),
    "torch FSDP2 + AdamW": ("torch fsdp", dict(optimizer="adamw")),
    "ddp, GaLore": ("ddp", GALORE),
    "ddp, Q-GaLore per layer": ("ddp", Q_GALORE),
    "fsdp, GaLore": ("fsdp", GALORE),
    "fsdp, Q-GaLore per layer": ("fsdp", Q_GALORE),
}
COLLECTIVES = {  # operator of torch.ops.c10d: what it is, where its large side stands, how much of that a ring sends
    "allreduce_": ("all-reduce", 0, 2),
    "_allgather_base_": ("all-gather", 0, 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
}
GROUP = 256  # weights of a scale and a zero point, of 4 + 1 bytes
GPU_FLOPS, GPUS, NVLINK, NETWORK, LATENCY = 989e12, 8, 300e9, 25e9, 10e-6


class Traffic(TorchDispatchMode):
    """Counts what this process sends while it is entered, in bytes, whoever asks for it."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes, self.messages = ranks, Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d" and name in COLLECTIVES:
            kind, large, factor = COLLECTIVES[name]
            tensors = [leaf for leaf in tree_leaves(args[large]) if isinstance(leaf, torch.Tensor)]
            sent = factor * sum(tensor.nbytes for tensor in tensors) * (self.ranks - 1) // self.ranks
            self.bytes[kind] += sent
            self.messages += 1
        return func(*args, **(kwargs or {}))


def formula(model: nn.Module, around: str, *, rank: int, ranks: int, micro_batches: int, bytes_each: int) -> float:
    """Bytes that a process sends in an update between refreshes, but for a few hundred numbers of bookkeeping.

    model: on the meta device, not quantized. around: as in CASES, with " int8" for quantized matrices.
    bytes_each: of a weight and of its gradient; what is projected travels in float32.
    """
    groups = split_parameters(model)
    total = sum(group.elements for group in groups)
    matrices = [p for group in groups if group.kind == "matrix" for p in group.parameters]
    inside = sum(p.numel() for p in matrices)
    ring = (ranks - 1) / ranks
    if around == "torch ddp":
        return 2 * ring * total * bytes_each
    if around.startswith("ddp"):
        projected = sum(p.shape[0] * min(rank, p.shape[1]) for p in matrices)
        return 2 * ring * (projected * 4 + (total - inside) * bytes_each)
    layers = sum(p.numel() for p in family_of(model.config).part("layers", model).parameters())  # type: ignore[arg-type]
    embedding = 0 if around.startswith("torch") else family_of(model.config).part("embedding", model).weight.numel()  # type: ignore[arg-type]
    root = total - layers - embedding  # gathered once: FSDP2 keeps it between forward and backward
    twice = inside * (1 + 5 / GROUP if "int8" in around else bytes_each) + (layers - inside + embedding) * bytes_each
    return micro_batches * ring * (2 * twice + root * bytes_each + total * bytes_each)


# Measured


def open_case(title: str, flags: list[str], *, world: World, folder: Path, cleanup: contextlib.ExitStack) -> Callable:
    """One update of a case, as a function. Its run is set up as torchrun_main.py does, from its flags."""
    around, chosen = CASES[title]
    more = [word for name, value in chosen.items() for word in (f"--{name}", value) if word]
    parallel = "fsdp" if around == "fsdp" else "ddp"
    where = ["--save_dir", str(folder / title.replace(" ", "-")), "--parallel", parallel]
    args = script.parse_args([*flags, *more, *where], world_size=world.size)
    plan = script.make_plan(args, world=world, cleanup=cleanup)
    run = script.open_run(plan, interruption=script.Interruption(), cleanup=cleanup)
    if not around.startswith("torch"):
        return lambda: train_step(run)
    step = plain_torch(script.open_model(plan), around=around, ranks=world.size)  # without our hooks
    return lambda: [step(batch) for batch in read_batches(run)]


def plain_torch(model: Any, *, around: str, ranks: int) -> Callable[[Any], None]:
    """An update by torch alone: DistributedDataParallel or fully_shard, and AdamW."""
    root: nn.Module = TokenLoss(model)
    if ranks > 1 and around == "torch ddp":
        root = nn.parallel.DistributedDataParallel(root)
    elif ranks > 1:
        from torch.distributed.fsdp import fully_shard

        for module in [*family_of(model.config).part("layers", model), root]:
            fully_shard(module)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no mean
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-3, foreach=True)

    def step(batch: Any) -> None:
        loss = root(batch.input_ids, batch.targets) / (batch.targets != IGNORED).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(args: argparse.Namespace) -> None:
    """One of the processes. The first writes what it has found, one JSON object a case."""
    world = World.from_environment()
    script.set_up_log(is_main=False)
    script.use_threads(world, num_threads=1)
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(world.connected())
        folder = Path(args.folder) / str(world.size)
        flags = command_line(flags_of(args))
        steps = {title: open_case(title, flags, world=world, folder=folder, cleanup=cleanup) for title in args.only}
        found: dict[str, Any] = {title: {"seconds": []} for title in steps}
        for title, step in steps.items():
            step(), step()  # first bases, buffers, buckets
            counts = []
            for _ in range(3):
                with Traffic(world.size) as traffic:
                    step()
                counts.append((sum(traffic.bytes.values()), dict(traffic.bytes), traffic.messages))
            total, kinds, messages = min(counts, key=lambda count: count[0])  # an update without a refresh
            found[title] |= {"bytes": total, "kinds": kinds, "messages": messages}
        for _ in range(args.rounds):
            for title, step in steps.items():
                world.sum(torch.zeros(1))  # all begin together
                began = time.perf_counter()
                for _ in range(args.updates):
                    step()
                found[title]["seconds"].append((time.perf_counter() - began) / args.updates)
        if world.is_main:
            (folder.parent / f"{world.size}.json").write_text(json.dumps(found))


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    return dict(
        model_config=args.model_config, dataset=args.dataset, tokenizer=args.tokenizer, batch_size=args.batch_size,
        max_length=args.max_length, rank=args.rank, update_proj_gap=1000, num_training_steps=100_000, lr=1e-3,
        workers=0, num_threads=1, dtype="float32", wandb_mode="disabled", eval_tokens="2K",
    )  # fmt: skip


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each case and number of processes."""
    rows, model = [], meta_model(read_config(args.model_config), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        for ranks in args.processes:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            subprocess.run(
                [*launch, __file__, *sys.argv[1:], "--worker", "--folder", folder],
                check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            found = json.loads((Path(folder) / f"{ranks}.json").read_text())
            plain = found[next(iter(CASES))]["seconds"]
            for title, told in found.items():
                around = CASES[title][0] + " int8" * ("weight_quant" in CASES[title][1])
                expected = formula(model, around, rank=args.rank, ranks=ranks, micro_batches=1, bytes_each=4)
                ratios = [theirs / ours for theirs, ours in zip(plain, told["seconds"], strict=True)]
                tokens = ranks * args.batch_size * args.max_length
                rows.append({
                    "processes": ranks, "case": title, "sent, MB": told["bytes"] / 1e6, "formula": expected / 1e6,
                    "messages": told["messages"], "tokens/s": tokens / median(told["seconds"]), "/ DDP": median(ratios),
                    "kinds": told["kinds"],
                })  # fmt: skip
    return rows


# Simulated


def simulate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each case: per cent of the tokens/s without sending, on 8 to 1024 GPUs."""
    model = meta_model(read_config(args.model_config), dtype=torch.float32)
    layers = len(family_of(model.config).part("layers", model))
    parameters = sum(p.numel() for p in model.parameters())
    compute = 6 * parameters * args.tokens / (args.mfu * GPU_FLOPS)  # seconds
    rows = []
    for title, (around, flags) in CASES.items():
        row: dict[str, Any] = {"case": title}
        for ranks in args.gpus:
            kind = around + " int8" * ("weight_quant" in flags)
            each = DTYPES[args.dtype].itemsize
            sent = formula(model, kind, rank=args.rank, ranks=ranks, micro_batches=args.micro_batches, bytes_each=each)
            messages = 3 * layers * args.micro_batches if "fsdp" in around else 7 * layers
            sending = sent / (NVLINK if ranks <= GPUS else args.network) + messages * LATENCY * math.log2(ranks)
            working = compute * args.micro_batches
            row.setdefault("sent, GB", sent / 1e9)
            row[f"{ranks} GPUs"] = (
                f"{100 * working / (working + sending):.0f} to {min(100, 100 * working / sending):.0f}"
            )
        rows.append(row)
    print(
        f"{compute:.2f} s of arithmetic a micro-batch of {args.tokens} tokens, {args.micro_batches} of them an update\n"
    )
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--model_config", default="configs/llama_9m.json", metavar="FILE")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4, help="sequences of a process")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=2, help="updates of a case in a round")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch of one GPU, for --simulate")
    parser.add_argument("--micro_batches", type=int, default=1, help="of an update, for --simulate")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and gradients, for --simulate")
    parser.add_argument("--mfu", type=float, default=0.4, help="part of 989 TFLOPS that a GPU reaches, for --simulate")
    parser.add_argument("--network", type=float, default=NETWORK, help="bytes a second and GPU, for --simulate")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64, 256, 1024], help="for --simulate")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    rows = simulate(args) if args.simulate else measure(args)
    print_table([{key: value for key, value in row.items() if key != "kinds"} for row in rows])
    save_lines(args.output, rows, machine=machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
