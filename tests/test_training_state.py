"""What training continues from, out of a live model and back: equal to the last bit, and never read unchecked."""

import copy
import math
import pickle

import pytest
import torch
from support.checkpoints import Bomb, replace_file
from support.training import CONFIG, Training
from transformers import LlamaConfig

from peft_pretraining.checkpoint.atomic_write import write_checkpoint
from peft_pretraining.checkpoint.files import FILES, Checkpoint
from peft_pretraining.checkpoint.snapshot import restore_model, restore_optimizer, restore_rng
from peft_pretraining.errors import UserError
from peft_pretraining.model.build import build_model
from qgalore.factory import OPTIMIZERS
from qgalore.memory import kept_bytes

CASES = [
    (name, dtype, int8)
    for name, recipe in OPTIMIZERS.items()
    for dtype in (torch.float32, torch.bfloat16)
    for int8 in ((False, True) if recipe.low_rank_engine else (False,))
] + [("q_galore_adamw8bit_per_layer", torch.bfloat16, "simulated")]


@pytest.mark.parametrize(("name", "dtype", "int8"), CASES)
def test_training_resumed_is_training_never_stopped(name, dtype, int8, tmp_path):
    """Four updates, saved, four more, which the restored model does again; the weights it was built with are others."""
    trained = Training(name, dtype=dtype, int8=int8).train(4)
    saved = trained.everything()
    folder = write_checkpoint(tmp_path, trained.snapshot(done=4))
    resumed = Training(name, dtype=dtype, int8=int8, seed=1).restore(folder)
    assert resumed.everything() == saved
    assert resumed.train(4).everything() == trained.train(4).everything() != saved


@pytest.mark.parametrize("settings", [dict(proj_type="full"), dict(subspace="svd"), dict(proj_bits=8), dict(beta1=0.0)])
def test_other_projections_resume_as_exactly(settings, tmp_path):
    trained = Training(**settings).train(4)
    folder = write_checkpoint(tmp_path, trained.snapshot(done=4))
    assert Training(seed=1, **settings).restore(folder).train(3).everything() == trained.train(3).everything()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "int8"), [("adamw", False), ("q_galore_adamw8bit_per_layer", True)])
def test_a_gpu_gets_back_what_it_had(name, int8, tmp_path):
    """Every tensor on its device, the snapshot taken while later updates are queued already, and the generator."""
    kind = dict(dtype=torch.bfloat16, int8=int8, device="cuda")
    trained = Training(name, **kind).train(4)
    saved, snapshot = trained.everything(), trained.snapshot(done=4)
    expected = torch.rand(5, device="cuda")
    trained.train(2)
    folder = write_checkpoint(tmp_path, snapshot)
    assert Training(name, seed=1, **kind).restore(folder).everything() == saved
    restore_rng(Checkpoint.open(folder))
    assert torch.equal(torch.rand(5, device="cuda"), expected)


def test_a_state_without_tensors_is_restored(tmp_path):
    """SGD without momentum keeps None, or nothing."""
    trained = Training("sgd", beta1=0.0, dtype=torch.bfloat16).train(2)
    folder = write_checkpoint(tmp_path, trained.snapshot(done=2))
    assert Training("sgd", beta1=0.0, dtype=torch.bfloat16, seed=1).restore(folder).everything() == trained.everything()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    trained = Training(tied=True).train(2)
    snapshot = trained.snapshot(done=2)
    assert "lm_head.weight" not in snapshot.files["model.safetensors"].tensors
    resumed = Training(tied=True, seed=1).restore(write_checkpoint(tmp_path, snapshot))
    assert resumed.everything() == trained.everything()
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight


@pytest.mark.parametrize(("name", "int8"), [
    ("adamw", False), ("sgd", False), ("galore_adamw", False), ("galore_adamw", True), ("q_galore_adamw8bit", True),
])  # fmt: skip
def test_a_checkpoint_takes_the_bytes_that_training_keeps(name, int8, tmp_path):
    """To the byte; beside them, the names and the generators."""
    training = Training(name, dtype=torch.bfloat16, int8=int8).train(2)
    folder = write_checkpoint(tmp_path, training.snapshot(done=2))
    files = [(folder / f"{kind}.safetensors").read_bytes() for kind in ("model", "optimizer")]
    data = sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)  # without the headers
    assert data == sum(kept_bytes(training.model, training.optimizer).values())
    assert sum((folder / name).stat().st_size for name in FILES) - data < 30_000


def test_a_snapshot_does_not_follow_the_training(tmp_path):
    training, progress = Training("adamw", dtype=torch.bfloat16).train(2), {"done": 2, "losses": [1.0]}
    before = training.everything()
    snapshot = training.snapshot(**progress)
    progress["losses"].append(2.0)
    training.train(2)
    folder = write_checkpoint(tmp_path, snapshot)
    assert Training("adamw", dtype=torch.bfloat16, seed=1).restore(folder).everything() == before
    assert Checkpoint.open(folder).state["losses"] == [1.0]


