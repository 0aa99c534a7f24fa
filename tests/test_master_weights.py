import copy

import pytest
import torch

from qgalore.master_weights import MasterWeights


def pair(dtype=torch.bfloat16):
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    return weight, torch.nn.Parameter(weight.detach().float())


@pytest.mark.parametrize("optimizer, options", [
    (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adafactor, {"lr": 0.01}),
])  # fmt: skip
def test_bfloat16_weights_follow_the_float32_optimizer(optimizer, options):
    """Forty updates: the weight is, to the last bit, what the float32 twin rounds to."""
    weight, twin_weight = pair()
    ours = MasterWeights(optimizer, [{"params": [weight], "name": "all"}], **options)
    twin = optimizer([twin_weight], **options)
    for _ in range(40):
        weight.grad = torch.randn_like(weight)
        twin_weight.grad = weight.grad.float()
        ours.step()
        twin.step()
        assert torch.equal(weight, twin_weight.bfloat16())


def test_torchs_own_optimizer_would_lose_the_small_updates():
    """Why this class exists: 40 updates of 1e-4 of a bfloat16 weight, with and without it."""
    moved = {}
    for wrapped in (True, False):
        weight, _ = pair()
        group = {"params": [weight]}
        optimizer = MasterWeights(torch.optim.SGD, [group], lr=1e-4) if wrapped else torch.optim.SGD([group], lr=1e-4)
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[wrapped] = 1 - weight.float().mean().item()
    assert moved[True] == pytest.approx(0.004, rel=0.05)
    assert moved[False] == 0


def test_learning_rates_are_those_of_its_own_groups():
    weight, twin_weight = pair()
    ours, twin = MasterWeights(torch.optim.SGD, [{"params": [weight]}], lr=1.0), torch.optim.SGD([twin_weight], lr=1.0)
    for lr in (0.5, 0.25):
        for optimizer, p in ((ours, weight), (twin, twin_weight)):
            optimizer.param_groups[0]["lr"] = lr
            p.grad = torch.full_like(p, 0.25)
            optimizer.step()
    assert torch.equal(weight, twin_weight.bfloat16())


def test_float32_parameters_get_the_optimizer_itself():
    _, weight = pair()
    assert type(MasterWeights.around(torch.optim.AdamW, [{"params": [weight]}], lr=1e-3)) is torch.optim.AdamW
    weight, _ = pair()
    assert type(MasterWeights.around(torch.optim.AdamW, [{"params": [weight]}], lr=1e-3)) is MasterWeights


def test_a_parameter_without_gradient_stays():
    weight, _ = pair()
    before = copy.deepcopy(weight)
    MasterWeights(torch.optim.AdamW, [{"params": [weight]}], lr=1.0).step()
    assert torch.equal(weight, before)
