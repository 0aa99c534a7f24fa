"""Whether a run notices that its ranks hold different models."""

import pytest
import torch
import torch.distributed as dist
from support.models import Model
from support.ranks import run_distributed, run_on_two_ranks
from support.runs import record
from support.training import Training

from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from peft_pretraining.training.replicas import CHUNK, check_replicas, digest
from qgalore.storage.quantized_weight import open_weight


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_every_bit_counts(dtype):
    """Also in the last of several chunks, and the order of elements and the names of tensors."""
    count = (2 * CHUNK + 40) // dtype.itemsize
    tensor = torch.randint(0, 2, (count,)).to(dtype)
    first = digest({"a": tensor})
    assert first.dtype == torch.int64 and first.shape == () and digest({"a": tensor.clone()}) == first
    assert digest({"b": tensor}) != first and digest({"a": tensor.roll(1)}) != first
    raw = tensor.view(torch.uint8)
    for place in (0, CHUNK, len(raw) - 1):
        raw[place] ^= 1
        assert digest({"a": tensor}) != first
        raw[place] ^= 1
    assert digest({"a": tensor}) == first


def test_plain_numbers_count_and_their_order_does_not():
    tensor = torch.ones(3)
    first = digest({"step": 3, "gap": 200, "exp_avg": tensor})
    assert digest({"gap": 200, "step": 3, "exp_avg": tensor}) == first
    assert digest({"step": 4, "gap": 200, "exp_avg": tensor}) != first
    assert digest({}) == digest({})


def differing(which: str) -> list[str]:
    """What each rank is told after one bit of rank 1 has changed."""
    rank = dist.get_rank()
    training = Training("q_galore_adamw8bit", int8=True).train(2)
    model, optimizer = training.model, training.optimizer
    p = model.model.layers[0].mlp.up_proj.weight
    tensors = {"codes": open_weight(p).tensors()["codes"], "state": optimizer.state[p]["exp_avg_sq.codes"]}
    if rank == 1 and which in tensors:
        tensors[which].view(-1).view(torch.uint8)[-1] ^= 1
    if rank == 1 and which == "step":
        optimizer.state[p]["step"] += 1
    try:
        check_replicas(model, optimizer, world=World(rank, 2), update=2)
    except UserError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("which", ["nothing", "codes", "state", "step"])
def test_one_bit_on_one_rank_stops_both_by_name(which):
    said = run_distributed(differing, which)
    if which == "nothing":
        assert said == [[], []]
        return
    name = "model.layers.0.mlp.up_proj.weight"
    where = name if which == "codes" else f"the optimizer's state of {name}"
    for (line,) in said:
        assert line.startswith("after update 2 the processes no longer hold the same model: ")
        assert f"model: {where} differs, and 0 more" in line


def test_one_process_has_nothing_to_compare():
    check_replicas(Model(), torch.optim.SGD(Model().parameters(), lr=1.0), world=World(), update=1)


def test_a_run_compares_and_goes_on(tiny, tmp_path, monkeypatch):
    flags = dict(optimizer="galore_adamw_per_layer", rank=8, update_proj_gap=2, total_batch_size=16, check_replicas=2)
    result = run_on_two_ranks(tiny.flags(tmp_path, **flags))
    assert result.returncode == 0, result.stderr
    assert len(record(tmp_path, "update")) == 6


def test_agreement_is_found_over_the_whole_range():
    numbers = torch.tensor([-(2**63), 2**63 - 1, 0, -1])
    assert World().agree(numbers).all()
    one, two = run_distributed(agreeing)
    assert one.tolist() == two.tolist() == [True, False, True, False]


def agreeing() -> torch.Tensor:
    rank = dist.get_rank()
    return World(rank, 2).agree(torch.tensor([-(2**63), 2**63 - 1 - rank, 5, -1 + rank]))
