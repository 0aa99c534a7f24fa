"""The state of an optimizer: saved, loaded, copied, pickled; in anybody's loop, by anybody's saver."""

import copy
import io
import pickle

import pytest
import torch
from support.contract import (
    CONTROL,
    data_of,
    every_dtype,
    every_one_of_ours,
    every_optimizer,
    model_of,
    optimizer_of,
    plain,
    same,
    train,
    weights,
)

from qgalore.optimizer import LowRankOptimizer


def trained(name, *, dtype=torch.float32, count=4, **settings):
    model = model_of(dtype=dtype)
    optimizer = optimizer_of(name, model, **settings)
    train(model, optimizer, data_of(count))
    return model, optimizer


def goes_on_alike(first, second, *, count=4) -> bool:
    """Whether two pairs of model and optimizer make the same updates, to the last bit."""
    for model, optimizer in (first, second):
        train(model, optimizer, data_of(count, seed=2))
    return same(weights(first[0]), weights(second[0]))


def fresh(name, model, **settings):
    """A copy of the model, and a new optimizer over it."""
    twin = copy.deepcopy(model)
    return twin, optimizer_of(name, twin, **settings)


@every_dtype
@every_optimizer
def test_a_saved_state_goes_on(name, dtype):
    """Through a file that is read without trust; every tensor has the dtype that it was saved in."""
    model, optimizer = trained(name, dtype=dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin, restored = fresh(name, model)
    restored.load_state_dict(torch.load(file, weights_only=True))
    if name != CONTROL:  # torch casts bfloat16 parameters' states to bfloat16, where they are already
        pairs = zip(plain(optimizer.state_dict()["state"]), plain(restored.state_dict()["state"]), strict=True)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    assert len(list(plain(restored.state_dict()["state"]))) == len(list(plain(optimizer.state_dict()["state"])))
    assert goes_on_alike((model, optimizer), (twin, restored))


@every_one_of_ours
def test_loading_copies(name):
    """Training on does not change the dict that was loaded. (It does with torch's Adam, which shares its `step`.)"""
    model, optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    twin, restored = fresh(name, model)
    restored.load_state_dict(optimizer.state_dict())
    train(twin, restored, data_of(3))
    assert same(list(plain(saved)), list(plain(optimizer.state_dict())))


@every_dtype
@every_optimizer
def test_a_copy_steps_alike_and_leaves_the_original_alone(name, dtype):
    model, optimizer = trained(name, dtype=dtype)
    twin, copied = copy.deepcopy((model, optimizer))
    before = weights(model)
    train(twin, copied, data_of(2))
    assert same(before, weights(model)) and not same(before, weights(twin))
    twin, copied = copy.deepcopy((model, optimizer))
    assert goes_on_alike((model, optimizer), (twin, copied))


@every_dtype
@every_optimizer
def test_a_pickle_steps_alike(name, dtype):
    model, optimizer = trained(name, dtype=dtype)
    twin, unpickled = pickle.loads(pickle.dumps((model, optimizer)))
    assert goes_on_alike((model, optimizer), (twin, unpickled))


def renamed(state_dict, name_of):
    """The same state with other names for the parameters."""
    return {
        "state": {name_of(index): state for index, state in state_dict["state"].items()},
        "param_groups": [{**g, "params": [name_of(i) for i in g["params"]]} for g in state_dict["param_groups"]],
    }


@pytest.mark.parametrize("name_of", [lambda i: i + 100, lambda i: f"layers.{i}.weight"], ids=["numbers", "names"])
@every_optimizer
def test_parameters_may_have_other_names_in_the_state(name, name_of):
    """torch.distributed.checkpoint calls them by their names in the model."""
    model, optimizer = trained(name)
    twin, restored = fresh(name, model)
    restored.load_state_dict(renamed(copy.deepcopy(optimizer.state_dict()), name_of))
    assert goes_on_alike((model, optimizer), (twin, restored))


@every_optimizer
def test_hooks_before_and_after_loading(name):
    """A hook may hand on another dict; one that runs afterwards sees the state as it will be used."""
    model, optimizer = trained(name)
    twin, restored = fresh(name, model)
    seen = []
    restored.register_load_state_dict_pre_hook(lambda _, given: given["wrapped"])
    restored.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)))
    restored.load_state_dict({"wrapped": copy.deepcopy(optimizer.state_dict())})
    assert seen == [len(optimizer.state)]
    assert goes_on_alike((model, optimizer), (twin, restored))


@every_one_of_ours
def test_numbers_may_come_back_as_tensors(name):
    """Savers that only know tensors make 0-d ones of counts."""
    model, optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state |= {key: torch.tensor(value) for key, value in state.items() if isinstance(value, int)}
    twin, restored = fresh(name, model)
    restored.load_state_dict(saved)
    assert goes_on_alike((model, optimizer), (twin, restored))


