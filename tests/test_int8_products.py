"""INT8 products: exact on codes, close on values, the same compiled, refused where they cannot be had."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import runs
from torch import nn

from qgalore.storage import int8_products
from qgalore.storage.quantized_weight import QuantizedWeight

TOKENS, IN, OUT = 64, 96, 40


def weight_of(values=None, *, products="all", dtype=torch.float32):
    values = torch.randn(OUT, IN) if values is None else values
    return nn.Parameter(QuantizedWeight.from_float(values, group_size=-1, dtype=dtype, products=products))


def codes_as_floats(rows):
    """What quantize_rows makes of rows, in float64."""
    codes, step = int8_products.quantize_rows(rows)
    return codes.double() * step.double()


@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0])  # zero points in the middle and at both ends
def test_products_are_those_of_the_codes(offset):
    """Nothing but the codes of x and dy is rounded: the twin is their product in float64."""
    weight = weight_of(torch.randn(OUT, IN) + offset)
    W = weight.detach().dequantize().double()
    x, dy = torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT)
    parts = weight.stored().parts
    scale = parts["scale"].double()
    for ours, exact in [
        (int8_products.output(x, **parts), codes_as_floats(x) @ W.mT),
        (int8_products.input_gradient(dy, **parts), codes_as_floats(dy * parts["scale"].mT) @ (W / scale)),
        (int8_products.weight_gradient(dy, x), codes_as_floats(dy.mT) @ codes_as_floats(x.mT).mT),
    ]:
        assert (ours.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(TOKENS, IN), (4, 16, IN)])
def test_a_linear_layer_is_close_to_the_floating_one(dtype, shape):
    weight = weight_of(dtype=dtype)
    bias = torch.randn(OUT, dtype=dtype, requires_grad=True)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = F.linear(x, weight, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    twin = [t.detach().double().requires_grad_() for t in (x, weight.detach().dequantize(), bias)]
    exact = F.linear(*twin)
    exact.backward(dy.double())
    pairs = [(y, exact), *((a.grad, b.grad) for a, b in zip((x, weight, bias), twin, strict=True))]
    for ours, theirs in pairs:
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert 0 <= (ours.double() - theirs).norm() <= 0.02 * theirs.norm()
    assert (y.double() - exact).norm() > 1e-3 * exact.norm(), "no rounding: were these INT8 products?"


def test_forward_leaves_the_backward_pass_in_floating_point():
    x, dy = torch.randn(TOKENS, IN, requires_grad=True), torch.randn(TOKENS, OUT)
    weight = weight_of(products="forward")
    F.linear(x, weight).backward(dy)
    assert torch.allclose(x.grad, dy @ weight.detach().dequantize(), atol=1e-5)
    assert torch.allclose(weight.grad, dy.mT @ x.detach(), atol=1e-5)


def test_rounding_errors_average_out():
    """Unbiased up to the rounding of symmetric codes: over many draws the mean error is far below a single one."""
    weight = weight_of()
    W, parts = weight.detach().dequantize(), weight.stored().parts
    errors = []
    for _ in range(64):
        x = torch.randn(TOKENS, IN)
        errors.append(int8_products.output(x, **parts) - x @ W.mT)
    mean = torch.stack(errors).mean(0)
    assert mean.norm() < 0.3 * errors[0].norm()


@pytest.mark.parametrize("tokens", [8, 16, 63])
def test_sizes_that_the_hardware_does_not_take_are_multiplied_in_floating_point(tokens):
    weight, x = weight_of(), torch.randn(tokens, IN)
    assert torch.equal(F.linear(x, weight), F.linear(x, weight.detach().dequantize()))


def test_large_products_are_made_in_chunks(monkeypatch):
    weight, x, dy = weight_of(), torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT)
    parts = weight.stored().parts

    def products():
        return (
            int8_products.output(x, **parts),
            int8_products.input_gradient(dy, **parts),
            int8_products.weight_gradient(dy, x),
        )

    whole = products()
    monkeypatch.setattr(int8_products, "GPU_ELEMENTS", 16 * IN)
    assert all(torch.equal(a, b) for a, b in zip(products(), whole, strict=True))


@pytest.mark.parametrize("rows", [40, 48, 56, 4096])
def test_no_chunk_is_too_short_for_the_hardware(rows, monkeypatch):
    """17 rows are the fewest: a last chunk of 8 or 16 is made with the one before."""
    monkeypatch.setattr(int8_products, "GPU_ELEMENTS", 16 * IN)
    chunks = int8_products._chunks(torch.empty(rows, IN))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    assert len(chunks) > 1 and chunks[-1].stop - chunks[-1].start >= int8_products._MIN_ROWS


def test_sums_over_many_tokens_do_not_overflow():
    """127 * 127 * 140,000 is above 2**31."""
    ones = torch.ones(140_000, 24)
    torch.testing.assert_close(int8_products.weight_gradient(ones, ones), torch.full((24, 24), 140_000.0))


def test_a_row_that_is_not_finite_stays_not_finite():
    x = torch.randn(TOKENS, IN)
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    y = int8_products.output(x, **weight_of().stored().parts)
    assert not y[3:5].isfinite().any() and y[:3].isfinite().all() and y[5:].isfinite().all()


def test_compiled_and_eager_agree():
    weight, x = weight_of(), torch.randn(TOKENS, IN, requires_grad=True)

    def loss(x):
        return F.linear(x, weight).square().sum()

    def run(function):
        weight.grad = x.grad = None
        value = function(x)
        value.backward()
        return value.detach(), weight.grad, x.grad

    eager = run(loss)
    compiled = run(torch.compile(loss, dynamic=False, fullgraph=True))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().max()))


def test_the_choice_survives_copies():
    weight = weight_of(products="forward")
    for other in (copy.deepcopy(weight), weight.detach(), weight.to(torch.bfloat16), weight.clone()):
        assert other.products == "forward"


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(products="backward"), "forward or all"),
        (dict(bits=4), "8-bit"),
        (dict(group_size=32), "one group a row"),
        (dict(simulation=True), "not simulated"),
    ],
)
def test_what_cannot_be_had_is_refused(wrong, word):
    options = dict(group_size=-1, products="all") | wrong
    with pytest.raises(ValueError, match=word):
        QuantizedWeight.from_float(torch.randn(OUT, IN), **options)


def test_a_cpu_without_vnni_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="VNNI"):
        int8_products.check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    int8_products.check_device(torch.device("cpu"))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_run_learns_as_well_as_with_floating_products(tiny, tmp_path, monkeypatch, compiled):
    """Through the script, with activations recomputed. The losses are near each other, and not the same."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)  # without it the products are only slower
    shared = dict(optimizer="q_galore_adamw8bit_per_layer", rank=8, weight_quant=True, stochastic_round=True, lr=0.01)
    shared |= dict(weight_group_size=-1, num_training_steps=12, activation_checkpointing=True)
    shared |= dict(compile=True) if compiled else {}
    for name, chosen in (("floating", {}), ("forward", {"int8_matmul": "forward"}), ("all", {"int8_matmul": "all"})):
        runs.run(tiny, tmp_path / name, **shared | chosen)
    floating, forward, every = (runs.losses(tmp_path / name) for name in ("floating", "forward", "all"))
    for losses in (forward, every):
        assert losses != floating
        assert losses == pytest.approx(floating, rel=0.02)
    assert every[-1] < floating[0] - 0.3
