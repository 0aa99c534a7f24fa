"""INT8 weights: their products, how they are written, and parameters among others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from qgalore.storage.int8_weight import Int8Weight, SimulatedInt8Weight
from support.int8_models import mlp, quantized_mlp
from torch import nn

from qgalore.storage.affine import mix_seed, store_weight
from qgalore.storage.convert import quantize_linear_layers, quantize_module_weight

KINDS = [Int8Weight, SimulatedInt8Weight]


# The three products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 5, 96)])
def test_linear_is_the_linear_of_the_dequantized_weight(kind, dtype, tolerance, shape):
    """Its twin in float64: output and all three gradients."""
    weight = nn.Parameter(kind.from_float(torch.randn(40, 96), group_size=32, dtype=dtype))
    bias = torch.randn(40, dtype=dtype, requires_grad=True)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = F.linear(x, weight, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    twin = [t.detach().double().requires_grad_() for t in (x, weight.detach().dequantize(), bias)]
    F.linear(*twin).backward(dy.double())
    for ours, exact in [
        (y, F.linear(*twin)),
        *((a.grad, b.grad) for a, b in zip((x, weight, bias), twin, strict=True)),
    ]:
        assert type(ours) is torch.Tensor and ours.dtype == dtype
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def test_dequantizing_rounds_once():
    values = torch.randn(16, 64)
    weight = Int8Weight.from_float(values, dtype=torch.bfloat16)
    exact = (weight.codes.double() - weight.zero.unsqueeze(-1)) * weight.scale.unsqueeze(-1)
    assert torch.equal(weight.float(), exact.flatten(1).float()), "not by way of bfloat16"
    assert torch.equal(weight.to(torch.float32), weight.float())
    assert torch.equal(weight.dequantize(), weight.float().bfloat16())
    assert ((weight.float() - values).abs() <= 0.501 * weight.scale).all()


def test_nothing_of_the_weights_size_is_saved_for_backward():
    model, x = quantized_mlp(), torch.randn(3, 96)
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.extend(tensor.parts().values() if isinstance(tensor, Int8Weight) else [tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    floats = [tensor.numel() for tensor in saved if tensor.is_floating_point()]
    assert max(floats) == 3 * 96, "activations only"
    codes = [
        tensor.untyped_storage().data_ptr() for tensor in saved if tensor.dtype == torch.uint8 and tensor.ndim == 3
    ]
    assert codes == [model[i].weight.codes.untyped_storage().data_ptr() for i in (0, 2)], "the codes, not a copy"
    loss.backward()
    assert model[0].weight.grad.shape == (80, 96)


def test_bytes_a_weight():
    weight = Int8Weight.from_float(torch.randn(64, 1024))
    assert weight.stored_bytes() == {"codes": 64 * 1024, "scale": 64 * 4 * 4, "zero": 64 * 4}
    assert sum(SimulatedInt8Weight.from_float(torch.randn(8, 64)).stored_bytes().values()) == 8 * 64 * 4


def test_other_operations_see_the_values_and_are_differentiable():
    weight = nn.Parameter(Int8Weight.from_float(torch.randn(8, 64)))
    for penalty in (lambda w: (w**2).sum(), lambda w: w.float().square().sum(), lambda w: (w.T @ w).diagonal().sum()):
        weight.grad = None
        penalty(weight).backward()
        torch.testing.assert_close(weight.grad, 2 * weight.detach().dequantize())


# Writing


@pytest.mark.parametrize("kind", KINDS)
def test_store_rounds_stochastically_and_copy_to_nearest(kind):
    weight = kind.from_float(torch.zeros(2000, 64), dtype=torch.bfloat16)
    values = torch.full((2000, 64), 0.3)
    values[:, 0], values[:, 1] = -100, 155
    weight.copy_(values)
    assert set(weight.float()[:, 2:].unique().tolist()) == {0.0}
    store_weight(weight, values, seed=mix_seed(1))
    drawn = weight.float()[:, 2:]
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert abs(drawn.mean().item() - 0.3) < 5 * (0.21 / drawn.numel()) ** 0.5
    again = kind.from_float(values, dtype=torch.bfloat16)
    again.store_(values, seed=mix_seed(1))
    assert torch.equal(again.float(), weight.float()), "the seed decides, and nothing else"
    nearest = kind.from_float(values, stochastic=False)
    nearest.store_(values, seed=mix_seed(1))
    assert nearest.float()[:, 2:].abs().max() == 0


def test_simulation_is_bit_identical():
    """The same values, outputs and gradients over 20 updates, with and without the codes."""
    real, simulated = quantized_mlp(group_size=40), quantized_mlp(group_size=40, simulation=True)
    for step in range(20):
        x = torch.randn(6, 96)
        outputs = []
        for model in (real, simulated):
            model.zero_grad()
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
            for index, p in enumerate(model.parameters()):
                store_weight(p.data, p.detach().float() - 1e-4 * p.grad, seed=mix_seed(step, index))
        assert torch.equal(*outputs)
        for p, q in zip(real.parameters(), simulated.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            assert torch.equal(p.detach().float(), q.detach().float())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_refused_or_stays_visible(kind):
    values = torch.randn(4, 64)
    weight = kind.from_float(values, group_size=16)
    bad = values.clone()
    bad[1, 20] = float("nan")
    with pytest.raises(ValueError, match="1 of 16 groups hold NaN or infinity"):
        kind.from_float(bad, group_size=16)
    before = weight.float()
    with pytest.raises(ValueError, match="1 of 16 groups"):
        weight.copy_(bad)
    assert torch.equal(weight.float(), before), "a refused copy changes nothing"
    weight.store_(bad, seed=1)  # the hot path does not look, but nothing finite comes out
    assert not weight.float()[1, 16:32].isfinite().any()
    with pytest.raises(ValueError, match="layer 7: 1 of 16 groups"):
        weight.check_finite(name="layer 7")


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.zero_(),
        lambda w: torch.add(torch.ones(8, 64), 1, out=w),
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: nn.init.normal_(w),
    ],
)
def test_arithmetic_in_place_is_refused(write):
    weight = Int8Weight.from_float(torch.randn(8, 64))
    before = weight.codes.clone()
    with pytest.raises(ValueError, match="store_weight"):
        write(weight)
    assert torch.equal(weight.codes, before)


def test_wrong_shapes_and_types_are_refused():
    with pytest.raises(ValueError, match="only a floating-point matrix"):
        Int8Weight.from_float(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="only a floating-point matrix"):
        Int8Weight.from_float(torch.ones(3))
    with pytest.raises(ValueError, match="cannot store"):
        Int8Weight.from_float(torch.ones(3, 8)).store_(torch.ones(8), seed=0)


def test_a_write_between_forward_and_backward_is_noticed():
    model = quantized_mlp()
    loss = model(torch.randn(3, 96, requires_grad=True)).sum()
    with torch.no_grad():
        store_weight(model[2].weight, torch.randn(48, 80), seed=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# A parameter among others


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_parameter(kind):
    weight = nn.Parameter(kind.from_float(torch.randn(8, 64), dtype=torch.bfloat16))
    assert isinstance(weight, nn.Parameter) and weight.is_leaf and weight.requires_grad
    assert (weight.shape, weight.dtype) == ((8, 64), torch.bfloat16)
    assert kind.__name__ in repr(weight) and "(8, 64)" in repr(weight)
    for dense in (torch.zeros_like(weight), torch.empty_like(weight), weight.new_zeros(8, 64)):
        assert type(dense) is torch.Tensor and dense.dtype == torch.bfloat16 and dense.shape == (8, 64)
    assert torch.zeros_like(weight, dtype=torch.float32).dtype == torch.float32
    shared, own = weight.detach(), weight.detach().clone()
    weight.data.store_(torch.ones(8, 64), seed=0)
    assert (shared.float() == 1).all() and not (own.float() == 1).all()
    moved = weight.to("meta")
    assert type(moved) is kind and {part.device.type for part in moved.parts().values()} == {"meta"}


@pytest.mark.parametrize("simulation", [False, True])
def test_state_dict_copies_and_moves_are_bit_exact(simulation, tmp_path):
    model = quantized_mlp(simulation=simulation)
    with torch.no_grad():
        model[0].weight.store_(torch.randn(80, 96), seed=4)  # grids of its own
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = quantized_mlp(simulation=simulation)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=False))
    for twin in (other, copy.deepcopy(model), model.to("cpu", torch.float32)):
        assert type(twin[0].weight) is type(model[0].weight) and isinstance(twin[0].weight, nn.Parameter)
        for i in (0, 2):
            ours, theirs = model[i].weight.parts(), twin[i].weight.parts()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert other[0].weight.parts().popitem()[1].data_ptr() != model[0].weight.parts().popitem()[1].data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_changes_the_appearance_alone(kind):
    layer = nn.Linear(64, 8)
    layer.weight = nn.Parameter(kind.from_float(layer.weight))
    before = layer.weight.float()
    layer.to(torch.bfloat16)
    assert type(layer.weight) is kind and layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.float(), before)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"model.to\(dtype\), not by model.float"):
        layer.float()  # it assigns to .data, which would leave the codes behind


def test_state_dicts_cross_between_floats_and_codes():
    model, floats = quantized_mlp(), mlp()
    floats.load_state_dict(model.state_dict())
    assert torch.equal(floats[0].weight, model[0].weight.float()) and type(floats[0].weight) is nn.Parameter
    coarse = quantized_mlp(group_size=16)
    coarse.load_state_dict(floats.state_dict())
    assert (coarse[0].weight.float() - floats[0].weight).abs().max() <= 0.501 * coarse[0].weight.scale.max()


def test_module_on_the_meta_device_knows_its_bytes():
    with torch.device("meta"):
        model = nn.Linear(4096, 11008, bias=False)
    quantize_module_weight(model)
    assert sum(model.weight.stored_bytes().values()) == 4096 * 11008 * (256 + 5) // 256


def test_only_selected_layers_are_quantized_and_shared_weights_are_refused():
    model = mlp()
    assert quantize_linear_layers(model, select=lambda name: name == "2") == ["2.weight"]
    assert type(model[0].weight) is nn.Parameter and isinstance(model[2].weight, Int8Weight)
    tied = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "head": nn.Linear(8, 16, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(ValueError, match="head is shared"):
        quantize_linear_layers(tied)
    with pytest.warns(UserWarning, match="groups of 1 only"):
        quantize_module_weight(nn.Linear(257, 4))


def test_frozen_weights_stay_frozen():
    layer = nn.Linear(64, 8).requires_grad_(False)
    quantize_module_weight(layer)
    assert not layer.weight.requires_grad
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.float().sum(0).expand(2, 64))


def test_compile_caches_tell_weights_apart():
    weight = Int8Weight.from_float(torch.randn(8, 64), group_size=32)
    key = weight._stable_hash_for_caching()
    assert key == Int8Weight.from_float(torch.zeros(8, 64), group_size=32)._stable_hash_for_caching()
    others = [
        Int8Weight.from_float(torch.zeros(8, 64), group_size=64),
        Int8Weight.from_float(torch.zeros(8, 64), group_size=32, dtype=torch.bfloat16),
        Int8Weight.from_float(torch.zeros(8, 64), group_size=32, stochastic=False),
        Int8Weight.from_float(torch.zeros(4, 64), group_size=32),
        SimulatedInt8Weight.from_float(torch.zeros(8, 64), group_size=32),
        nn.Parameter(weight),
    ]
    assert len({key, *(other._stable_hash_for_caching() for other in others)}) == 7
