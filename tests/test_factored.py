"""Gradients that stay products: what the updates make of them, and what everyone else sees."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qgalore.factored import FactoredGradient, Linear, Product, allow_in_graphs, dense, factors_of, free, takes_product
from qgalore.optimizer import LowRankOptimizer
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.subspace.projector import Projector, projection_sides

TOKENS, WIDTH, OUT, RANK = 40, 24, 32, 4


class Layer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return super().forward(x)
        return Linear.apply(x, self.weight, self.bias)


def layer(*, bits: int | None = None, dtype: torch.dtype = torch.float64) -> Layer:
    torch.manual_seed(0)
    made = Layer(WIDTH, OUT, dtype=dtype)
    if bits:
        made.weight = nn.Parameter(QuantizedWeight.from_float(made.weight.detach(), bits=bits, group_size=WIDTH))
    return made


def input_of(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, TOKENS // 2, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factored(dtype: torch.dtype = torch.float64) -> tuple[FactoredGradient, Tensor]:
    """A product, and its values."""
    dY = torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(1), dtype=dtype)
    X = input_of(2, dtype).flatten(0, 1)
    return FactoredGradient(Product(dY, X)), dY.T @ X


def listening(module: nn.Linear, *, accumulation: int = 1) -> PerLayerUpdates:
    group = {"params": [module.weight], "rank": RANK, "update_proj_gap": 5}
    return PerLayerUpdates(LowRankOptimizer([group], lr=0.01), accumulation=accumulation)


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_a_projection_of_factors_is_that_of_the_gradient(proj_type):
    G, values = factored()
    sides = projection_sides(G.shape, proj_type=proj_type)
    projector, state = Projector(G.shape, G.dtype, sides, RANK, method="random"), {}
    projector.refresh(values, state, step=1)
    R = projector.project(G, projector.open(state))
    assert factors_of(G) is not None, "it was not multiplied out"
    torch.testing.assert_close(R, projector.project(values, projector.open(state)), rtol=1e-12, atol=1e-12)


def test_it_is_multiplied_out_where_that_is_less_work():
    """At full rank, T r (m + n) is more than T m n + r m n for more tokens than rows."""
    G, values = factored()
    projector, state = Projector(G.shape, G.dtype, ("right",), WIDTH, method="random"), {}
    projector.refresh(values, state, step=1)
    R = projector.project(G, projector.open(state))
    assert factors_of(G) is None and torch.equal(R, projector.project(values, projector.open(state)))


def test_to_everyone_else_it_is_the_gradient():
    G, values = factored()
    assert G.shape == values.shape and G.dtype == values.dtype and G.detach().product is G.product
    assert torch.equal(G.norm(), values.norm()) and torch.equal(G + G, 2 * values)
    G.mul_(2)
    assert torch.equal(dense(G), 2 * values) and torch.equal(G.clone(), 2 * values)
    free(G)
    with pytest.raises(RuntimeError, match="used up inside backward: to keep it, clone it in a hook"):
        G.norm()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("bits", [None, 8])
def test_updates_of_a_layer_are_those_of_gradients_multiplied_out(bits, accumulation, monkeypatch):
    """In float64, with a refresh in between. Quantized weights draw the same noise, and a code may fall otherwise."""
    trained = []
    for takes in (True, False):
        monkeypatch.setattr(PerLayerUpdates, "takes_products", takes)
        module = layer(bits=bits)
        updates, before = listening(module, accumulation=accumulation), module.weight.detach().clone()
        assert takes_product(module.weight) == takes
        for seed in range(7 * accumulation):
            (module(input_of(seed)).square().sum() / accumulation).backward()
            if seed % accumulation == accumulation - 1:
                updates.finish()
        trained.append(module.weight.detach() + 0.0)
        assert (trained[-1] - before).norm() > 0.01
    torch.testing.assert_close(*trained, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bits", [None, 8])
def test_compiled_layers_give_what_eager_ones_give(bits):
    """Products for quantized weights; torch wraps no result of a graph that takes ordinary tensors only."""
    allow_in_graphs()
    seen: list[list[Tensor]] = []
    for compiled in (False, True):
        module, gradients = layer(bits=bits, dtype=torch.float32), []
        updates = listening(module)
        module.weight.register_hook(lambda gradient, gradients=gradients: gradients.append(type(gradient)))
        run = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
        for seed in range(3):
            run(input_of(seed, torch.float32)).square().sum().backward()
            updates.finish()
        seen.append([module.weight.detach() + 0.0, gradients])
    (eager, _), (values, kinds) = seen
    torch.testing.assert_close(values, eager, rtol=0, atol=1e-5 if bits is None else 0.02)
    assert set(kinds) == {Tensor if bits is None else FactoredGradient}


def test_a_hook_sees_an_ordinary_gradient():
    module, seen = layer(), []
    listening(module)
    module.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    x = input_of(0)
    module(x).square().sum().backward()
    twin = layer()
    twin(x).square().sum().backward()
    assert type(seen[0]) is Tensor and torch.equal(seen[0], twin.weight.grad)
    assert type(twin.weight.grad) is Tensor, "nobody there takes products"


def test_a_layer_that_is_called_twice():
    module, twin, seen = layer(), layer(), []
    listening(module)
    module.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    for each in (module, twin):
        (each(input_of(0)).sum() + each(input_of(1)).square().sum()).backward()
    assert torch.equal(seen[0], twin.weight.grad)


def test_a_gradient_that_is_differentiated_is_multiplied_out():
    module = layer()
    listening(module)
    loss = module(input_of(0)).square().sum()
    (gradient,) = torch.autograd.grad(loss, module.weight, create_graph=True)
    assert type(gradient) is Tensor and gradient.requires_grad


def test_an_update_takes_fewer_multiplications(monkeypatch):
    """(dY P)^T X: 2 T r (m + n) in place of 2 (T m n + r m n)."""
    found = []
    for takes in (True, False):
        monkeypatch.setattr(PerLayerUpdates, "takes_products", takes)
        module = layer(dtype=torch.float32)
        updates = listening(module)
        for seed in range(2):  # the first has a refresh
            with FlopCounterMode(display=False) as counter:
                module(input_of(seed, torch.float32)).square().sum().backward()
            updates.finish()
        found.append(counter.get_total_flops())
    saved = TOKENS * WIDTH * OUT + RANK * WIDTH * OUT - TOKENS * RANK * (WIDTH + OUT)
    assert found[1] - found[0] == 2 * saved


def test_a_single_row_without_a_dimension_of_tokens():
    module, x = layer(), input_of(5)[0, 0].requires_grad_()
    expected = torch.autograd.grad(nn.functional.linear(x, module.weight, module.bias).sum(), (x, module.weight))
    found = torch.autograd.grad(module(x).sum(), (x, module.weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_copy_of_a_driven_weight_has_an_ordinary_gradient():
    """Nobody uses up the gradient of a copy inside backward."""
    module = layer(bits=8, dtype=torch.float32)
    updates = listening(module)
    copied = copy.deepcopy(module)
    copied(input_of(6, torch.float32)).sum().backward()
    assert type(copied.weight.grad) is Tensor and takes_product(module.weight)
    updates.remove()
