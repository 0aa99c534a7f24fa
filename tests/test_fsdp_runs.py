"""Runs whose model is spread over the processes: --parallel fsdp, its checkpoints, and what it cannot do."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.command_line import flags_refusal, parse, refusal
from support.ranks import run_distributed, run_on_two_ranks
from support.resumed_runs import checkpoint, digests
from support.runs import ROOT, losses, record, run, torchrun
from torch import Tensor

import torchrun_main
from peft_pretraining.checkpoint.atomic_write import Snapshot, write_together
from peft_pretraining.checkpoint.files import complete_checkpoints
from peft_pretraining.checkpoint.shared_file import SharedFile, rows_of, rows_to_write
from peft_pretraining.checkpoint.tensor_file import TensorFile
from peft_pretraining.distributed import World
from peft_pretraining.export.__main__ import export
from qgalore.sharding import Shard

GALORE = dict(optimizer="galore_adamw", rank=8, update_proj_gap=2, proj_type="right")
INT8 = dict(weight_quant=True, weight_group_size=32, stochastic_round=True)
RUNS = {
    "adamw": dict(optimizer="adamw"),
    "adamw, clipped": dict(optimizer="adamw", grad_clipping=0.1),
    "galore": GALORE,
    "galore, checkpointed, 2 micro-batches": GALORE | dict(activation_checkpointing=True, total_batch_size=16),
    "galore per layer": GALORE | dict(optimizer="galore_adamw_per_layer"),
    "q-galore per layer": GALORE | INT8 | dict(optimizer="q_galore_adamw8bit_per_layer", rank=16),
    "lion": dict(optimizer="lion"),
}


def on_two(tiny, folder, **flags) -> None:
    result = run_on_two_ranks(tiny.flags(folder, **dict(total_batch_size=8, save_every=3, keep_last=0) | flags))
    assert result.returncode == 0, result.stderr


QUICK = ("adamw", "galore", "q-galore per layer")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS]


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_ddp_does_and_goes_on_as_either(tiny, tmp_path, name):
    """The losses of both, then each resumed from the other's checkpoint, and on one process, and its export."""
    flags = RUNS[name]
    on_two(tiny, tmp_path / "ddp", **flags)
    on_two(tiny, tmp_path / "fsdp", parallel="fsdp", **flags)
    wanted, bound = losses(tmp_path / "ddp"), 2e-3 if "q-galore" in name else 1e-5
    assert losses(tmp_path / "fsdp") == pytest.approx(wanted, rel=bound)
    ours, theirs = (load_file(checkpoint(tmp_path / run, 6) / "optimizer.safetensors") for run in ("fsdp", "ddp"))
    kinds = [{key: (t.dtype, t.shape) for key, t in tensors.items()} for tensors in (ours, theirs)]
    assert kinds[0] == kinds[1]
    files = [json.loads((checkpoint(tmp_path / run, 6) / "state.json").read_text()) for run in ("fsdp", "ddp")]
    assert files[0]["optimizer"].keys() == files[1]["optimizer"].keys()

    half = checkpoint(tmp_path / "fsdp", 3)
    on_two(tiny, tmp_path / "again", parallel="fsdp", continue_from=half, **flags)
    assert losses(tmp_path / "again") == losses(tmp_path / "fsdp")[3:], "to the last bit"
    assert digests(tmp_path / "again", 6) == digests(tmp_path / "fsdp", 6)
    on_two(tiny, tmp_path / "fsdp-ddp", continue_from=half, **flags)
    on_two(tiny, tmp_path / "ddp-fsdp", parallel="fsdp", continue_from=checkpoint(tmp_path / "ddp", 3), **flags)
    run(tiny, tmp_path / "alone", continue_from=half, **dict(total_batch_size=8) | flags)
    for other in ("fsdp-ddp", "ddp-fsdp", "alone"):
        assert losses(tmp_path / other) == pytest.approx(wanted[3:], rel=bound), other

    export(tmp_path / "fsdp", tmp_path / "exported")
    written, exported = (load_file(tmp_path / place / "model.safetensors") for place in ("fsdp/model", "exported"))
    assert written.keys() == exported.keys() and all(torch.equal(written[key], exported[key]) for key in written)


