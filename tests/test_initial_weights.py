"""Foreign LLaMAs, written by transformers itself, and our checkpoints: what comes in computes what it did."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpointed_models import quantize, values, write_checkpoint
from support.command_line import message_of
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pretraining.checkpoint.weights import (
    is_checkpoint,
    is_transformers_folder,
    load_initial_weights,
    load_weights,
)
from peft_pretraining.errors import UserError
from peft_pretraining.model.build import build_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.loss import token_loss_sum
from qgalore.storage.affine import Simulated
from qgalore.storage.quantized_weight import QuantizedWeight, open_weight

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
IDS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))


def foreign(folder: Path, *, max_shard_size: str = "5GB", **config: object) -> LlamaForCausalLM:
    """A LLaMA as transformers draws and saves it. Its norms are not all ones, so that their order matters."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def built(*, dtype: torch.dtype = torch.float32, **config: object) -> LlamaForCausalLM:
    return build_model(LlamaConfig(**SIZES | config), device="cpu", dtype=dtype, seed=5)


def refusal(model: LlamaForCausalLM, folder: Path) -> str:
    """The one line that says why, after a look that the model is as it was."""
    before = {name: value.clone() for name, value in values(model).items()}
    message = message_of(lambda: load_initial_weights(model, folder))
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert str(folder) in message
    return message


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Adds, replaces or, with None, drops tensors of a folder's one file. "__" in a name stands for "."."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
        {"max_shard_size": "5KB", "num_key_value_heads": 1},
    ],
    ids=["plain", "grouped-query", "tied", "bias", "sharded"],
)
@torch.no_grad()
def test_a_foreign_llama_computes_here_what_it_does_in_transformers(config, tmp_path):
    theirs = foreign(tmp_path, **config)
    assert len(list(tmp_path.glob("*.safetensors"))) > (10 if "max_shard_size" in config else 0)
    ours = build_model(read_config(tmp_path / "config.json"), device="cpu", dtype=torch.float32, seed=5)
    load_initial_weights(ours, tmp_path)
    assert torch.equal(ours.eval()(IDS).logits, theirs(IDS).logits)
    loss = token_loss_sum(ours, IDS[:, :-1], IDS[:, 1:]) / IDS[:, 1:].numel()
    assert loss.item() == pytest.approx(theirs(IDS, labels=IDS).loss.item(), abs=1e-6)
    if config.get("tie_word_embeddings"):
        assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_other_dtypes_are_rounded_once(tmp_path):
    theirs = foreign(tmp_path)
    ours = built(dtype=torch.bfloat16)
    load_initial_weights(ours, tmp_path)
    for name, value in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), value.bfloat16())


@pytest.mark.parametrize("simulation", [False, True])
def test_8_bit_weights_are_rounded_to_nearest(simulation, tmp_path):
    theirs = foreign(tmp_path)
    ours = quantize(built(), simulation=simulation)
    load_initial_weights(ours, tmp_path)
    for name, value in theirs.named_parameters():
        expected = QuantizedWeight.from_float(value, group_size=16).dequantize() if "proj" in name else value
        assert torch.equal(values(ours)[name], expected)
    assert isinstance(ours.get_parameter(Q_PROJ).data.codec, Simulated) == simulation


def test_a_head_stored_although_it_is_tied(tmp_path):
    theirs = foreign(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lm_head__weight=theirs.lm_head.weight.detach().clone())
    ours = built(tie_word_embeddings=True)
    load_initial_weights(ours, tmp_path)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    rewrite(tmp_path, lm_head__weight=theirs.lm_head.weight.detach() + 1)
    assert "ties lm_head.weight to model.embed_tokens.weight, but the two differ" in refusal(ours, tmp_path)


