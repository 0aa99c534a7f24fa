"""Weights of 8 and 4 bits: their products, how they are written, and parameters among others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.quantized_models import mlp, quantized_mlp
from torch import nn

from qgalore.storage.affine import unpack_nibbles
from qgalore.storage.convert import dequantize_linear_layers, quantize_linear_layers, quantize_module_weight
from qgalore.storage.quantized_weight import QuantizedWeight, open_weight
from qgalore.storage.rounding import mix_seed

BITS = pytest.mark.parametrize("bits", [8, 4])
KINDS = pytest.mark.parametrize(
    "kind",
    [{"bits": bits, "simulation": simulation} for bits in (8, 4) for simulation in (False, True)],
    ids=["8 bits", "8 bits, simulated", "4 bits", "4 bits, simulated"],
)
from_float = QuantizedWeight.from_float


def codes_of(weight):
    """As they count: one a byte, (m, n/g, g)."""
    codes = weight.codes
    if weight.codec.bits == 4:
        codes = unpack_nibbles(codes, width=weight.shape[1]).unflatten(1, (-1, weight.codec.group_size))
    return codes


def part_bytes(weight):
    return {name: part.nbytes for name, part in weight.stored().parts.items()}


# The three products


@KINDS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 5, 95)])
def test_linear_is_the_linear_of_the_dequantized_weight(kind, dtype, tolerance, shape):
    """Its twin in float64: output and all three gradients."""
    weight = nn.Parameter(from_float(torch.randn(40, shape[-1]), group_size=32, dtype=dtype, **kind))
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


@BITS
def test_dequantizing_rounds_once(bits):
    values = torch.randn(16, 64)
    weight = from_float(values, bits=bits, dtype=torch.bfloat16)
    exact = (codes_of(weight).double() - weight.zero.unsqueeze(-1)) * weight.scale.unsqueeze(-1)
    assert torch.equal(weight.float(), exact.flatten(1).float()), "not by way of bfloat16"
    assert torch.equal(weight.to(torch.float32), weight.float())
    assert torch.equal(weight.dequantize(), weight.float().bfloat16())
    assert ((weight.float() - values).abs() <= 0.501 * weight.scale).all()


@BITS
def test_nothing_of_the_weights_size_is_saved_for_backward(bits):
    model, x = quantized_mlp(bits=bits), torch.randn(3, 96)
    shapes = [model[i].weight.codes.shape for i in (0, 2)]
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.extend(tensor.stored().parts.values() if isinstance(tensor, QuantizedWeight) else [tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    floats = [tensor.numel() for tensor in saved if tensor.is_floating_point()]
    assert max(floats) == 3 * 96, "activations only"
    codes = [tensor.untyped_storage().data_ptr() for tensor in saved if tensor.shape in shapes]
    assert codes == [model[i].weight.codes.untyped_storage().data_ptr() for i in (0, 2)], "the codes, not a copy"
    loss.backward()
    assert model[0].weight.grad.shape == (80, 96)


def test_bytes_a_weight():
    values = torch.randn(64, 1024)
    assert part_bytes(from_float(values)) == {"codes": 64 * 1024, "scale": 64 * 4 * 4, "zero": 64 * 4}
    assert part_bytes(from_float(values, bits=4)) == {"codes": 64 * 512, "scale": 64 * 4 * 4, "zero": 64 * 4}
    for bits in (8, 4):
        assert part_bytes(from_float(torch.randn(8, 64), bits=bits, simulation=True)) == {"values": 8 * 64 * 4}


@BITS
def test_other_operations_see_the_values_and_are_differentiable(bits):
    weight = nn.Parameter(from_float(torch.randn(8, 64), bits=bits))
    for penalty in (lambda w: (w**2).sum(), lambda w: w.float().square().sum(), lambda w: (w.T @ w).diagonal().sum()):
        weight.grad = None
        penalty(weight).backward()
        torch.testing.assert_close(weight.grad, 2 * weight.detach().dequantize())


# Writing


@KINDS
def test_write_rounds_stochastically_and_copy_to_nearest(kind):
    weight = from_float(torch.zeros(2000, 64), dtype=torch.bfloat16, **kind)
    values = torch.full((2000, 64), 0.3)
    values[:, 0], values[:, 1] = (-100, 155) if kind["bits"] == 8 else (-6, 9)  # steps of 1
    weight.copy_(values)
    assert set(weight.float()[:, 2:].unique().tolist()) == {0.0}
    open_weight(weight).write(values, seed=mix_seed(1))
    drawn = weight.float()[:, 2:]
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert abs(drawn.mean().item() - 0.3) < 5 * (0.21 / drawn.numel()) ** 0.5
    again = from_float(values, dtype=torch.bfloat16, **kind)
    again.write(values, seed=mix_seed(1))
    assert torch.equal(again.float(), weight.float()), "the seed decides, and nothing else"
    nearest = from_float(values, stochastic=False, **kind)
    nearest.write(values, seed=mix_seed(1))
    assert nearest.float()[:, 2:].abs().max() == 0


@KINDS
def test_many_writes_are_right_on_average(kind):
    """400 seeds: their mean is the value, of each element and, far more closely, of all."""
    values, total = torch.randn(64, 64), torch.zeros(64, 64, dtype=torch.float64)
    weight = from_float(values, group_size=16, **kind)
    steps = from_float(values, group_size=16, bits=kind["bits"]).scale.repeat_interleave(16, dim=1)
    for step in range(400):
        weight.write(values, seed=mix_seed(2, step))
        total += weight.float()
        assert ((weight.float() - values).abs() <= steps * (1 + 1e-4)).all()
    bias, deviation = total / 400 - values, 0.5 * steps / 20  # at most, of the mean of 400 draws
    assert (bias.abs() < 5 * deviation).all()
    assert bias.mean().abs() < 4 * deviation.mean() / 64


@BITS
def test_simulation_is_bit_identical(bits):
    """The same values, outputs and gradients over 20 updates, with and without the codes."""
    real, simulated = (quantized_mlp(bits=bits, group_size=40, simulation=simulation) for simulation in (False, True))
    for step in range(20):
        x = torch.randn(6, 96)
        outputs = []
        for model in (real, simulated):
            model.zero_grad()
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
            for index, p in enumerate(model.parameters()):
                open_weight(p.data).write(p.detach().float() - 1e-4 * p.grad, seed=mix_seed(step, index))
        assert torch.equal(*outputs)
        for p, q in zip(real.parameters(), simulated.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            assert torch.equal(p.detach().float(), q.detach().float())


@KINDS
def test_what_is_not_finite_is_refused_or_stays_visible(kind):
    values = torch.randn(4, 64)
    weight = from_float(values, group_size=16, **kind)
    bad = values.clone()
    bad[1, 20] = float("nan")
    with pytest.raises(ValueError, match="1 of 16 groups hold NaN or infinity"):
        from_float(bad, group_size=16, **kind)
    before = weight.float()
    with pytest.raises(ValueError, match="1 of 16 groups"):
        weight.copy_(bad)
    assert torch.equal(weight.float(), before), "a refused copy changes nothing"
    weight.write(bad, seed=1)  # the hot path does not look, but nothing finite comes out
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
@BITS
def test_arithmetic_in_place_is_refused_while_the_weight_is_trained(write, bits):
    weight = nn.Parameter(from_float(torch.randn(8, 64), bits=bits))
    before = weight.codes.clone()
    with torch.no_grad(), pytest.raises(ValueError, match=r"quantized weights .* weight\.write\(values, seed="):
        write(weight)
    assert torch.equal(weight.codes, before)


@BITS
def test_arithmetic_in_place_rounds_a_frozen_weight_to_nearest(bits):
    weight = nn.Parameter(from_float(torch.randn(8, 64), bits=bits), requires_grad=False)
    expected = weight.float() * 2 + 1
    weight.data.mul_(2).add_(torch.ones(8, 64))
    steps = weight.scale.repeat_interleave(64 // weight.scale.shape[1], dim=1)
    assert ((weight.float() - expected).abs() <= 1.501 * steps).all()
    weight.data += 1
    assert (weight.float() - expected - 1).abs().max() <= 3 * steps.max()


def test_wrong_shapes_and_types_are_refused():
    with pytest.raises(ValueError, match="only a floating-point matrix"):
        from_float(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="only a floating-point matrix"):
        from_float(torch.ones(3))
    with pytest.raises(ValueError, match="cannot store"):
        from_float(torch.ones(3, 8)).write(torch.ones(8), seed=0)
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        from_float(torch.ones(3, 8), bits=3)


def test_a_write_between_forward_and_backward_is_noticed():
    model = quantized_mlp()
    loss = model(torch.randn(3, 96, requires_grad=True)).sum()
    with torch.no_grad():
        model[2].weight.write(torch.randn(48, 80), seed=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# A parameter among others


@KINDS
def test_it_is_a_parameter(kind):
    weight = nn.Parameter(from_float(torch.randn(8, 64), dtype=torch.bfloat16, **kind))
    assert isinstance(weight, nn.Parameter) and weight.is_leaf and weight.requires_grad
    assert (weight.shape, weight.dtype) == ((8, 64), torch.bfloat16)
    name = f"{'simulated ' * kind['simulation']}{kind['bits']} bits, groups of 64"
    assert f"QuantizedWeight((8, 64), torch.bfloat16, {name}" in repr(weight)
    rows = weight.new_zeros(3, 64)  # as fully_shard asks for
    assert type(rows) is QuantizedWeight and rows.shape == (3, 64) and not rows.float().any()
    for dense in (torch.zeros_like(weight), torch.empty_like(weight), weight.new_zeros(8, 64, dtype=weight.dtype)):
        assert type(dense) is torch.Tensor and dense.dtype == torch.bfloat16 and dense.shape == (8, 64)
    assert torch.zeros_like(weight, dtype=torch.float32).dtype == torch.float32
    shared, copies = weight.detach(), (weight.detach().clone(), weight.detach().to(torch.float32))
    weight.data.write(torch.ones(8, 64), seed=0)
    assert (shared.float() == 1).all() and not any((own.float() == 1).all() for own in copies)
    moved = weight.to("meta")
    assert type(moved) is QuantizedWeight and moved.codec == weight.codec
    assert {part.device.type for part in moved.stored().parts.values()} == {"meta"}


@KINDS
def test_state_dict_copies_and_moves_are_bit_exact(kind, tmp_path):
    model = quantized_mlp(**kind)
    with torch.no_grad():
        model[0].weight.write(torch.randn(80, 96), seed=4)  # grids of its own
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = quantized_mlp(**kind)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for twin in (other, copy.deepcopy(model), model.to("cpu", torch.float32)):
        assert type(twin[0].weight) is type(model[0].weight) and isinstance(twin[0].weight, nn.Parameter)
        assert twin[0].weight.codec == model[0].weight.codec
        for i in (0, 2):
            ours, theirs = model[i].weight.stored().parts, twin[i].weight.stored().parts
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = model[0].weight.stored().parts, other[0].weight.stored().parts
    assert all(ours[name].data_ptr() != theirs[name].data_ptr() for name in ours)


@KINDS
def test_another_dtype_changes_the_appearance_alone(kind):
    layer = nn.Linear(64, 8)
    layer.weight = nn.Parameter(from_float(layer.weight, **kind))
    before = layer.weight.float()
    layer.to(torch.bfloat16)
    assert type(layer.weight) is QuantizedWeight and layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.float(), before)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"quantized weights .* model.to\(dtype\), not by model.float"):
        layer.float()  # it assigns to .data, which would leave the codes behind


@BITS
def test_state_dicts_cross_between_floats_and_codes(bits):
    model, floats = quantized_mlp(bits=bits), mlp()
    values = copy.deepcopy(model)
    dequantize_linear_layers(values)
    floats.load_state_dict(values.state_dict())
    assert torch.equal(floats[0].weight, model[0].weight.float()) and type(floats[0].weight) is nn.Parameter
    coarse = quantized_mlp(bits=bits, group_size=16)
    coarse.load_state_dict(floats.state_dict())
    assert (coarse[0].weight.float() - floats[0].weight).abs().max() <= 0.501 * coarse[0].weight.scale.max()


@KINDS
def test_copying_between_kinds(kind):
    """Codes go to codes as they are where the grids are alike; to others go the values, rounded to nearest."""
    weight = from_float(torch.zeros(8, 64), group_size=32, **kind)
    weight.write(torch.randn(8, 64), seed=4)
    same = from_float(torch.zeros(8, 64), group_size=32, stochastic=False, dtype=torch.bfloat16, **kind)
    same.copy_(weight)
    ours, theirs = weight.stored().parts, same.stored().parts
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for other in ({"bits": 8}, {"bits": 4}, {"bits": 8, "simulation": True}, {"bits": 4, "simulation": True}):
        for group_size in (32, 64):
            target = from_float(torch.zeros(8, 64), group_size=group_size, **other)
            target.copy_(weight)
            nearest = from_float(weight.float(), group_size=group_size, **other)
            torch.testing.assert_close(target.float(), nearest.float(), rtol=1e-6, atol=1e-6)
    plain = torch.zeros(8, 64, dtype=torch.float64)
    assert torch.equal(plain.copy_(weight), weight.float().double())


@BITS
def test_module_on_the_meta_device_knows_its_bytes(bits):
    with torch.device("meta"):
        model = nn.Linear(4096, 11008, bias=False)
    quantize_module_weight(model, bits=bits)
    assert sum(part_bytes(model.weight).values()) == 4096 * 11008 * (256 * bits // 8 + 5) // 256


def test_only_selected_layers_are_quantized_and_shared_weights_are_refused():
    model = mlp()
    assert quantize_linear_layers(model, select=lambda name: name == "2") == ["2.weight"]
    assert type(model[0].weight) is nn.Parameter and isinstance(model[2].weight, QuantizedWeight)
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
    weight = from_float(torch.randn(8, 64), group_size=32)
    key = weight._stable_hash_for_caching()
    assert key == from_float(torch.zeros(8, 64), group_size=32)._stable_hash_for_caching()
    others = [
        from_float(torch.zeros(8, 64), group_size=64),
        from_float(torch.zeros(8, 64), group_size=32, dtype=torch.bfloat16),
        from_float(torch.zeros(8, 64), group_size=32, stochastic=False),
        from_float(torch.zeros(4, 64), group_size=32),
        from_float(torch.zeros(8, 64), group_size=32, bits=4),
        from_float(torch.zeros(8, 64), group_size=32, simulation=True),
        from_float(torch.zeros(8, 64), group_size=32, bits=4, simulation=True),
        nn.Parameter(weight),
    ]
    assert len({key, *(other._stable_hash_for_caching() for other in others)}) == 9


@BITS
@pytest.mark.parametrize("index", [3, (slice(None), 0), (2, 5), torch.tensor([1, 6]), slice(0, 2)], ids=str)
def test_items_can_be_set_while_the_weight_is_frozen(index, bits):
    """Rows, columns and elements, of which there is no view: a write to decoded values would be lost."""
    weight = nn.Parameter(from_float(torch.randn(8, 64), bits=bits), requires_grad=False)
    expected = weight.float()
    expected[index] = 0.25
    weight[index] = 0.25
    steps = weight.scale.repeat_interleave(64 // weight.scale.shape[1], dim=1)
    assert ((weight.float() - expected).abs() <= 0.501 * steps).all()
    trained = nn.Parameter(from_float(torch.randn(8, 64), bits=bits))
    with torch.no_grad(), pytest.raises(ValueError, match=r"quantized weights .* weight\.write\(values, seed="):
        trained[index] = 0.25


@BITS
def test_a_gradient_can_be_differentiated(bits):
    """A penalty on the gradient of the input reaches the weight."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    quantized = from_float(torch.randn(8, 64), bits=bits)
    for weight in (quantized.requires_grad_(), quantized.detach().dequantize().requires_grad_()):
        (dx,) = torch.autograd.grad(F.linear(x, weight).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), weight)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("padding_idx", [-1, -3, 2])
def test_padding_is_counted_from_the_end_as_torch_does(padding_idx):
    weight, ids = from_float(torch.randn(8, 64)).requires_grad_(), torch.arange(8)
    plain = weight.detach().dequantize().requires_grad_()
    found = [torch.autograd.grad(F.embedding(ids, w, padding_idx=padding_idx).sum(), w)[0] for w in (weight, plain)]
    assert torch.equal(*found) and not found[0][padding_idx].any()
