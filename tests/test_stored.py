"""Stored tensors: each codec alike, rows cut anywhere, descriptions of codecs, and parts as entries of a state."""

import json

import pytest
import torch

from qgalore.storage.affine import Affine, Simulated
from qgalore.storage.blockwise import Log, Power
from qgalore.storage.quantized_weight import open_weight
from qgalore.storage.rounding import mix_seed, seed_tensors
from qgalore.storage.stored import CODECS, Plain, Stored, build_codec, describe_codec, find, part_key, put

# Each with a shape that it can hold, the more awkward the better.
EXAMPLES = [
    (Plain(torch.bfloat16), (37, 5)),
    (Plain(torch.float32), (7,)),
    (Plain(torch.float64), (2, 3, 4)),
    (Affine(8, 43), (37, 129)),
    (Affine(4, 43), (37, 129)),
    (Affine(4, 127, stochastic=False), (60, 5461)),
    (Affine(4, 1), (5, 1)),
    (Simulated(8, 43), (37, 129)),
    (Simulated(4, 43, stochastic=False), (37, 129)),
    (Power(), (37, 5)),
    (Log(), (70, 100)),
]
CASES = pytest.mark.parametrize("codec, shape", EXAMPLES, ids=[f"{codec}-{shape}" for codec, shape in EXAMPLES])


def written(codec, values, *, seed=None, row_start=0):
    stored = Stored.zeros(codec, values.shape, device="cpu")
    stored = Stored(codec, stored.parts, values.shape, row_start)
    stored.write(values, seed=seed)
    return stored


# Every codec


def test_every_codec_has_an_example():
    assert {type(codec) for codec, _ in EXAMPLES} == set(CODECS.values())


@CASES
def test_zeros_read_as_zeros(codec, shape):
    stored = Stored.zeros(codec, torch.Size(shape), device="cpu")
    assert tuple(stored.parts) == codec.PARTS
    assert {name: (part.shape, part.dtype) for name, part in stored.parts.items()} == codec.spec(torch.Size(shape))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = stored.read(dtype)
        assert (values.shape, values.dtype) == (torch.Size(shape), dtype) and values.eq(0).all()


@CASES
def test_writing_is_in_place_and_reading_gives_back_what_was_written(codec, shape):
    values = torch.randn(shape).abs()
    stored = Stored.zeros(codec, torch.Size(shape), device="cpu")
    places = {name: part.data_ptr() for name, part in stored.parts.items()}
    stored.write(values, seed=mix_seed(1))
    assert {name: part.data_ptr() for name, part in stored.tensors().items()} == places
    coarse = getattr(codec, "bits", 8) == 4
    assert (stored.read(torch.float32) - values).norm() <= (0.1 if coarse else 0.02) * values.norm()
    stored.write(torch.zeros(shape), seed=mix_seed(2))
    assert stored.read(torch.float32).eq(0).all()


@CASES
def test_a_seed_as_tensors_rounds_alike(codec, shape):
    values, seed = torch.randn(shape), mix_seed(3)
    one, other = written(codec, values, seed=seed), written(codec, values, seed=seed_tensors(seed))
    assert all(torch.equal(one.parts[name], other.parts[name]) for name in codec.PARTS)


# A shard rounds as it would inside the whole.


CUTS = [
    *((Plain(torch.bfloat16), shape, cut) for shape in [(37, 5), (37,), (9, 2, 3)] for cut in (1, 4, 8)),
    *((codec, (37, 129), cut) for codec in (Affine(8, 43), Affine(4, 43), Simulated(4, 43)) for cut in (1, 2, 23, 36)),
    *((codec, (60, 5461), cut) for codec in (Affine(8, 127), Affine(4, 127)) for cut in (1, 24, 25)),  # in chunks
    *((codec, (16, 6), cut) for codec in (Affine(8, 1), Affine(4, 2), Affine(4, 6)) for cut in (5, 8)),
    *((codec, (70, 100), 64) for codec in (Power(), Log())),
    *((codec, (7, 512), cut) for codec in (Power(), Log()) for cut in (1, 6)),
    *((codec, (12, 128), cut) for codec in (Power(), Log()) for cut in (2, 10)),
]


@pytest.mark.parametrize("codec, shape, cut", CUTS, ids=[f"{codec}-{shape}-{cut}" for codec, shape, cut in CUTS])
def test_rows_can_be_cut_anywhere(codec, shape, cut):
    """Part by part, bit for bit; without row_start, the second shard would repeat the noise of the first."""
    values, seed = torch.randn(shape), mix_seed(5)
    whole = written(codec, values, seed=seed)
    first = written(codec, values[:cut], seed=seed)
    second = written(codec, values[cut:], seed=seed, row_start=cut)
    for name in codec.PARTS:
        assert torch.equal(torch.cat([first.parts[name], second.parts[name]]), whole.parts[name]), name
    read = torch.cat([first.read(torch.float32), second.read(torch.float32)])
    assert torch.equal(read, whole.read(torch.float32))
    to_nearest = [written(codec, values[rows]) for rows in (slice(None), slice(cut), slice(cut, None))]
    for name in codec.PARTS:
        assert torch.equal(torch.cat([shard.parts[name] for shard in to_nearest[1:]]), to_nearest[0].parts[name]), name


