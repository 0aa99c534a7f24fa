"""Moments in the state of a parameter: opened, written, saved, in 8 bits where that is worth it."""

import pytest
import torch
from support.gradients import relative_error

from qgalore.storage.dynamic8 import create_moment, open_moment, quantize_state


def test_a_moment_of_8_bits_takes_a_quarter_of_the_bytes():
    state, like = {}, torch.zeros(100, 100)
    create_moment(state, "exp_avg", like=like, bits=8)
    assert set(state) == {"exp_avg.codes", "exp_avg.absmax"}
    assert sum(tensor.nbytes for tensor in state.values()) == 10_000 + 4 * 40
    assert open_moment(state, "exp_avg", like=like, signed=True).dequantize().eq(0).all()


@pytest.mark.parametrize("shape, bits", [((63, 65), 8), ((100_000,), 8), ((100, 100), 32)])
def test_small_ones_and_vectors_stay_as_they_are(shape, bits):
    state, like = {}, torch.randn(shape)
    create_moment(state, "exp_avg", like=like, bits=bits)
    assert state["exp_avg"].dtype == torch.float32 and state["exp_avg"].eq(0).all()
    moment = open_moment(state, "exp_avg", like=like, signed=True, seed=1)
    values = moment.dequantize().add_(like)
    assert values is state["exp_avg"], "worked on in place"
    moment.copy_(values)
    moment.copy_(like * 2)
    assert torch.equal(state["exp_avg"], like * 2)


def test_float64_gradients_get_float64_back():
    state, like = {}, torch.randn(100, 100, dtype=torch.float64)
    create_moment(state, "exp_avg", like=like, bits=8)
    moment = open_moment(state, "exp_avg", like=like, signed=True, seed=1)
    moment.copy_(like)
    assert moment.dequantize().dtype == torch.float64 and relative_error(moment.dequantize(), like) < 0.02
    create_moment(state, "other", like=like)
    assert state["other"].dtype == torch.float64


def test_writing_reaches_the_state_and_survives_a_file(tmp_path):
    state, like = {}, torch.randn(100, 100)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        create_moment(state, name, like=like, bits=8)
        open_moment(state, name, like=like, signed=signed, seed=1).copy_(like if signed else like.square())
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        values = open_moment(loaded, name, like=like, signed=signed).dequantize()
        assert torch.equal(values, open_moment(state, name, like=like, signed=signed).dequantize())
        assert relative_error(values, like if signed else like.square()) < 0.02


def test_moments_of_one_parameter_round_with_different_noise():
    state, like = {}, torch.rand(100, 100)
    for name in ("one", "two"):
        create_moment(state, name, like=like, bits=8)
        open_moment(state, name, like=like, signed=True, seed=1).copy_(like)
    moved = [state[f"{name}.codes"] != quantize_state(like, signed=True).codes for name in ("one", "two")]
    assert 0.4 < (moved[0] == moved[1]).float().mean() < 0.8


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="8 or 32 bits, not 16"):
        create_moment({}, "exp_avg", like=torch.zeros(100, 100), bits=16)
