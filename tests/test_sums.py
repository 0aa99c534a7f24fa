"""Sums of micro-batches in host memory: the same bits as on the device, and nothing of its memory."""

import copy

import pytest
import torch
from support import runs
from support.models import Model, batches, loss_of

from peft_pretraining.cli.args import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.training.memory_plan import plan_memory
from qgalore import sums
from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.param_groups import split_parameters
from qgalore.sums import HostSums, Sums
from qgalore.sync import GradSync


@pytest.fixture
def device_is_elsewhere(monkeypatch):
    """The CPU stands for a device whose memory is not the host's."""
    monkeypatch.setattr(sums, "_elsewhere", lambda tensor: True)


def train(model, *, optimizer, on_host, updates=7, micro_batches=3, dtype=None, **settings):
    chosen = Settings(**dict(lr=0.01, rank=4, update_proj_gap=3) | settings)
    built = create_optimizer(optimizer, groups=split_parameters(model), settings=chosen)
    driver = create_updates(
        optimizer, optimizer=built, sync=GradSync(), accumulation=micro_batches, accumulation_dtype=dtype,
        accumulate_on_host=on_host,
    )  # fmt: skip
    torch.manual_seed(1)
    for index, batch in enumerate(batches(updates * micro_batches), start=1):
        (loss_of(model, batch) / micro_batches).backward()
        if index % micro_batches == 0:
            driver.finish()
    return driver


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["own dtype", "float32"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(optimizer="galore_adamw_per_layer"),
        dict(optimizer="q_galore_adamw8bit_per_layer", lift="fira"),
        dict(optimizer="foam_per_layer"),
        dict(optimizer="galore_adamw_per_layer", proj_type="continuous"),
    ],
    ids=["galore", "residual", "foam", "online pca"],
)
def test_the_same_bits(settings, dtype, device_is_elsewhere):
    models = [Model(width=64)]
    models.append(copy.deepcopy(models[0]))
    for model, on_host in zip(models, (False, True), strict=True):
        assert not train(model, on_host=on_host, dtype=dtype, **settings).sums
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))


def test_a_step_before_the_last_micro_batch_takes_what_there_is(device_is_elsewhere):
    """As at the end of an epoch. What comes after begins anew, in the same memory."""
    models = [Model(width=64)]
    models.append(copy.deepcopy(models[0]))
    for model, on_host in zip(models, (False, True), strict=True):
        driver = train(model, optimizer="galore_adamw_per_layer", on_host=on_host)
        loss_of(model, batches(1)[0]).backward()
        driver.optimizer.step()
        assert not driver.sums
        torch.manual_seed(2)
        for batch in batches(3):
            loss_of(model, batch).backward()
        driver.finish()
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))


def test_memory_is_taken_once_and_never_shared_by_two_sums(monkeypatch, device_is_elsewhere):
    """Whatever the sizes: sums of updates differ in them, and some are larger than an arena."""
    monkeypatch.setattr(sums, "ARENA", 1 << 10)
    kept, generator = HostSums(), torch.Generator().manual_seed(3)
    taken = 0
    for update in range(6):
        sizes = torch.randint(1, 700, (9,), generator=generator).tolist()
        expected = {}
        for micro_batch in range(3):
            for name, size in enumerate(sizes):
                part = torch.randn(size, generator=generator)
                expected[name] = expected[name] + part if micro_batch else part.clone()
                kept.add(PARAMETERS[name], part)
        assert all(torch.equal(kept.take(PARAMETERS[name]), total) for name, total in expected.items())
        held = sum(arena.nbytes for arena in kept._arenas)
        assert update < 3 or held <= 2 * taken
        taken = max(taken, held)
    assert all(arena.nbytes & (arena.nbytes - 1) == 0 for arena in kept._arenas)


PARAMETERS = [torch.nn.Parameter(torch.zeros(1)) for _ in range(9)]


def test_on_a_cpu_there_is_no_second_copy():
    kept, part = HostSums(), torch.ones(3)
    kept.add(PARAMETERS[0], part)
    kept.add(PARAMETERS[0], torch.ones(3))
    assert kept.take(PARAMETERS[0]) is part and torch.equal(part, torch.full((3,), 2.0))


def test_the_plan_of_a_gpu_shrinks_by_the_sums():
    flags = "--model_config configs/llama_3m.json --dataset pydocs --batch_size 2 --gradient_accumulation 4 "
    flags += "--optimizer q_galore_adamw8bit_per_layer --rank 32 --residual fira --accumulate_on"
    device, host = (
        plan_memory(parse_args([*flags.replace("--residual fira ", "").split(), place]), dtype=torch.bfloat16)
        for place in ("device", "host")
    )
    assert host.peak.bytes < device.peak.bytes - 2e6, "the sums of the embedding and of all matrices"
    whole = plan_memory(parse_args([*flags.split(), "host"]), dtype=torch.bfloat16)
    assert whole.peak.bytes == pytest.approx(host.peak.bytes, rel=0.01), "whole gradients take no more of a GPU"


def test_the_residual_over_micro_batches_needs_the_host(tiny, tmp_path):
    flags = dict(optimizer="q_galore_adamw8bit_per_layer", residual="fira", rank=8, gradient_accumulation=2)
    with pytest.raises(UserError, match="--accumulate_on host"):
        parse_args(tiny.flags(tmp_path / "device", **flags))
    runs.run(tiny, tmp_path / "host", **flags, accumulate_on="host")
    whole = flags | dict(optimizer="q_galore_adamw8bit")
    runs.run(tiny, tmp_path / "whole", **whole)
    assert runs.losses(tmp_path / "host")[:1] == runs.losses(tmp_path / "whole")[:1]
    assert runs.losses(tmp_path / "host") == pytest.approx(runs.losses(tmp_path / "whole"), rel=0.02)


def test_sums_say_what_is_kept():
    kept = Sums()
    kept.add(PARAMETERS[0], torch.ones(2))
    assert [tensor.numel() for tensor in kept.values()] == [2]
