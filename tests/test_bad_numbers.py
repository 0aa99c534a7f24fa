"""Gradients that are not finite: nothing of them is ever written, and the run goes on as if they had not been."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from support.models import Model, batches, loss_of
from support.ranks import run_distributed
from torch import nn

from peft_pretraining.model.loss import head_loss_sum
from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage.convert import quantize_linear_layers
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates

WHOLE = ("adam", "adamw", "sgd", "adafactor", "adamw8bit", "galore_adamw", "q_galore_adamw8bit")
PER_LAYER = ("adamw8bit_per_layer", "galore_adamw_per_layer", "q_galore_adamw8bit_per_layer")
BIG = "mlp.1.weight"  # the parameter whose gradient goes bad


def model_of(name: str) -> nn.Module:
    """With INT8 weights for Q-GaLore, and moments large enough to be kept in 8 bits."""
    torch.manual_seed(0)
    model = Model(width=64).to(torch.bfloat16 if name.startswith("q_") else torch.float32)
    if name.startswith("q_"):
        quantize_linear_layers(model, select=lambda name: "mlp" in name)
    return model


def updates_of(
    name: str, model: nn.Module, *, accumulation: int = 1, at_rank_size: bool = False, **settings
) -> WholeModelUpdates | PerLayerUpdates:
    sync = GradSync(at_rank_size=at_rank_size)
    chosen = Settings(**{"lr": 0.02, "rank": 4, "update_proj_gap": 3} | settings)
    optimizer = create_optimizer(name, groups=split_parameters(model), settings=chosen, sync=sync)
    return create_updates(name, optimizer=optimizer, sync=sync, accumulation=accumulation)


def spoil(p: torch.Tensor, value: float) -> torch.utils.hooks.RemovableHandle:
    """From now on one element of the gradient of p is `value`."""

    def change(gradient):
        gradient = gradient.clone()
        gradient[1, 1] = value
        return gradient

    return p.register_hook(change)


def everything(model: nn.Module, updates) -> dict[str, object]:
    """Weights and state of all parameters by name, copied."""
    found: dict[str, object] = {}
    for name, p in model.named_parameters():
        found[name] = p.detach().float().clone()
        for key, value in updates.optimizer.state.get(p, {}).items():
            found[f"{name}:{key}"] = value.clone() if torch.is_tensor(value) else copy.copy(value)
    return found


def differences(one: dict[str, object], other: dict[str, object], *, ignore=("seconds", "failed")) -> set[str]:
    """Names of what is not the same to the last bit; moments and bases that appeared and hold nothing yet aside."""
    keys = {key for key in one.keys() | other.keys() if not any(word in key for word in ignore)}
    return {
        key
        for key in keys
        if key not in one or key not in other
        or not (torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key])
    }  # fmt: skip


def train(model, updates, data, *, accumulation: int = 1):
    for start in range(0, len(data), accumulation):
        for batch in data[start : start + accumulation]:
            (loss_of(model, batch) / accumulation).backward()
        yield updates.finish()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", WHOLE)
def test_a_bad_gradient_skips_a_whole_model_update_as_if_its_data_had_not_been(name, value):
    """The twin never sees the spoilt batch; a refresh is due in it, and later ones are due at the same updates."""
    data = batches(9)
    model, twin = model_of(name), model_of(name)
    ours, theirs = updates_of(name, model), updates_of(name, twin)
    assert all(not outcome.bad for outcome in train(model, ours, data[:3]))
    before = everything(model, ours)
    parameter = dict(model.named_parameters())[BIG]
    hook = spoil(parameter, value)
    (outcome,) = train(model, ours, data[3:4])
    hook.remove()
    assert outcome.bad == (parameter,) and not math.isfinite(outcome.norm)
    assert not differences(before, everything(model, ours), ignore=())
    assert all(p.grad is None for p in model.parameters())
    list(train(model, ours, data[4:]))
    list(train(twin, theirs, data[:3] + data[4:]))
    assert not differences(everything(model, ours), everything(twin, theirs))


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", PER_LAYER)
def test_a_bad_gradient_leaves_its_parameter_alone_in_an_update_per_layer(name, compile):
    """Compiled code cannot ask whether a number is finite; it writes what was there."""
    data = batches(5)
    model = model_of(name)
    updates = updates_of(name, model, compile=compile)
    list(train(model, updates, data[:3]))
    before = everything(model, updates)
    parameter = dict(model.named_parameters())[BIG]
    hook = spoil(parameter, math.nan)
    (outcome,) = train(model, updates, data[3:4])
    hook.remove()
    assert outcome.bad == (parameter,)
    changed = differences(before, everything(model, updates))
    assert not {key for key in changed if key.startswith(BIG)}
    was_due = before.get(f"{BIG}:next_refresh", 5) <= 4
    assert updates.optimizer.state[parameter].get("failed_refreshes", 0) == was_due, "that stays counted"
    assert {key for key in changed if ":" not in key} == before.keys() - {BIG} - {key for key in before if ":" in key}
    (outcome,) = train(model, updates, data[4:])
    assert not outcome.bad and math.isfinite(outcome.norm)
    assert any(key.startswith(BIG) for key in differences(before, everything(model, updates)))


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_per_layer", "q_galore_adamw8bit_per_layer"])
def test_a_bad_first_gradient_delays_the_first_basis(name):
    """Until a gradient is useful there is a random basis; the first good gradient refreshes it."""
    model = model_of(name)
    updates = updates_of(name, model, update_proj_gap=50)
    parameter = dict(model.named_parameters())[BIG]
    weight = parameter.detach().float().clone()
    hook = spoil(parameter, math.nan)
    with pytest.warns(UserWarning, match="refresh failed") if "per_layer" in name else nullcontext():
        (outcome,) = train(model, updates, batches(1))
    hook.remove()
    assert outcome.bad == (parameter,) and torch.equal(parameter.float(), weight)
    list(train(model, updates, batches(1)))
    state = updates.optimizer.state[parameter]
    assert state["step"] == 1 and state["refreshes"] == 1 and state["mass"] == pytest.approx(0.1)
    assert not torch.equal(parameter.float(), weight)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_per_layer"])
def test_one_bad_micro_batch_spoils_its_update_and_no_other(name):
    data = batches(12)
    model = model_of(name)
    updates = updates_of(name, model, accumulation=4)
    parameter = dict(model.named_parameters())[BIG]
    outcomes = []
    for index, batch in enumerate(data):
        hook = spoil(parameter, math.inf) if index == 5 else None
        (loss_of(model, batch) / 4).backward()
        if hook is not None:
            hook.remove()
        if index % 4 == 3:
            outcomes.append(updates.finish())
    assert [bool(outcome.bad) for outcome in outcomes] == [False, True, False]
    assert updates.optimizer.state[parameter]["step"] == 2
    assert all(p.isfinite().all() for p in model.parameters())


def bad_on_one_rank(name: str, at_rank_size: bool) -> dict[str, torch.Tensor]:
    """Four updates, the third with a NaN in one gradient of rank 1."""
    torch.set_num_threads(1)
    rank = torch.distributed.get_rank()
    model = model_of(name)
    updates = updates_of(name, model, at_rank_size=at_rank_size)
    parameter = dict(model.named_parameters())[BIG]
    torch.manual_seed(rank)
    bad = []
    for index, batch in enumerate(batches(4)):
        hook = spoil(parameter, math.nan) if (rank, index) == (1, 2) else None
        (loss_of(model, batch) / 2).backward()
        if hook is not None:
            hook.remove()
        bad.append(parameter in updates.finish().bad)
    found = {key: value for key, value in everything(model, updates).items() if torch.is_tensor(value)}
    return found | {"bad": torch.tensor(bad)}


@pytest.mark.parametrize(
    "name, at_rank_size",
    [("adamw", False), ("galore_adamw", True), ("galore_adamw", False), ("q_galore_adamw8bit_per_layer", True)],
)
def test_every_rank_skips_what_is_bad_on_one(name, at_rank_size):
    one, other = run_distributed(bad_on_one_rank, name, at_rank_size)
    assert one["bad"].tolist() == [False, False, True, False]
    assert not differences(one, other, ignore=())
    assert all(value.isfinite().all() for value in one.values())


def test_a_loss_that_is_not_finite_spoils_every_gradient():
    """Here it is infinite, while each gradient by itself would be finite."""
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [-math.inf]], requires_grad=True)
    loss = head_loss_sum(hidden, weight, torch.tensor([1, 1]))
    assert loss == math.inf
    loss.backward()
    assert hidden.grad.isnan().all() and weight.grad.isnan().all()