def test_what_a_rank_keeps_and_the_result_of_evaluation(tiny, tmp_path, capsys):
    flags = GALORE | INT8 | dict(optimizer="q_galore_adamw8bit_per_layer", rank=16)
    on_two(tiny, tmp_path / "ddp", **flags)
    on_two(tiny, tmp_path / "fsdp", parallel="fsdp", **flags)
    whole, rows = (record(tmp_path / name, "end")[0] for name in ("ddp", "fsdp"))
    assert rows["kept_bytes"]["weights"] * 2 == whole["kept_bytes"]["weights"]
    assert rows["kept_bytes"]["moments"] * 2 == whole["kept_bytes"]["moments"]
    capsys.readouterr()
    more = ["--eval_only", "--continue_from", str(tmp_path / "fsdp"), "--num_threads", "1"]
    assert torchrun_main.command_line(more) == 0
    perplexity = float(re.search(r"perplexity ([\d.]+)", capsys.readouterr().out)[1])
    assert perplexity == pytest.approx(rows["perplexity"], rel=1e-4)


@pytest.mark.slow
def test_four_processes_then_two_one_and_four_again(tiny, tmp_path):
    """Each goes on from the last one's checkpoint; together they are one process that was never interrupted."""
    flags = dict(total_batch_size=16, save_every=2, keep_last=0, parallel="fsdp", num_training_steps=8, **GALORE)
    run(tiny, tmp_path / "whole", **flags)
    start, found = {}, []
    for number, processes in enumerate((4, 2, 1, 4)):
        folder = tmp_path / f"{number}"
        result = torchrun(tiny.flags(folder, **flags | start), processes=processes)
        assert result.returncode == 0, result.stderr
        found += losses(folder)[:2]
        start = dict(continue_from=checkpoint(folder, 2 * (number + 1)))
    assert found == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_compiled_it_is_as_eager(tiny, tmp_path):
    """INT8, per layer: compiled code sees the rows of its own process."""
    flags = GALORE | INT8 | dict(optimizer="q_galore_adamw8bit_per_layer", rank=16, total_batch_size=8, parallel="fsdp")
    for name, more in [("eager", {}), ("compiled", {"compile": True})]:
        result = torchrun(tiny.flags(tmp_path / name, **flags | more), processes=2, timeout=500)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=2e-3)


@pytest.mark.slow
def test_two_machines_of_two_processes(tiny, tmp_path):
    """--parallel hsdp, with two torchruns on this machine. One process goes on from their checkpoint."""
    flags = dict(total_batch_size=16, save_every=3, keep_last=0, parallel="hsdp", **GALORE)
    run(tiny, tmp_path / "whole", **flags)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
               "--master_addr=127.0.0.1", f"--master_port={port}"]  # fmt: skip
    machines = [
        subprocess.Popen([*command, f"--node_rank={rank}", "torchrun_main.py", *tiny.flags(tmp_path / "four", **flags)],
                         cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]  # fmt: skip
    assert [machine.wait(timeout=240) for machine in machines] == [0, 0]
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    kept = [record(tmp_path / name, "end")[0]["kept_bytes"]["moments"] for name in ("four", "whole")]
    assert kept[0] * 2 == kept[1]
    run(tiny, tmp_path / "on", continue_from=checkpoint(tmp_path / "four", 3), **flags)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)


# Files that several processes write


