"""Updates inside backward against the optimizer that steps after it."""

import copy
import gc
import weakref

import pytest
import torch
from support.gradients import largest_difference
from support.models import Model, batches, loss_of
from torch import nn

from qgalore.factory import Settings, create_optimizer
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates


def optimizer_of(model, **settings) -> LowRankOptimizer:
    chosen = Settings(**{"lr": 0.02, "rank": 4, "update_proj_gap": 6} | settings)
    return create_optimizer("galore_adamw", groups=split_parameters(model), settings=chosen)


def whole(model, data, *, accumulation=1, **settings) -> None:
    updates = WholeModelUpdates(optimizer_of(model, **settings), sync=GradSync())
    for index, batch in enumerate(data, start=1):
        (loss_of(model, batch) / accumulation).backward()
        if index % accumulation == 0:
            updates.finish()


def per_layer(model, data, *, accumulation=1, prepare=lambda optimizer: None, **settings) -> PerLayerUpdates:
    optimizer = optimizer_of(model, **settings)
    prepare(optimizer)
    updates = PerLayerUpdates(optimizer, accumulation=accumulation)
    for index, batch in enumerate(data, start=1):
        (loss_of(model, batch) / accumulation).backward()
        assert all(p.grad is None for p in model.parameters()), "every gradient is freed at once"
        if index % accumulation == 0:
            updates.finish()
    return updates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_accumulation_it_is_the_whole_model_bit_for_bit(dtype):
    """Twenty updates, refreshes included."""
    model, data = Model().to(dtype), batches(20)
    twin = copy.deepcopy(model)
    per_layer(model, data)
    whole(twin, data)
    assert largest_difference(model.parameters(), twin.parameters()) == 0


def test_with_accumulation_it_is_the_whole_model_given_the_same_first_bases():
    """Four micro-batches to an update, 20 updates; later refreshes see the whole gradient in both."""
    model, data = Model(), batches(80)
    twin = copy.deepcopy(model)
    bases = []

    def take_bases(optimizer):
        """Starts the per-layer run from the bases that the whole gradient of the first update gives."""
        for p, state in zip(optimizer.updates, bases, strict=True):
            optimizer.state[p].update(state)
        for update in optimizer.updates.values():
            update.begin_early = lambda update=update: (
                update.begin() and False
            )  # waits for the whole gradient at first, too

    probe = copy.deepcopy(twin)
    optimizer = optimizer_of(probe)
    for batch in data[:4]:
        (loss_of(probe, batch) / 4).backward()
    optimizer.step()
    kept = ("left", "right", "next_refresh", "refreshes")
    bases += [{key: v for key, v in optimizer.state[p].items() if key in kept} for p in optimizer.updates]

    per_layer(model, data, accumulation=4, prepare=take_bases)
    whole(twin, data, accumulation=4)
    assert largest_difference(model.parameters(), twin.parameters()) < 1e-5


def test_only_the_first_bases_differ_with_accumulation():
    """Without that help: the first basis is that of the first micro-batch, and nothing else is special."""
    model, data = Model(), batches(4)
    first = copy.deepcopy(model)
    updates = per_layer(model, data, accumulation=4)
    loss_of(first, data[0]).backward()
    optimizer = optimizer_of(first)
    optimizer.step()
    for p, q in zip(model.parameters(), first.parameters(), strict=True):
        ours, theirs = updates.optimizer.state[p], optimizer.state[q]
        assert ours["step"] == theirs["step"] == 1, "one clock: four micro-batches are one update"
        for side in {"left", "right"} & ours.keys():
            assert torch.allclose(ours[side], theirs[side], atol=1e-4)


@pytest.mark.parametrize("rank", [4, 8])
def test_with_random_bases_accumulation_changes_nothing_from_the_first_update_on(rank):
    """Four micro-batches to an update against all of them at once, refreshes included; no sum is ever in full."""
    model, data = Model(), batches(48)
    twin = copy.deepcopy(model)
    updates = PerLayerUpdates(optimizer_of(model, proj_type="random", rank=rank), accumulation=4)
    whole_updates = WholeModelUpdates(optimizer_of(twin, proj_type="random", rank=rank), sync=GradSync())
    for index, batch in enumerate(data, start=1):
        for driven in (model, twin):
            (loss_of(driven, batch) / 4).backward()
        if index % 4 == 0:
            updates.finish(), whole_updates.finish()
            assert largest_difference(model.parameters(), twin.parameters()) < 1e-5
        else:
            sizes = [(updates.sums[layer.weight].numel(), rank * max(layer.weight.shape)) for layer in model.mlp]
            assert all(held == projected for held, projected in sizes)
    refreshes = [updates.optimizer.state[layer.weight]["refreshes"] for layer in model.mlp]
    assert refreshes == [3, 2], "each matrix at its own time"