@every_one_of_ours
def test_a_state_of_before_an_option_existed_loads(name):
    """Options that its groups do not know have their defaults."""
    model, optimizer = trained(name)
    saved = optimizer.state_dict()
    saved["param_groups"] = [
        {key: value for key, value in group.items() if key not in ("gamma_proj", "queue_size", "clip", "peak_lr")}
        for group in saved["param_groups"]
    ]
    twin, restored = fresh(name, model)
    restored.load_state_dict(saved)
    assert all(group["clip"] == 0 and group["peak_lr"] == group["lr"] for group in restored.param_groups)
    assert goes_on_alike((model, optimizer), (twin, restored))


@every_one_of_ours
def test_the_state_of_another_optimizer_is_refused(name):
    model, optimizer = trained(name)
    groups = [group["params"] for group in optimizer.param_groups]
    other = torch.optim.AdamW([{"params": params} for params in groups])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="not the state of a LowRankOptimizer.*amsgrad"):
        optimizer.load_state_dict(other.state_dict())
    assert same(list(plain(before)), list(plain(optimizer.state_dict())))
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor"])
def test_master_weights_refuse_a_state_without_them(name):
    """What these optimizers keep of bfloat16 weights themselves has no float32 copy to go on from."""
    model = model_of(dtype=torch.bfloat16)
    ours, theirs = optimizer_of(name, model), None
    kind = ours.kind
    options = {"momentum": 0.9} if name == "sgd" else {}
    theirs = kind([{"params": group["params"]} for group in ours.param_groups], **options)
    train(model, theirs, data_of(1))
    with pytest.raises(ValueError, match=f"not the state of {kind.__name__} on master weights"):
        ours.load_state_dict(theirs.state_dict())


@every_optimizer
def test_groups_of_another_number_or_size_are_refused(name):
    model, optimizer = trained(name)
    few, small = optimizer.state_dict(), optimizer.state_dict()
    few["param_groups"] = few["param_groups"][:-1]
    small["param_groups"] = [{**group, "params": group["params"][1:]} for group in small["param_groups"]]
    for wrong in (few, small):
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict(wrong)


@every_one_of_ours
def test_a_gradient_that_is_not_finite_is_no_update(name):
    """Whoever drives the optimizer: nobody need call end_update."""
    model, optimizer = trained(name)
    before = copy.deepcopy((weights(model), optimizer.state_dict()["state"]))
    for p in model.parameters():
        p.grad = torch.full(p.shape, torch.nan)
    optimizer.step()
    assert same(before[0], weights(model))
    ours, theirs = optimizer.state_dict()["state"], before[1]
    bills = ("refreshes", "failed_refreshes", "next_refresh")  # an attempt at a refresh is one that failed
    for index, state in theirs.items():
        for key in state.keys() - set(bills):
            assert same(list(plain(state[key])), list(plain(ours[index][key]))), key
            assert torch.is_tensor(state[key]) or state[key] == ours[index][key], key
    optimizer.zero_grad()
    train(model, optimizer, data_of(2))
    assert all(tensor.isfinite().all() for tensor in weights(model))


@every_dtype
def test_optimizers_of_one_parameter_draw_noise_of_their_own(dtype):
    """As the reference's layer-wise example makes them. Two layers must not round alike, or draw the same basis."""
    torch.manual_seed(0)
    first, second = (torch.nn.Parameter(torch.randn(96, 80).to(dtype)) for _ in range(2))
    twin = torch.nn.Parameter(first.detach().clone())
    grad = torch.randn(96, 80).to(dtype)
    options = {"rank": 8, "state_bits": 8, "proj_type": "random", "update_proj_gap": 2}
    pairs = [(p, LowRankOptimizer([{"params": [p], **options}], lr=0.01)) for p in (first, second, twin)]
    for p, optimizer in pairs:
        p.grad = grad.clone()
        optimizer.step()
    bases = [optimizer.state[p]["left" if "left" in optimizer.state[p] else "right"] for p, optimizer in pairs]
    assert not torch.equal(bases[0], bases[1]) and torch.equal(bases[0], bases[2])
    assert torch.equal(first, twin)
    # It goes on from a checkpoint as it would have gone on, although its weight has changed since.
    copied = torch.nn.Parameter(first.detach().clone())
    restored = LowRankOptimizer([{"params": [copied], **options}], lr=0.01)
    restored.load_state_dict(pairs[0][1].state_dict())
    for p, optimizer in (pairs[0], (copied, restored)):
        for _ in range(5):
            p.grad = grad.clone()
            optimizer.step()
    assert torch.equal(first, copied)
