"""Steps, groups, hooks, learning rates: what torch.optim asks of any optimizer."""

import copy
import warnings

import pytest
import torch
from support.contract import (
    CONTROL,
    data_of,
    every_one_of_ours,
    every_optimizer,
    model_of,
    optimizer_of,
    plain,
    same,
    train,
    weights,
)
from support.models import loss_of
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from qgalore.master_weights import MasterWeights
from qgalore.optimizer import LowRankOptimizer
from qgalore.per_layer import PerLayerUpdates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_optimizer
def test_a_closure_is_called_once_with_gradients_enabled(name, dtype):
    model = model_of(dtype=dtype)
    twin = copy.deepcopy(model)
    optimizer, (batch,) = optimizer_of(name, model), data_of(1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert [loss.item()] == train(twin, optimizer_of(name, twin), [batch])
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_optimizer
def test_hooks_around_a_step_run_once(name, dtype):
    """Those of the optimizer, and those of all optimizers, although one may run inside of another."""
    model = model_of(dtype=dtype)
    optimizer, calls = optimizer_of(name, model), []
    handles = [
        register_optimizer_step_pre_hook(lambda stepped, *_: calls.append(("all, before", stepped))),
        register_optimizer_step_post_hook(lambda stepped, *_: calls.append(("all, after", stepped))),
        optimizer.register_step_pre_hook(lambda stepped, *_: calls.append(("before", stepped))),
        optimizer.register_step_post_hook(lambda stepped, *_: calls.append(("after", stepped))),
    ]
    train(model, optimizer, data_of(1))
    for handle in handles:
        handle.remove()
    assert sorted(text for text, _ in calls) == ["after", "all, after", "all, before", "before"]
    assert all(stepped is optimizer for _, stepped in calls)


@every_optimizer
def test_parameters_without_gradient_stay_and_keep_no_state(name):
    model = model_of()
    optimizer = optimizer_of(name, model)
    model.mlp[0].weight.requires_grad_(False)
    before = model.mlp[0].weight.clone()
    train(model, optimizer, data_of(2))
    assert torch.equal(before, model.mlp[0].weight) and not optimizer.state.get(model.mlp[0].weight)


@pytest.mark.parametrize("bits", [None, 8, 4])
@every_optimizer
def test_a_step_at_a_rate_of_zero_changes_no_weight(name, bits):
    """Not a code of a quantized one either, which rounding could move."""
    if bits and not isinstance(optimizer_of(name, model_of()), LowRankOptimizer):
        pytest.skip("weights in 8 or 4 bits are trained by LowRankOptimizers")
    model = model_of(bits=bits)
    optimizer = optimizer_of(name, model)
    train(model, optimizer, data_of(2))
    before, moved = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, data_of(5))
    assert same(before, weights(model))
    states = optimizer.state_dict()["state"]
    assert not list(plain(moved)) or not same(list(plain(moved)), list(plain(states))), "moments go on"


@every_optimizer
def test_the_rate_may_be_a_tensor(name):
    model = model_of()
    twin = copy.deepcopy(model)
    optimizer, reference = optimizer_of(name, model), optimizer_of(name, twin)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    train(model, optimizer, data_of(4))
    train(twin, reference, data_of(4))
    # Products differ in the last bit, which may round a moment of 8 bits to its other neighbour.
    assert all(torch.allclose(a, b, atol=5e-4) for a, b in zip(weights(model), weights(twin), strict=True))


@every_optimizer
def test_a_group_may_come_later(name):
    """It is checked, built and trained as if it had been there from the start."""
    model = model_of()
    twin = copy.deepcopy(model)
    optimizer, reference = optimizer_of(name, model), optimizer_of(name, twin)
    last = {key: value for key, value in reference.param_groups[-1].items() if key != "param_names"}
    if len(reference.param_groups) == 1:  # the control has one group
        last = {"params": last["params"][-1:]}
        reference.param_groups[-1]["params"] = reference.param_groups[-1]["params"][:-1]
    else:
        reference = rebuilt(reference, reference.param_groups[:-1])
    reference.add_param_group(last)
    train(model, optimizer, data_of(4))
    train(twin, reference, data_of(4))
    assert same(weights(model), weights(twin))


def rebuilt(optimizer, groups):
    """An optimizer of the same kind over other groups."""
    return type(optimizer)([{key: value for key, value in group.items()} for group in groups])


def test_master_weights_take_a_group_later():
    model = model_of(dtype=torch.bfloat16)
    first, *others = model.parameters()
    optimizer = MasterWeights(torch.optim.AdamW, [first], lr=0.01)
    optimizer.add_param_group({"params": others, "lr": 0.02})
    before = weights(model)
    train(model, optimizer, data_of(2))
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert {state["master"].dtype for state in optimizer.state.values()} == {torch.float32}


@every_optimizer
def test_what_cannot_be_a_parameter_is_refused(name):
    model = model_of()
    kind = type(optimizer_of(name, model))
    p = torch.nn.Parameter(torch.zeros(3, 3))
    for wrong, error in [([], ValueError), ([1.0], TypeError), (p, TypeError), ([p * 2], ValueError)]:
        with pytest.raises(error):
            kind(wrong)
    optimizer = optimizer_of(name, model)
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [model.head.weight]})