@pytest.mark.parametrize("codec", [Plain(torch.bfloat16), Power(), Log()], ids=str)
def test_in_blocks_a_shard_has_the_noise_of_its_place(codec):
    values = torch.rand(24, 96) + 0.1
    whole = written(codec, values, seed=7)
    for cut in (8, 16):
        second = written(codec, values[cut:], seed=None, row_start=cut)
        blocks = second.in_blocks()
        blocks.write(values[cut:].reshape(blocks.shape), seed=7)
        assert torch.equal(second.read(torch.float32), whole.read(torch.float32)[cut:])
    plain = Stored(Plain(torch.float32), {"": values[16:]}, torch.Size((8, 96)), row_start=7)
    assert plain.in_blocks() is None, "it begins within a block, where the noise would be another"


@pytest.mark.parametrize("codec", [Plain(torch.bfloat16), Affine(8, 43), Affine(4, 43), Power()], ids=str)
def test_the_start_of_a_shard_decides_its_noise(codec):
    values = torch.rand(32, 129 if isinstance(codec, Affine) else 128)
    one, other = (written(codec, values, seed=5, row_start=start) for start in (0, 2))
    assert not torch.equal(one.read(torch.float32), other.read(torch.float32))


# Plain tensors


def test_small_updates_of_a_bfloat16_weight_are_not_lost():
    """300 updates of 1/4000 of the weight: to nearest, none would ever register."""
    weight = torch.ones(20_000, dtype=torch.bfloat16)
    for step in range(300):
        open_weight(weight).write(weight.float() + 2.5e-4, seed=mix_seed(0, step))
    assert weight.float().mean().item() == pytest.approx(1.075, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_are_stored_as_they_are(dtype):
    weight, values = torch.zeros(5, dtype=dtype), torch.randn(5, dtype=dtype)
    open_weight(weight).write(values, seed=1)
    assert torch.equal(weight, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_tensor_is_read_as_itself_and_may_be_worked_on_in_place(dtype):
    values = torch.randn(4, 5).to(dtype)
    stored, expected = Stored.of(values), values + 1
    assert stored.read(dtype) is values and stored.tensors() == {"": values}
    stored.write(stored.read(dtype).add_(1), seed=1)
    assert torch.equal(values, expected) and stored.read(torch.float64).dtype == torch.float64


# Descriptions


@CASES
def test_a_description_builds_the_codec_again(codec, shape):
    described = describe_codec(codec)
    if not isinstance(codec, Plain):  # needs no description in a checkpoint; a torch.dtype is not JSON
        described = json.loads(json.dumps(described))
    assert CODECS[described["codec"]] is type(codec)
    assert build_codec(described) == codec and type(build_codec(described)) is type(codec)


def test_other_descriptions_are_refused():
    described = describe_codec(Affine(4, 16))
    assert described == {"codec": "affine", "bits": 4, "group_size": 16, "stochastic": True}
    for bad, error in [({"codec": "other"}, KeyError), ({"taste": 3}, TypeError), ({"bits": 5}, ValueError)]:
        with pytest.raises(error):
            build_codec(described | bad)
    with pytest.raises(KeyError):
        build_codec({"bits": 4, "group_size": 16})


# Entries of a state


@CASES
def test_parts_survive_a_state_and_a_file(codec, shape, tmp_path):
    stored = written(codec, torch.randn(shape), seed=1)
    state = {"step": 3}
    put(state, "right", stored)
    names = {"right"} if isinstance(codec, Plain) else {f"right.{part}" for part in codec.PARTS}
    assert set(state) == {"step"} | names == {"step"} | {part_key("right", part) for part in codec.PARTS}
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    found = find(loaded, "right", codec=codec, shape=torch.Size(shape))
    assert torch.equal(found.read(torch.float32), stored.read(torch.float32))
    found.write(torch.ones(shape))
    again = find(loaded, "right", codec=codec, shape=torch.Size(shape))
    assert (again.read(torch.float32) - 1).abs().max() < 1e-6, "what is written is the state's"
    assert all(loaded[part_key("right", part)] is found.parts[part] for part in codec.PARTS)
    with pytest.raises(KeyError):
        find(loaded, "left", codec=codec, shape=torch.Size(shape))


def test_parts_have_these_names():
    """Checkpoints hold them."""
    names = {name: kind.PARTS for name, kind in CODECS.items()}
    assert names == {
        "plain": ("",),
        "affine": ("codes", "scale", "zero"),
        "simulated": ("values",),
        "power": ("codes", "scale"),
        "log": ("codes", "scale", "steps"),
    }
    assert part_key("left", "codes") == "left.codes" and part_key("exp_avg", "") == "exp_avg"


def test_a_shard_is_found_as_a_shard():
    codec, values, seed = Affine(4, 43), torch.randn(37, 129), mix_seed(5)
    whole, state = written(codec, values, seed=seed), {}
    put(state, "left", Stored.zeros(codec, torch.Size((14, 129)), device="cpu"))
    find(state, "left", codec=codec, shape=torch.Size((14, 129)), row_start=23).write(values[23:], seed=seed)
    assert all(torch.equal(state[f"left.{part}"], whole.parts[part][23:]) for part in codec.PARTS)