@pytest.mark.parametrize("policy", ["project", "keep", "reset"])
def test_a_bad_gradient_where_a_basis_is_drawn_changes_nothing(policy):
    """The next update draws the same basis again; moments that have followed it have no further to go."""
    data, models = batches(9), [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    for model, bad in zip(models, (True, False), strict=True):
        optimizer = optimizer_of(model, proj_type="random", update_proj_gap=4, moments_on_refresh=policy)
        updates, weight = PerLayerUpdates(optimizer), model.mlp[1].weight
        for update, batch in enumerate(data):
            if update == 4:  # its second basis is due
                assert optimizer.updates[weight].projector.due(optimizer.state[weight], step=5)
                if bad:
                    (float("nan") * weight).sum().backward()
                    assert updates.finish().bad == (weight,)
                continue
            loss_of(model, batch).backward()
            updates.finish()
    assert largest_difference(*(model.parameters() for model in models)) < 1e-5


def test_sums_are_of_rank_size_except_where_a_refresh_is_due():
    model, data = Model(), batches(28)
    optimizer = optimizer_of(model)
    updates = PerLayerUpdates(optimizer, accumulation=2)
    matrices = [layer.weight for layer in model.mlp]
    whole_at = {p: [] for p in matrices}
    for update in range(1, 15):
        (loss_of(model, data[2 * update - 2]) / 2).backward()
        for p in matrices:
            assert updates.sums[p].numel() in (4 * max(p.shape), p.numel())
            if updates.sums[p].shape == p.shape:
                whole_at[p].append(update)
        assert updates.sums[model.embedding.weight].shape == model.embedding.weight.shape
        (loss_of(model, data[2 * update - 1]) / 2).backward()
        assert not updates.sums, "after the last micro-batch nothing is left"
        updates.finish()
    assert list(whole_at.values()) == [[4, 10], [7, 13]], "each matrix at its own time"


def test_clipping_is_by_each_parameters_own_norm():
    """A gradient a thousand times too large moves the moments no more than one of norm `clip`."""
    model = Model()
    updates = PerLayerUpdates(optimizer_of(model), clip=0.5)
    (1000 * loss_of(model, batches(1)[0])).backward()
    for p in model.parameters():
        assert (updates.optimizer.state[p]["exp_avg"] / 0.1).norm().item() == pytest.approx(0.5, rel=1e-3)
    assert updates.finish().norm > 100, "the norm is that before clipping"


def test_every_parameter_moves_at_the_first_update():
    model = Model()
    before = copy.deepcopy(model)
    per_layer(model, batches(1))
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_removed_hooks_leave_gradients_alone():
    model = Model()
    updates = PerLayerUpdates(optimizer_of(model))
    updates.remove()
    loss_of(model, batches(1)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_another_optimizer_takes_a_models_parameters_over():
    """Its PerLayerUpdates removes the hooks of the first, which would update the model as well."""
    model, (batch,) = Model(), batches(1)
    first, second = PerLayerUpdates(optimizer_of(model)), PerLayerUpdates(optimizer_of(model))
    loss_of(model, batch).backward()
    second.finish()
    assert not first.optimizer.state and first.optimizer.flush is None
    assert all(state["step"] == 1 for state in second.optimizer.state.values())


def test_a_loaded_state_does_not_bring_its_limit_of_norms():
    """The limit is that of this run, and ends with the PerLayerUpdates."""
    saved = PerLayerUpdates(optimizer_of(Model()), clip=1.0).optimizer.state_dict()
    updates = PerLayerUpdates(optimizer_of(Model()), clip=0.5)
    updates.optimizer.load_state_dict(saved)
    assert {group["clip"] for group in updates.optimizer.param_groups} == {0.5}
    updates.remove()
    assert {group["clip"] for group in updates.optimizer.param_groups} == {0.0}
    updates.optimizer.load_state_dict(saved)
    assert {group["clip"] for group in updates.optimizer.param_groups} == {1.0}, "as any option of a group"


def test_a_model_is_freed_with_its_optimizer():
    model = Model()
    updates = per_layer(model, batches(1))
    left = [weakref.ref(thing) for thing in (next(model.parameters()), updates, updates.optimizer)]
    del model, updates
    gc.collect()
    assert not any(ref() is not None for ref in left)


def test_hooks_that_a_conversion_has_lost_are_noticed():
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    model[0].weight = nn.Parameter(QuantizedWeight.from_float(model[0].weight.detach()))
    updates = PerLayerUpdates(LowRankOptimizer([{"params": list(model.parameters()), "rank": 4}]))
    model.to(torch.bfloat16)
    model(torch.ones(2, 32, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(RuntimeError, match=r"1 parameters have gradients .* then make the optimizer"):
        updates.finish()