@pytest.mark.parametrize("group, says", [
    ({"maximize": True}, "'maximize'.*not supported"),
    ({"foreach": True, "differentiable": True}, "'differentiable'.*not supported"),
    ({"weigth_decay": 0.1}, "unknown option 'weigth_decay'.*Did you mean 'weight_decay'"),
    ({"rank": 0}, "rank = 0 is out of range"),
    ({"lr": -1.0}, "lr = -1.0 is out of range"),
    ({"lr": float("nan")}, "lr = nan is out of range"),
    ({"betas": (0.9, 1.0)}, "betas"),
    ({"rule": "adma"}, "rule = adma is out of range"),
])  # fmt: skip
def test_what_a_group_cannot_have_is_refused_when_it_is_added(group, says):
    p, q = (torch.nn.Parameter(torch.zeros(3, 3)) for _ in range(2))
    with pytest.raises(ValueError, match=says):
        LowRankOptimizer([{"params": [p], **group}])
    optimizer = LowRankOptimizer([p])
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group({"params": [q], **group})
    assert len(optimizer.param_groups) == 1 and q not in optimizer.updates
    q.grad, p.grad = torch.ones(3, 3), torch.ones(3, 3)
    optimizer.step()
    assert p.all() and not q.any()


def test_complex_parameters_are_refused():
    p = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex"):
        LowRankOptimizer([p])
    with pytest.raises(ValueError, match="complex"):
        MasterWeights(torch.optim.AdamW, [p])
    assert type(MasterWeights.around(torch.optim.AdamW, [{"params": [p]}])) is torch.optim.AdamW


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(16, 8, sparse=True)
    optimizer = LowRankOptimizer(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=1e-4, max_lr=1e-2, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, T_max=5)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_torchs_schedulers_set_the_rates_that_they_set_for_adamw(scheduler, as_tensor):
    """Also a rate that is set by hand before the schedule begins, and one that is a tensor."""
    rates = []
    for kind in (torch.optim.AdamW, LowRankOptimizer):
        p = torch.nn.Parameter(torch.ones(4, 4))
        options = {"lr": torch.tensor(0.02) if as_tensor else 0.02}
        optimizer = kind([p], **options) if kind is LowRankOptimizer else kind([p], foreach=False, **options)
        if not as_tensor:
            optimizer.param_groups[0]["lr"] = 0.03
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the epoch argument that torch's own SequentialLR passes
            schedule = SCHEDULERS[scheduler](optimizer)
            seen = []
            for _ in range(8):
                p.grad = torch.ones_like(p)
                optimizer.step()
                schedule.step()
                seen.append(float(optimizer.param_groups[0]["lr"]))
        rates.append(seen)
        assert "initial_lr" in optimizer.param_groups[0], "the scheduler's, not ours"
    assert rates[0] == pytest.approx(rates[1])


def test_the_constructor_leaves_the_schedulers_key_alone():
    optimizer = LowRankOptimizer([torch.nn.Parameter(torch.ones(4, 4))])
    assert "initial_lr" not in optimizer.param_groups[0]


@every_optimizer
def test_reduce_on_plateau_and_its_state(name):
    model = model_of()
    optimizer = optimizer_of(name, model)
    rate = optimizer.param_groups[0]["lr"]
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 2.0, 3.0):
        train(model, optimizer, data_of(1))
        schedule.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate / 4)


@every_one_of_ours
def test_it_says_how_it_is_set(name):
    optimizer = optimizer_of(name, model_of())
    assert "LowRankOptimizer" in repr(optimizer) and "rule" in repr(optimizer)


@every_optimizer
def test_gradients_are_freed_or_zeroed(name):
    model = model_of()
    optimizer = optimizer_of(name, model)
    loss_of(model, data_of(1)[0]).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_updates_per_layer_in_a_loop_that_does_not_know_them(accumulation):
    """`step` ends an update, also before its last micro-batch; a loop without it is told what to call."""
    model = model_of()
    twin = copy.deepcopy(model)
    optimizer = optimizer_of("galore_adamw_per_layer", model)
    updates = PerLayerUpdates(optimizer, accumulation=accumulation)
    data = data_of(8)
    losses = train(model, optimizer, data)
    assert losses == train(twin, optimizer_of("galore_adamw", twin), data)
    assert same(weights(model), weights(twin))
    for batch in data[:accumulation]:
        loss_of(model, batch).backward()
    with pytest.raises(RuntimeError, match=r"call finish\(\) of the PerLayerUpdates or optimizer.step\(\)"):
        loss_of(model, data[-1]).backward()
    updates.finish()
    loss_of(model, data[0]).backward()
    if accumulation > 1:
        with pytest.raises(RuntimeError, match="1 of 2 micro-batches"):
            updates.finish()


def test_a_closure_may_hold_the_backward_of_updates_per_layer():
    """As in Lightning, whose closures run zero_grad, forward and backward inside of `step`."""
    model = model_of()
    twin, data = copy.deepcopy(model), data_of(6)
    optimizer = optimizer_of("galore_adamw_per_layer", model)
    PerLayerUpdates(optimizer)
    for batch in data:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    train(twin, optimizer_of("galore_adamw", twin), data)
    assert same(weights(model), weights(twin))


@every_one_of_ours
def test_a_scaler_of_mixed_precision_finds_what_it_expects(name):
    """torch.amp.GradScaler divides gradients and skips steps; on a CPU, too."""
    model, optimizer = model_of(), None
    optimizer = optimizer_of(name, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = weights(model)
    scaler.scale(loss_of(model, data_of(1)[0])).backward()
    next(model.parameters()).grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert same(before, weights(model)) and scaler.get_scale() == 2.0**9
    optimizer.zero_grad()
    scaler.scale(loss_of(model, data_of(1)[0])).backward()
    scaler.step(optimizer)
    assert not same(before, weights(model))


def test_the_control_is_among_them():
    assert type(optimizer_of(CONTROL, model_of())) is torch.optim.AdamW
