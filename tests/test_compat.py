"""The packages' names: their READMEs' snippets, their numbers, their arguments."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from support.contract import data_of, same, train, weights
from support.models import Model, loss_of

from qgalore import compat
from qgalore.compat import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreLion,
    QGaLoreAdamW8bit,
    QGaLoreAdamW8bit_simulate,
    QGaLoreLinear,
    QLinear,
    prepare_model_for_int8_training,
    prepare_model_for_int8_training_simulation,
)
from qgalore.storage.quantized_weight import QuantizedWeight

GALORE = {"rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
Q_GALORE = GALORE | {
    "quant": True, "quant_n_bit": 4, "quant_group_size": 256, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5,
}  # fmt: skip
ARGS = SimpleNamespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
EVERY = [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, GaLoreLion, QGaLoreAdamW8bit, QGaLoreAdamW8bit_simulate]


def groups_of(model: Model, options: dict) -> list[dict]:
    """As in the READMEs: what is not projected comes first."""
    galore_params = [layer.weight for layer in model.mlp if hasattr(layer, "weight")]
    ids = {id(p) for p in galore_params}
    non_galore_params = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": non_galore_params}, {"params": galore_params, **options}]


@pytest.mark.parametrize("kind", EVERY)
def test_the_readmes_groups_train(kind):
    model, data = Model(), data_of(1) * 25
    options = Q_GALORE if kind.__name__.startswith("Q") else GALORE
    losses = train(model, kind(groups_of(model, options), lr=0.01), data)
    assert losses[-1] < 0.8 * losses[0]


def test_the_readmes_updates_per_layer_train_every_parameter():
    """One optimizer for each parameter, a rank for all of them, vectors included."""
    model, data = Model(), data_of(1) * 25
    optimizer_dict, before = {}, weights(model)
    for p in model.parameters():
        if p.requires_grad:
            optimizer_dict[p] = GaLoreAdamW([{"params": p, **GALORE}], lr=0.05)

    def optimizer_hook(p):
        if p.grad is None:
            return
        optimizer_dict[p].step()
        optimizer_dict[p].zero_grad()

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(optimizer_hook)
    losses = []
    for batch in data:
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(p, q) for p, q in zip(before, weights(model), strict=True))


class Reference:
    """galore_torch's AdamW for one matrix, in float64, from its description: the left basis by SVD every gap updates,
    moments that stay as they are, eps added before the bias is corrected, no weight decay."""

    def __init__(self, W, *, lr, eps, gap, rank, scale, correct_bias):
        self.W, self.lr, self.eps, self.gap, self.rank, self.scale = W.double().clone(), lr, eps, gap, rank, scale
        self.correct_bias, self.t, self.m, self.v = correct_bias, 0, 0.0, 0.0

    def step(self, G):
        if self.t % self.gap == 0:
            U = torch.linalg.svd(G, full_matrices=False).U[:, : self.rank]
            self.P = U * torch.stack([column[column.abs().argmax()] for column in U.T]).sign()  # the same basis
        R = self.P.T @ G
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * R, 0.999 * self.v + 0.001 * R**2
        size = self.lr
        if self.correct_bias:
            size *= (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
        self.W -= self.scale * self.P @ (size * self.m / (self.v.sqrt() + self.eps))


@pytest.mark.parametrize("correct_bias, eps, error", [(True, 0.0, 1e-12), (True, 1e-6, 2e-6), (False, 1e-6, 1e-12)])
def test_with_svd_and_keep_the_numbers_are_the_packages(correct_bias, eps, error):
    """50 updates, 5 bases. All of the difference is eps, which comes after the correction of the bias here."""
    p = torch.nn.Parameter(torch.randn(24, 40, dtype=torch.float64))
    options = {**GALORE, "update_proj_gap": 10, "subspace": "svd", "moments_on_refresh": "keep"}
    optimizer = GaLoreAdamW([{"params": [p], **options}], 0.01, (0.9, 0.999), eps, 0.0, correct_bias, True)
    reference = Reference(p.detach(), lr=0.01, eps=eps, gap=10, rank=4, scale=0.25, correct_bias=correct_bias)
    for _ in range(50):
        p.grad = (torch.randn(24, 4) @ torch.randn(4, 40) + 0.1 * torch.randn(24, 40)).double()
        reference.step(p.grad)
        optimizer.step()
    assert optimizer.refreshes(p)["refreshes"] == 5
    assert (p.detach() - reference.W).abs().max() < error


def test_the_arguments_have_the_packages_places_and_defaults():
    p = torch.nn.Parameter(torch.randn(8, 8))
    group = GaLoreAdamW([p], 0.1, (0.8, 0.9), 1e-5, 0.3).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-5, 0.3)
    expected = {  # lr, betas, eps, weight decay
        GaLoreAdamW: (1e-3, (0.9, 0.999), 1e-6, 0.0),
        GaLoreAdamW8bit: (1e-3, (0.9, 0.999), 1e-8, 1e-2),
        QGaLoreAdamW8bit: (1e-3, (0.9, 0.999), 1e-8, 1e-2),
        GaLoreLion: (1e-4, (0.9, 0.99), 1e-8, 0.0),
    }
    for kind, values in expected.items():
        group = kind([p]).param_groups[0]
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == values
    assert GaLoreAdamW8bit([p]).param_groups[0]["state_bits"] == 8
    assert GaLoreAdafactor([p], lr=0.1).param_groups[0]["rule"] == "adafactor"


def test_the_packages_keys_arrive():
    p = torch.nn.Parameter(torch.randn(32, 48))
    (group,) = QGaLoreAdamW8bit([{"params": [p], **Q_GALORE, "dim": 2}]).param_groups
    assert (group["proj_bits"], group["proj_group_size"], group["cos_threshold"], group["state_bits"]) == (
        4,
        256,
        0.4,
        8,
    )
    assert QGaLoreAdamW8bit([{"params": [p], **GALORE}]).param_groups[0]["cos_threshold"] == 0.6
    assert GaLoreAdamW([{"params": [p], **GALORE}]).param_groups[0]["cos_threshold"] is None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: GaLoreAdafactor([p]), "give it lr="),
        (lambda p: GaLoreAdafactor([p], lr=0.1, relative_step=False), "scale_parameter=False"),
        (lambda p: GaLoreAdafactor([p], 0.1, (1e-30, 1e-3), 2.0), "clip_threshold=2.0 is not supported, only 1.0"),
        (lambda p: GaLoreAdamW8bit([p], amsgrad=True), "GaLoreAdamW8bit: amsgrad=True"),
        (lambda p: QGaLoreAdamW8bit([p], percentile_clipping=5), "QGaLoreAdamW8bit: percentile_clipping=5"),
        (lambda p: GaLoreAdamW([{"params": [p], "rank": 4, "dim": 4}]), "'dim'"),
        (lambda p: GaLoreAdamW([{"params": [p], "rank": 4, "update_proj_gab": 4}]), "Did you mean 'update_proj_gap'"),
        (lambda p: GaLoreAdamW([{"params": [p, torch.nn.Parameter(torch.ones(3))], "rank": 2}]), "matrices only"),
    ],
)
def test_what_would_not_happen_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.nn.Parameter(torch.randn(8, 8)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_copies_and_states_go_on(copied):
    """Two updates, a copy and a state dict, two more; and a group that is added later is the twin's own kind."""
    p = torch.nn.Parameter(torch.randn(16, 24))
    optimizer = GaLoreAdafactor([{"params": [p], **GALORE}], lr=0.1)
    gradients = torch.randn(4, 16, 24).unbind()
    for G in gradients[:2]:
        p.grad = G
        optimizer.step()
    twin, q = copied(optimizer), torch.nn.Parameter(p.detach().clone())
    loaded = GaLoreAdafactor([{"params": [q], **GALORE}], lr=0.5)
    loaded.load_state_dict(optimizer.state_dict())
    results = []
    for each in (optimizer, twin, loaded):
        for G in gradients[2:]:
            each.param_groups[0]["params"][0].grad = G
            each.step()
        results.append(each.param_groups[0]["params"][0].detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    twin.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert twin.param_groups[1]["rule"] == "adafactor"


@pytest.mark.parametrize(
    "prepare, kind, optimizer",
    [
        (prepare_model_for_int8_training, QGaLoreLinear, QGaLoreAdamW8bit),
        (prepare_model_for_int8_training_simulation, QLinear, QGaLoreAdamW8bit_simulate),
    ],
)
def test_int8_training_by_the_packages_names(prepare, kind, optimizer, tmp_path):
    model, data = Model(), data_of(1) * 25
    assert prepare(model, ARGS, ["0", "1"]) is model
    layers = [layer for layer in model.modules() if isinstance(layer, kind)]
    assert layers and all(isinstance(layer.weight.data, QuantizedWeight) for layer in layers)
    losses = train(model, optimizer(groups_of(model, Q_GALORE), lr=0.01), data)
    assert losses[-1] < 0.8 * losses[0]
    compat.saving_model_weight(model, tmp_path / "model.bin")
    other = compat.load_model_weight(prepare(Model(), ARGS, ["0", "1"]), tmp_path / "model.bin")
    assert same(weights(model), weights(other))


def test_codes_and_simulation_train_to_the_same_bits():
    model, data = Model(), data_of(8)
    twin = copy.deepcopy(model)
    prepare_model_for_int8_training(model, ARGS, ["0", "1"])
    prepare_model_for_int8_training_simulation(twin, ARGS, ["0", "1"])
    ours = train(model, QGaLoreAdamW8bit(groups_of(model, Q_GALORE)), data)
    assert ours == train(twin, QGaLoreAdamW8bit_simulate(groups_of(twin, Q_GALORE)), data)


def test_a_layer_by_hand_is_its_linear_layer_rounded():
    linear = torch.nn.Linear(32, 16)
    layer = QGaLoreLinear(linear.weight, linear.bias, num_bits=8, group_size=16)
    x = torch.randn(5, 32)
    assert torch.equal(layer.bias, linear.bias)
    assert 0 < (layer(x) - linear(x)).abs().max() < 0.02
    layer.weight.backward_hook = print
    with pytest.raises(RuntimeError, match="use p.register_post_accumulate_grad_hook"):
        layer(x)


def test_a_shared_weight_is_not_torn_from_its_twin():
    model = torch.nn.ModuleDict({"words": torch.nn.Embedding(8, 16), "head": torch.nn.Linear(16, 8, bias=False)})
    model["head"].weight = model["words"].weight
    with pytest.raises(ValueError, match="shared with another module"):
        prepare_model_for_int8_training(model, ARGS, ["head"])


def test_paged_moments_are_not_promised():
    with pytest.warns(UserWarning, match="is_paged has no effect"):
        GaLoreAdamW8bit([torch.nn.Parameter(torch.randn(8, 8))], is_paged=True)
