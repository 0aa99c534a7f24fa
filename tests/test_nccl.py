"""Sums over NCCL, in a world of one process: a GPU's own streams, dtypes and collectives, but no second GPU.

What several ranks make of each other's numbers is tested on CPUs, in test_ddp.py and test_fsdp.py.
"""

import pytest
import torch
import torch.distributed as dist
from support.models import Model, batches, loss_of

from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.param_groups import split_parameters
from qgalore.sharding import local
from qgalore.storage.convert import quantize_linear_layers
from qgalore.storage.quantized_weight import open_weight
from qgalore.sync import GradSync

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHODS = ["adamw8bit", "galore_adamw", "galore_adamw_per_layer", "q_galore_adamw8bit", "q_galore_adamw8bit_per_layer"]


@pytest.fixture
def world_of_one():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(method: str, *, how: str = "alone", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The weights after 8 updates. how: `alone`; `sent`, every sum by NCCL; `sharded`, by FSDP2."""
    torch.manual_seed(0)
    model, data = Model(width=256).to(dtype), batches(8)
    settings = Settings(lr=0.01, rank=8, update_proj_gap=4, proj_type="right", subspace="svd")
    if method.startswith("q_"):
        quantize_linear_layers(model, select=lambda name: "mlp" in name, bits=8, seed=0)
        settings = Settings(**vars(settings) | {"proj_bits": 4})
    model.cuda()
    if how == "sharded":
        from torch.distributed.fsdp import fully_shard

        for layer in [*model.mlp, model]:
            fully_shard(layer)
    sync = GradSync(enabled=how == "sent")
    sync.parallel = sync.at_rank_size = how == "sent"  # with one process nothing would be sent
    optimizer = create_optimizer(method, groups=split_parameters(model), settings=settings, sync=sync)
    driver = create_updates(method, optimizer=optimizer, sync=sync)
    for inputs, targets in data:
        loss_of(model, (inputs.cuda(), targets.cuda())).backward()
        assert not driver.finish().bad
    return {name: local(open_weight(p).read(torch.float32)).cpu() for name, p in model.named_parameters()}


CASES = [(method, "sent") for method in METHODS]
# Where a mesh has one rank, torch 2.13 hands only the first part of a quantized weight on, so these stay out.
CASES += [(method, "sharded") for method in METHODS if not method.startswith("q_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method, how", CASES)
def test_a_world_of_one_is_one_process(method, how, dtype, world_of_one):
    """Sums of one are what was sent, to the last bit; products of rows are those of the whole but for a last bit."""
    alone, ours = train(method, dtype=dtype), train(method, how=how, dtype=dtype)
    for name, weight in alone.items():
        if how == "sent" and dtype == torch.float32:
            assert torch.equal(ours[name], weight), name
        else:
            assert (ours[name] - weight).norm() < 0.02 * weight.norm(), name