def some_tensors() -> tuple[dict[str, Tensor], set[str]]:
    """Rows of 7 on two ranks, 4 and 3 of them; two tensors that are the same on both."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(7, 3, generator=generator),
        "b": torch.randint(0, 255, (7 * 8,), generator=generator, dtype=torch.uint8),
        "c": torch.randn(7, 2, 2, generator=generator, dtype=torch.bfloat16),
        "same": torch.randn(5, generator=generator),
        "number": torch.tensor(3.0),
    }
    return tensors, {"a", "b", "c"}


def shard_here() -> Shard:
    rank = dist.get_rank()
    return Shard(torch.Size((7, 3)), torch.Size((4 - rank, 3)), 4 * rank, dist.group.WORLD)


def write_a_file(folder: str, fails: bool) -> list[str]:
    rank, (tensors, spread) = dist.get_rank(), some_tensors()
    world = World(rank, 2)
    own = {name: rows_of(t, shard_here()) if name in spread else t for name, t in tensors.items()}
    file = SharedFile(rows_to_write(own, spread=spread, world=world, ranks=2), {"format": "pt"})
    if fails and rank == 1:
        object.__setattr__(file, "fill", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    texts = dict.fromkeys(("config.json", "state.json"), "{}")
    rest = {name: TensorFile({}, {}) for name in ("optimizer.safetensors", "rng.safetensors")}
    snapshot = Snapshot(5, {"model.safetensors": file} | texts | rest)
    try:
        return [str(write_together(Path(folder), snapshot, world=world))]
    except OSError as error:
        return [str(error)]


def test_it_is_the_file_that_one_process_writes(tmp_path):
    one, two = run_distributed(write_a_file, str(tmp_path), False)
    (folder,) = complete_checkpoints(tmp_path)
    assert one == two == [str(folder)]
    tensors, _ = some_tensors()
    TensorFile(tensors, {"format": "pt"}).write(tmp_path / "whole.safetensors")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_what_fails_on_one_process_fails_on_all_and_leaves_no_checkpoint(tmp_path):
    assert run_distributed(write_a_file, str(tmp_path), True) == [["process 1: No space left on device"]] * 2
    assert complete_checkpoints(tmp_path) == []
    run_distributed(write_a_file, str(tmp_path), False)
    assert len(complete_checkpoints(tmp_path)) == 1


@pytest.mark.parametrize("rows, width, ranks", [(7, 256, 2), (16, 16, 2), (10, 128, 5), (9, 512, 4), (3, 100, 1)])
def test_the_rows_of_parts(rows, width, ranks):
    """Elements, half as many bytes, and blocks of 256 that begin with each rank's rows."""
    each = -(-rows // ranks)
    shards = [Shard(torch.Size((rows, width)), torch.Size((min(each, rows - start), width)), start, None)
              for start in range(0, rows, each)]  # fmt: skip
    for count in (rows * width, rows * width // 2, -(-rows * width // 256), rows):
        part = torch.arange(count)
        pieces = [rows_of(part, shard) for shard in shards]
        assert torch.equal(torch.cat(pieces), part)
        if each * width % 256 == 0:
            assert [len(piece) for piece in pieces] == [-(-count * shard.shape[0] // rows) for shard in shards]


# What cannot be had


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--optimizer", "muon"], "--parallel fsdp with --optimizer muon, which needs all rows"),
        (
            ["--optimizer", "q_galore_muon8bit"],
            "--parallel fsdp with --optimizer q_galore_muon8bit, which needs all rows",
        ),
        (["--optimizer", "adafactor"], "--parallel fsdp with --optimizer adafactor"),
        (["--optimizer", "apollo"], "--parallel fsdp with --optimizer apollo, which needs the norms"),
        (["--optimizer", "galore_adamw", "--residual", "fira"], "--parallel fsdp with --residual fira"),
        (["--optimizer", "galore_adamw", "--proj_type", "continuous"], "--proj_type continuous"),
        (["--optimizer", "galore_adamw", "--proj_type", "std"], "or take --proj_type right"),
        (["--peft", "lora", "--rank", "4"], "--parallel fsdp with --peft lora"),
    ],
)
def test_what_needs_all_rows_is_refused(flags, said):
    assert said in flags_refusal("--parallel", "fsdp", *flags, world_size=2)


def test_rows_that_cannot_be_shared_out_are_refused_by_name(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    flags = GALORE | dict(optimizer="q_galore_adamw8bit", parallel="fsdp", total_batch_size=12, dry_run=True)
    message = refusal(tiny.flags(tmp_path, weight_quant=True, **flags), capsys)
    assert re.search(r"the \d+ rows of model.layers.0.self_attn.q_proj.weight cannot be shared out to 3", message)
    message = refusal(tiny.flags(tmp_path, **flags | dict(model_config="configs/llama_9m.json", rank=50)), capsys)
    assert "--parallel fsdp with 8-bit moments: a process would have" in message


def test_the_side_is_right_unless_one_is_named():
    assert parse("--optimizer", "galore_adamw", "--parallel", "fsdp", world_size=2).proj_type == "right"
    assert parse("--optimizer", "galore_adamw", world_size=2).proj_type == "std"