def test_the_frequencies_of_old_files_are_passed_over(tmp_path):
    theirs = foreign(tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    ours = built()
    load_initial_weights(ours, tmp_path)
    assert all(torch.equal(ours.get_parameter(name), value) for name, value in theirs.named_parameters())


@pytest.mark.parametrize(
    "config, name",
    [
        ({"hidden_size": 40}, "hidden_size"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"num_attention_heads": 2}, "num_attention_heads"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"vocab_size": 64}, "vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_another_architecture_is_named(config, name, tmp_path):
    foreign(tmp_path, **config)
    assert f": {name} is " in refusal(built(), tmp_path)


def test_missing_superfluous_and_misshapen_tensors_are_named(tmp_path):
    theirs = foreign(tmp_path)
    for change, message in [
        ({Q_PROJ: None}, f"{Q_PROJ} missing"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}, "holds model.layers.2.mlp.up_proj.weight, which"),
        ({Q_PROJ: torch.ones(32, 16)}, f"{Q_PROJ} is F32 (32, 16), but the model needs"),
        ({Q_PROJ: torch.ones(32, 32, dtype=torch.int8)}, f"{Q_PROJ} is I8 (32, 32)"),
    ]:
        theirs.save_pretrained(tmp_path)
        rewrite(tmp_path, **change)
        assert message in refusal(built(), tmp_path)


def test_nan_is_named(tmp_path):
    foreign(tmp_path)
    rewrite(tmp_path, **{Q_PROJ: torch.full((32, 32), torch.nan)})
    with pytest.raises(UserError, match="q_proj.weight holds NaN or infinity"):
        load_initial_weights(quantize(built()), tmp_path)


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "model.bin", 7]
)
def test_an_index_cannot_lead_out_of_its_folder(place, tmp_path):
    foreign(tmp_path, max_shard_size="5KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][Q_PROJ] = place
    index.write_text(json.dumps(content))
    assert f"{Q_PROJ} is said to be in {place!r}" in refusal(built(), tmp_path)


def test_damaged_folders(tmp_path):
    foreign(tmp_path, max_shard_size="5KB")
    index, model = tmp_path / "model.safetensors.index.json", built()
    shard = tmp_path / json.loads(index.read_text())["weight_map"][Q_PROJ]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    assert f"{shard}: damaged" in refusal(model, tmp_path)
    shard.unlink()
    assert f"{shard}: no such file" in refusal(model, tmp_path)
    index.write_text('{"weight_map": 1}')
    assert "cannot be read as an index" in refusal(model, tmp_path)
    index.unlink()
    assert "no model.safetensors" in refusal(model, tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"never read")
    assert "is a pickle" in refusal(model, tmp_path) and "save_pretrained" in refusal(model, tmp_path)


def test_the_two_kinds_of_folders_are_told_apart(tmp_path):
    foreign(tmp_path / "theirs")
    write_checkpoint(built(), tmp_path / "ours")
    kinds = {
        name: (is_transformers_folder(tmp_path / name), is_checkpoint(tmp_path / name)) for name in ("theirs", "ours")
    }
    assert kinds == {"theirs": (True, False), "ours": (False, True)}
    assert not is_transformers_folder(tmp_path) and not is_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("simulation", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_weights_of_a_checkpoint_arrive_bit_for_bit(simulation, dtype, tmp_path):
    trained = quantize(built(dtype=dtype), simulation=simulation)
    fresh = quantize(build_model(trained.config, device="cpu", dtype=dtype, seed=6), simulation=simulation)
    load_weights(fresh, write_checkpoint(trained, tmp_path / "checkpoint"))
    for name, parameter in trained.named_parameters():
        mine, theirs = (open_weight(p).tensors() for p in (parameter, fresh.get_parameter(name)))
        assert all(torch.equal(mine[part], theirs[part]) for part in mine)


def test_8_bit_weights_of_a_checkpoint_are_decoded_for_a_model_without_them(tmp_path):
    trained, dense = quantize(built()), built()
    load_weights(dense, write_checkpoint(trained, tmp_path / "checkpoint"))
    assert all(torch.equal(dense.get_parameter(name), value) for name, value in values(trained).items())


def test_8_bit_weights_of_a_checkpoint_are_rounded_to_other_groups(tmp_path):
    trained, coarse = quantize(built()), quantize(built(), group_size=32)
    load_weights(coarse, write_checkpoint(trained, tmp_path / "checkpoint"))
    expected = QuantizedWeight.from_float(values(trained)[Q_PROJ], group_size=32)
    assert torch.equal(coarse.get_parameter(Q_PROJ).data.codes, expected.codes)


def test_load_weights_takes_a_transformers_folder_too(tmp_path):
    theirs, ours = foreign(tmp_path), built()
    load_weights(ours, tmp_path)
    assert torch.equal(ours.get_parameter(Q_PROJ), theirs.get_parameter(Q_PROJ))


AS_SAVED = {"codec": "affine", "bits": 8, "group_size": 16, "dtype": "float32", "stochastic": True}


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"codec": "affine4"}, "cannot be understood"),
        ({"kind": "Int4Weight"}, "cannot be understood"),
        ({"bits": 7}, "cannot be understood"),
        ({"codec": "dynamic"}, "cannot be understood"),
        ({"group_size": 7}, "cannot be in 8 bits in groups of 7"),
        ({"group_size": 32}, "codes is U8"),
        ({"codec": "simulated"}, "model.layers.0.mlp.down_proj.weight.codes"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(entry, message, tmp_path):
    model = quantize(built())
    folder = write_checkpoint(model, tmp_path / "checkpoint")
    path = folder / "model.safetensors"
    table = {name: AS_SAVED | entry
             for name in values(model) if "proj" in name}  # fmt: skip
    save_file(load_file(path), path, metadata={"quantized": json.dumps(table)})
    with pytest.raises(UserError, match=message):
        load_weights(model, folder)