def test_views_come_back_as_tensors_of_their_own(tmp_path):
    training = Training().train(1)
    weight = training.model.lm_head.weight
    whole = torch.randn(8, 6, 4)
    views = {"part": whole[2:5, ::2], "empty": whole[:0], "number": whole[1, 1, 1]}
    training.optimizer.state[weight].update(views)
    folder = write_checkpoint(tmp_path, training.snapshot(done=1))
    resumed = Training(seed=1).restore(folder)
    state = resumed.optimizer.state[resumed.model.lm_head.weight]
    assert all(torch.equal(state[key], view) for key, view in views.items())
    assert state["part"].is_contiguous() and state["part"].untyped_storage().nbytes() == 3 * 3 * 4 * 4


def test_every_float_comes_back_exactly(tmp_path):
    floats = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, 2.0**-30 + 2.0**-80]
    folder = write_checkpoint(
        tmp_path, Training().snapshot(floats=floats, none=None, nested={"gap": [1, 2.5]}, x=math.nan)
    )
    state = Checkpoint.open(folder).state
    assert [value.hex() for value in state["floats"]] == [value.hex() for value in floats]
    assert math.isnan(state["x"]) and state["none"] is None and state["nested"] == {"gap": [1, 2.5]}
    assert state["format"] == 2


def test_progress_that_cannot_be_kept_is_refused_at_once():
    training = Training()
    with pytest.raises(ValueError, match="must not have the keys optimizer"):
        training.snapshot(optimizer={})
    with pytest.raises(TypeError, match="not JSON serializable"):
        training.snapshot(tensor=torch.zeros(1))


def test_the_generator_goes_on_where_it_was(tmp_path):
    folder = write_checkpoint(tmp_path, Training().snapshot())
    expected = torch.rand(5)
    restore_rng(Checkpoint.open(folder))
    assert torch.equal(torch.rand(5), expected)


def test_config_json_is_the_models_own(tmp_path):
    training = Training()
    folder = write_checkpoint(tmp_path, training.snapshot())
    assert LlamaConfig.from_pretrained(folder).to_json_string() == training.model.config.to_json_string()


@pytest.mark.parametrize(("there", "here", "message"), [
    (dict(), dict(int8=True), "down_proj.weight|q_proj.weight"),
    (dict(int8=True), dict(), "saved as .*group_size.* here unquantized"),
    (dict(int8=True), dict(int8="simulated"), "simulated"),
    (dict(), dict(dtype=torch.bfloat16), r"saved as float32 \(64, 64\), here bfloat16 \(64, 64\)"),
    (dict(), dict(tied=True), "lm_head.weight"),
])  # fmt: skip
def test_a_model_of_another_kind_is_refused(there, here, message, tmp_path):
    folder = write_checkpoint(tmp_path, Training(**there).snapshot())
    with pytest.raises(UserError, match=message) as error:
        restore_model(Training(**here).model, Checkpoint.open(folder))
    assert "\n" not in str(error.value) and "Resume with the flags" in str(error.value)


def test_a_model_of_another_shape_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, Training().snapshot())
    config = copy.deepcopy(CONFIG)
    config.vocab_size = 65
    with pytest.raises(UserError, match=r"embed_tokens.weight saved as float32 \(64, 64\), here float32 \(65, 64\)"):
        restore_model(build_model(config, device="cpu", dtype=torch.float32, seed=0), Checkpoint.open(folder))


def test_another_optimizer_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, Training("adamw", dtype=torch.bfloat16).train(1).snapshot())
    for other in ("galore_adamw", "adafactor"):
        training = Training(other, dtype=torch.bfloat16)
        names = {p: name for name, p in training.model.named_parameters()}
        with pytest.raises(UserError, match="the optimizer saved as MasterWeights of AdamW, here "):
            restore_optimizer(training.optimizer, Checkpoint.open(folder), names=names)


def test_the_optimizer_of_another_model_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, Training().train(1).snapshot())
    training = Training()
    with pytest.raises(UserError, match="state of other parameters saved as"):
        restore_optimizer(
            training.optimizer, Checkpoint.open(folder), names={training.model.lm_head.weight: "lm_head.weight"}
        )


@pytest.mark.parametrize("agreeing", [False, True])
def test_a_pickle_in_the_place_of_tensors_is_refused_unread(agreeing, tmp_path):
    """Where the manifest knows nothing of it, and where the manifest was made to agree."""
    folder = write_checkpoint(tmp_path, Training().snapshot())
    crafted = pickle.dumps(Bomb(tmp_path / "exploded"))
    replace_file(folder, "model.safetensors", crafted, vouched=agreeing)
    with pytest.raises(UserError, match="not a safetensors file" if agreeing else "bytes where"):
        restore_model(Training().model, Checkpoint.open(folder))
    assert not (tmp_path / "exploded").exists()
