"""Checkpoints of trained models as transformers folders: the same logits, or one line that says why not."""

import json
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpointed_models import quantize, write_checkpoint
from support.command_line import refusal as program_refusal
from support.runs import shell
from support.tokenizers import train_sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from peft_pretraining.checkpoint.tensor_file import write_tensors
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.export import folder as hf_folder
from peft_pretraining.export.__main__ import command_line, export
from peft_pretraining.model.build import build_model
from peft_pretraining.model.loss import token_loss_sum
from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.param_groups import split_parameters
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.sync import GradSync

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rope_theta=5e4, max_position_embeddings=40
)  # fmt: skip
IDS = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(1))
UP_PROJ = "model.layers.0.mlp.up_proj.weight"

refusal = partial(program_refusal, program=command_line)


def untrained(*, dtype: torch.dtype = torch.float32, **config: object) -> LlamaForCausalLM:
    return build_model(LlamaConfig(**SIZES | config), device="cpu", dtype=dtype, seed=3)


def trained(optimizer: str, *, dtype: torch.dtype, int8: bool = False, **config: object) -> LlamaForCausalLM:
    """A model after five updates."""
    model = untrained(dtype=dtype, **config)
    if int8:
        quantize(model)
    before = model.get_parameter(UP_PROJ).detach().clone()
    settings = Settings(lr=0.02, rank=4, update_proj_gap=2, scale=1.0)
    sync = GradSync()
    built = create_optimizer(optimizer, groups=split_parameters(model), settings=settings, sync=sync)
    updates = create_updates(optimizer, optimizer=built, sync=sync)
    for _ in range(5):
        token_loss_sum(model, IDS[:, :-1], IDS[:, 1:]).backward()
        updates.finish()
    assert (model.get_parameter(UP_PROJ).detach() - before).abs().max() > 0.01, "it has moved"
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of a quantized model, in a run's folder."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = train_sentencepiece(run / "tiny.model")
    return write_checkpoint(quantize(untrained()), run / "checkpoint-00000003", tokenizer=str(tokenizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "optimizer, int8", [("adamw", False), ("galore_adamw", False), ("q_galore_adamw8bit", True)], ids=str
)
@torch.no_grad()
def test_the_exported_model_computes_what_the_live_one_does(optimizer, int8, dtype, tmp_path):
    """In its own dtype to the last bit; in the other, within bfloat16's rounding of a logit."""
    with torch.enable_grad():
        live = trained(optimizer, dtype=dtype, int8=int8)
    assert isinstance(live.get_parameter(UP_PROJ).data, QuantizedWeight) == int8
    checkpoint = write_checkpoint(live, tmp_path / "checkpoint-5")
    expected = live(IDS).logits.float()
    assert export(checkpoint, tmp_path / "own", verify=True) == 0
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert own.dtype == dtype and torch.equal(own(IDS).logits.float(), expected)
    other_dtype = torch.bfloat16 if dtype == torch.float32 else torch.float32
    assert 0 < export(checkpoint, tmp_path / "other", dtype=other_dtype, verify=True)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert other.dtype == other_dtype
    assert (other(IDS).logits.float() - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_simulated_8_bit_weights_are_exported_as_the_real_ones(tmp_path):
    for simulation in (False, True):
        model = quantize(untrained(), simulation=simulation)
        checkpoint = write_checkpoint(model, tmp_path / f"run_{simulation}")
        export(checkpoint, tmp_path / f"out_{simulation}", verify=True)
    real, simulated = (load_file(tmp_path / f"out_{kind}" / "model.safetensors") for kind in (False, True))
    assert real.keys() == simulated.keys()
    assert all(torch.equal(simulated[name], tensor) for name, tensor in real.items())


@torch.no_grad()
def test_tied_and_sharded_models(tmp_path):
    live = untrained(tie_word_embeddings=True).eval()
    export(write_checkpoint(live, tmp_path / "run"), tmp_path / "out", max_shard_size="10KB", verify=True)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 5
    assert max(sum(t.numel() * 4 for t in load_file(shard).values()) for shard in shards) <= 10_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == dict(live.named_parameters()).keys()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, live(IDS).logits)


def test_tensors_are_decoded_one_at_a_time(checkpoint, tmp_path, monkeypatch):
    """When one is asked for, all earlier ones are gone."""
    plain, alive = hf_folder._plain, []

    def decode(weight, *, dtype):
        assert not any(reference() is not None for reference in alive)
        array = plain(weight, dtype=dtype).numpy().copy()
        alive.append(weakref.ref(array))
        return torch.from_numpy(array)

    monkeypatch.setattr(hf_folder, "_plain", decode)
    export(checkpoint, tmp_path / "out")
    assert len(alive) == len(list(untrained().parameters()))


def test_the_tokenizer_comes_along(tmp_path):
    model = train_sentencepiece(tmp_path / "tiny.model", bos_id=3)
    checkpoint = write_checkpoint(untrained(), tmp_path / "run", tokenizer=str(model))
    export(checkpoint, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("the cat sat")["input_ids"] == load_tokenizer(str(model)).encode(["the cat sat"])[0]
    assert loaded.model_max_length == 40
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (3, 1, 0)
    config = LlamaConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.use_cache) == (3, 1, True)


@pytest.mark.parametrize(
    "args, reason",
    [
        ({}, "state.json does not name it"),
        ({"tokenizer": "gone.model"}, "--tokenizer gone.model: no such file"),
        ({"tokenizer": "larger"}, "has 300 tokens, but the model's vocabulary only 64"),
    ],
)
def test_a_tokenizer_that_is_not_to_be_had_is_left_out_aloud(args, reason, tmp_path, capsys):
    if args.get("tokenizer") == "larger":
        larger = train_sentencepiece(tmp_path / "larger.model", byte_fallback=True, vocab_size=300)
        args = {"tokenizer": str(larger)}
    checkpoint = write_checkpoint(untrained(), tmp_path / "run", **args)
    assert command_line([str(checkpoint), str(tmp_path / "out")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the tokenizer is left out: ") and reason in line
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]


def test_verification_notices_a_bit_and_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    def disturb(path, like, *, read, metadata):
        return write_tensors(
            path, like, read=lambda name: read(name) * (1 + 2**-20 * (name == UP_PROJ)), metadata=metadata
        )

    monkeypatch.setattr(hf_folder, "write_tensors", disturb)
    message = refusal([checkpoint, tmp_path / "out", "--verify"], capsys, status=1)
    assert 0 < float(message.removeprefix("the exported logits differ from the trained by ")[:-1]) < 1e-4
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line_and_leave_nothing(checkpoint, tmp_path, capsys):
    full, out = tmp_path / "full", tmp_path / "out"
    full.mkdir()
    (full / "precious.txt").touch()
    for flags, message in [
        ([checkpoint, full], f"{full} exists and is not an empty folder"),
        ([checkpoint, full / "precious.txt"], "exists and is not an empty folder"),
        ([checkpoint, full / "precious.txt" / "out"], "cannot be written"),
        ([tmp_path, out], f"{tmp_path}: no complete checkpoint is there"),
        ([tmp_path / "nowhere", out], "there is no such folder"),
        ([checkpoint], "the following arguments are required: OUT"),
        ([checkpoint, out, "--dtype", "int4"], "invalid choice: 'int4'"),
        ([checkpoint, out, "--max_shard_size", "5 apples"], "--max_shard_size 5 apples: a number with KB, MB"),
    ]:
        assert message in refusal(flags, capsys)
        assert list(tmp_path.iterdir()) == [full] and len(list(full.iterdir())) == 1


def test_damaged_checkpoints_are_refused(tmp_path, capsys):
    folder = write_checkpoint(untrained(), tmp_path / "run")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-9] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert "model.safetensors: its checksum is wrong" in refusal([folder, tmp_path / "out"], capsys)
    (folder / "manifest.json").write_text("{")
    assert "manifest.json: cannot be read (it is not JSON)" in refusal([folder, tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled(checkpoint, tmp_path):
    export(checkpoint, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_the_command_as_the_user_types_it(checkpoint, tmp_path):
    """A run's folder, in a process of its own."""
    command = [sys.executable, "-m", "peft_pretraining.hf_export", str(checkpoint.parent), str(tmp_path / "out")]
    run = shell([*command, "--verify"])
    assert run.returncode == 0 and run.stderr == ""
    difference, files = run.stdout.splitlines()
    assert difference == "verified; the largest difference to a logit as trained: 0"
    assert files.endswith(
        "config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer.model, tokenizer_config.json"
    )
