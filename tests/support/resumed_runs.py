"""Runs that are cut in two and must end as those that were not."""

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.runs import losses, record, run

LOW_RANK = dict(rank=8, update_proj_gap=3)
INT8 = dict(weight_quant=True, weight_group_size=16, stochastic_round=True, proj_quant=True)


def checkpoint(save_dir: Path, update: int) -> Path:
    """The folder of an update\'s checkpoint."""
    return save_dir / f"checkpoint-{update:08}"


def digests(save_dir: Path, update: int) -> dict[str, tuple]:
    """Of the tensors that training goes on from: weights, moments, bases, generators. (Metadata comes in any order.)"""
    found = {}
    for path in checkpoint(save_dir, update).glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            bits = tensor.flatten().view(torch.uint8).numpy().tobytes()
            found[path.stem, name] = (tensor.dtype, tensor.shape, hashlib.sha256(bits).hexdigest())
    return found


def assert_halves_make_a_whole(tiny, tmp_path: Path, *, updates: int = 8, **flags) -> None:
    """A run of `updates`, and one that goes on from its checkpoint half-way, in another folder."""
    half = updates // 2
    chosen = flags | dict(num_training_steps=updates, save_every=half, keep_last=0, eval_every=3)
    run(tiny, tmp_path / "whole", **chosen)
    shutil.copytree(checkpoint(tmp_path / "whole", half), tmp_path / "half" / f"checkpoint-{half:08}")
    run(tiny, tmp_path / "half", **chosen, continue_from=tmp_path / "half")
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")[half:]
    assert digests(tmp_path / "half", updates) == digests(tmp_path / "whole", updates)
    ends = [record(tmp_path / name, "end")[0] for name in ("half", "whole")]
    assert ends[0]["tokens_seen"] == ends[1]["tokens_seen"] and ends[0]["perplexity"] == ends[1]["perplexity"]
    assert ends[0]["refreshes"] == ends[1]["refreshes"], "counted on, not anew"
    evaluated = [[line["update"] for line in record(tmp_path / name, "eval")] for name in ("half", "whole")]
    assert evaluated[0] == [update for update in evaluated[1] if update > half]
