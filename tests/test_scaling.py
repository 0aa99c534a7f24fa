"""What is sent: counted from the collectives, and by the formula of benchmarks/scaling.py and docs/multi_gpu.md."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_distributed

from benchmarks import scaling
from peft_pretraining.distributed import World
from peft_pretraining.model.build import meta_model
from peft_pretraining.model.config import read_config
from qgalore.param_groups import split_parameters

CONFIG, RANK = "configs/llama_3m.json", 16


def sent(flags: list[str], folder: str) -> dict[str, dict[str, int]]:
    """For each case, the bytes of an update between refreshes, by the kind of collective."""
    world, found = World(dist.get_rank(), 2), {}
    for title in scaling.CASES:
        with contextlib.ExitStack() as cleanup:
            step = scaling.open_case(title, flags, world=world, folder=Path(folder), cleanup=cleanup)
            step(), step()
            counts = []
            for _ in range(2):
                with scaling.Traffic(2) as traffic:
                    step()
                counts.append(dict(traffic.bytes))
        found[title] = min(counts, key=lambda kinds: sum(kinds.values()))
    return found


@pytest.mark.slow
def test_what_is_sent_is_what_the_formula_says(tiny, tmp_path):
    """Between refreshes, on two ranks, float32. INT8 weights of fsdp: a byte a weight, and 5 for a group of 256."""
    flags = tiny.flags(tmp_path, model_config=CONFIG, batch_size=1, rank=RANK, update_proj_gap=1000, lr=0.001)
    for name in ("save_dir", "num_training_steps"):
        place = flags.index(f"--{name}")
        del flags[place : place + 2]
    one, other = run_distributed(sent, flags, str(tmp_path))
    assert one == other
    model = meta_model(read_config(CONFIG), dtype=torch.float32)
    for title, (around, chosen) in scaling.CASES.items():
        kind = around + " int8" * ("weight_quant" in chosen)
        expected = scaling.formula(model, kind, rank=RANK, ranks=2, micro_batches=1, bytes_each=4)
        assert sum(one[title].values()) == pytest.approx(expected, rel=1e-3), title

    inside = sum(group.elements for group in split_parameters(model) if group.kind == "matrix")
    saved = one["fsdp, GaLore"]["all-gather"] - one["fsdp, Q-GaLore per layer"]["all-gather"]
    a_weight = 4 - saved / inside  # of a ring of two: half of the weights, twice
    assert 1 + 5 / 256 <= a_weight < 1.03, "groups end with their row, which has 192 or 512 weights here"
