"""Moments in the state of a parameter: opened, written, saved, in 8 bits where that is worth it."""

import pytest
import torch
from support.gradients import relative_error

from qgalore.rules.moments import Moment, MomentKind, create_moments, moment_codec, open_moments
from qgalore.storage.blockwise import Log, Power
from qgalore.storage.rounding import mix_seed
from qgalore.storage.stored import Plain, Stored


def kinds_of(like, **signed):
    """Moments of the shape of a tensor: name=signed."""
    return [MomentKind(name, value, like.shape) for name, value in signed.items()]


def create(state, kinds, *, like, bits, prefix=""):
    create_moments(state, kinds, bits=bits, dtype=like.dtype, device=like.device, prefix=prefix)


def open_one(state, kind, *, like) -> Moment:
    (moment,) = open_moments(state, [kind], dtype=like.dtype, seed=1)
    return moment


def test_a_moment_of_8_bits_takes_a_quarter_of_the_bytes():
    state, like = {}, torch.zeros(100, 100)
    (kind,) = kinds_of(like, exp_avg=True)
    create(state, [kind], like=like, bits=8)
    assert set(state) == {"exp_avg.codes", "exp_avg.scale"}
    assert sum(tensor.nbytes for tensor in state.values()) == 10_000 + 4 * 40
    assert open_one(state, kind, like=like).read().eq(0).all()


@pytest.mark.parametrize("shape, bits", [((63, 65), 8), ((100_000,), 8), ((100, 100), 32)])
def test_small_ones_and_vectors_stay_as_they_are(shape, bits):
    state, like = {}, torch.randn(shape)
    (kind,) = kinds_of(like, exp_avg=True)
    create(state, [kind], like=like, bits=bits)
    assert state["exp_avg"].dtype == torch.float32 and state["exp_avg"].eq(0).all()
    moment = open_one(state, kind, like=like)
    values = moment.read().add_(like)
    assert values is state["exp_avg"], "worked on in place"
    moment.write(values)
    moment.write(like * 2)
    assert torch.equal(state["exp_avg"], like * 2)


@pytest.mark.parametrize("shape, packed", [((64, 64), True), ((63, 65), False), ((1, 4096), True), ((4096,), False)])
def test_matrices_are_packed_from_4096_elements_on(shape, packed):
    kind = MomentKind("exp_avg", False, torch.Size(shape))
    assert moment_codec(kind, bits=8, dtype=torch.float32) == (Log() if packed else Plain(torch.float32))
    assert moment_codec(kind, bits=32, dtype=torch.float64) == Plain(torch.float64)


def test_float64_gradients_get_float64_back():
    state, like = {}, torch.randn(100, 100, dtype=torch.float64)
    kind, other = kinds_of(like, exp_avg=True, other=True)
    create(state, [kind], like=like, bits=8)
    moment = open_one(state, kind, like=like)
    moment.write(like)
    assert moment.read().dtype == torch.float64 and relative_error(moment.read(), like) < 0.02
    create(state, [other], like=like, bits=32)
    assert state["other"].dtype == torch.float64


def test_writing_reaches_the_state_and_survives_a_file(tmp_path):
    state, like = {}, torch.randn(100, 100)
    kinds = kinds_of(like, exp_avg=True, exp_avg_sq=False)
    create(state, kinds, like=like, bits=8)
    for kind in kinds:
        open_one(state, kind, like=like).write(like if kind.signed else like.square())
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for kind in kinds:
        values = open_one(loaded, kind, like=like).read()
        assert torch.equal(values, open_one(state, kind, like=like).read())
        assert relative_error(values, like if kind.signed else like.square()) < (0.02 if kind.signed else 0.06)


def test_moments_of_one_parameter_round_with_different_noise():
    state, like = {}, torch.rand(100, 100)
    kinds = kinds_of(like, one=True, two=True)
    create(state, kinds, like=like, bits=8)
    for moment in open_moments(state, kinds, dtype=torch.float32, seed=1):
        moment.write(like)
    nearest = Stored.zeros(Power(), like.shape, device="cpu")
    nearest.write(like)
    moved = [state[f"{name}.codes"] != nearest.parts["codes"] for name in ("one", "two")]
    assert 0.4 < (moved[0] == moved[1]).float().mean() < 0.8


def test_moments_of_a_basis_have_its_side_before_their_names():
    state, like = {}, torch.randn(100, 100)
    kinds = kinds_of(like, exp_avg=True, exp_avg_sq=False)
    create(state, kinds, like=like, bits=8, prefix="left.")
    create(state, kinds, like=like, bits=32, prefix="right.")
    packed = {f"left.exp_avg.{part}" for part in Power.PARTS} | {f"left.exp_avg_sq.{part}" for part in Log.PARTS}
    assert set(state) == packed | {"right.exp_avg", "right.exp_avg_sq"}
    for side, bits in (("left", 8), ("right", 32)):
        moments = open_moments(state, kinds, dtype=torch.float32, seed=1, prefix=f"{side}.")
        for kind, moment in zip(kinds, moments, strict=True):
            moment.write(like if kind.signed else like.square())
            assert relative_error(moment.read(), like if kind.signed else like.square()) < (0.06 if bits == 8 else 1e-7)


def test_compiled_seeds_are_tensors_of_the_same_noise():
    state, like = {}, torch.rand(100, 100)
    kinds = kinds_of(like, exp_avg=True, exp_avg_sq=False)
    create(state, kinds, like=like, bits=8)
    codes = []
    for compiled in (False, True):
        moments = open_moments(state, kinds, dtype=torch.float32, seed=mix_seed(3), compiled=compiled)
        assert all(isinstance(moment.seed, tuple) is compiled for moment in moments)
        for moment in moments:
            moment.write(like)
        codes.append([state[f"{kind.name}.codes"].clone() for kind in kinds])
    assert all(torch.equal(one, other) for one, other in zip(*codes, strict=True))


def test_other_bits_are_refused():
    like = torch.zeros(100, 100)
    with pytest.raises(ValueError, match="8 or 32 bits, not 16"):
        create({}, kinds_of(like, exp_avg=True), like=like, bits=16)
