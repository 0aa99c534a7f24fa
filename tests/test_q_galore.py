"""Q-GaLore as the user starts it: INT8 weights, INT4 bases, 8-bit moments, lazy refresh, per layer."""

import json

import pytest
import torch
from support.ranks import run_on_two_ranks
from support.runs import losses, record

import torchrun_main
from peft_pretraining.training import plan
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage.affine import Affine, Simulated
from qgalore.storage.quantized_weight import QuantizedWeight

ALL_FLAGS = dict(
    optimizer="q_galore_adamw8bit_per_layer",
    proj_quant=True,
    proj_bits=4,
    weight_quant=True,
    weight_bits=8,
    weight_group_size=16,
    stochastic_round=True,
    rank=8,
    update_proj_gap=2,
)


@pytest.fixture(scope="session")
def larger(tiny, tmp_path_factory):
    """The tiny model, wide enough that moments and bases are worth quantizing."""
    config = json.loads(tiny.config.read_text()) | {"hidden_size": 128, "intermediate_size": 192}
    path = tmp_path_factory.mktemp("larger") / "llama_larger.json"
    path.write_text(json.dumps(config))
    return path


def run(tiny, save_dir, **flags) -> None:
    assert torchrun_main.command_line(tiny.flags(save_dir, **ALL_FLAGS | flags)) == 0


def captured_model(monkeypatch) -> list:
    """The models that runs build, for a look inside afterwards."""
    models = []

    def build(*args, **kwargs):
        models.append(original(*args, **kwargs))
        return models[-1]

    original = plan.prepare_model
    monkeypatch.setattr(plan, "prepare_model", build)
    return models


def test_it_learns_and_says_what_it_keeps(tiny, larger, tmp_path, capsys):
    run(tiny, tmp_path, model_config=larger, num_training_steps=40, eval_every=10, lr=0.01)
    evaluations = record(tmp_path, "eval")
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"] < tiny.vocab_size / 2
    (start,) = record(tmp_path, "start")
    assert start["groups"][0]["trained_by"].startswith("INT8 weights, 8-bit AdamW, rank 8 (std), INT4")
    kept = record(tmp_path, "end")[0]["kept_bytes"]
    dense = 2 * tiny.vocab_size * 128 * 4 + 5 * 128 * 4  # float32 embedding, head and norms
    matrices = 2 * (4 * 128 * 128 + 3 * 128 * 192)
    assert kept["weights"] == dense + matrices, "one byte a projected weight"
    assert kept["scales"] == matrices // 16 * 5
    assert kept["accumulators"] == 0
    printed = capsys.readouterr().err
    assert "AdamW would keep" in printed and "refreshes of 14 matrices' bases" in printed
    first, *_, last = record(tmp_path, "subspaces")
    assert len(last["matrices"]) == 14 and last["matrices"][0]["name"] == "model.layers.0.self_attn.q_proj.weight"
    for early, late in zip(first["matrices"], last["matrices"], strict=True):
        assert 1 <= early["refreshes"] <= late["refreshes"] <= 21 and late["failed"] == 0
        assert 0 < early["seconds"] < late["seconds"] and 0 <= late["overlap"] <= 1.2 and late["gap"] >= 2
    assert record(tmp_path, "end")[0]["refreshes"] == sum(m["refreshes"] for m in last["matrices"])


@pytest.mark.parametrize(
    "optimizer, dtype",
    [
        ("q_galore_adamw8bit_per_layer", "float32"),
        ("q_galore_adamw8bit_per_layer", "bfloat16"),
        ("q_galore_muon8bit_per_layer", "float32"),
    ],
)
def test_simulation_gives_the_same_losses_to_the_last_bit(tiny, larger, tmp_path, optimizer, dtype, monkeypatch):
    monkeypatch.setattr("peft_pretraining.model.dtypes.native_bfloat16", lambda device: True)
    models = captured_model(monkeypatch)
    for name, switch in [("int8", None), ("simulated", True)]:
        run(tiny, tmp_path / name, model_config=larger, optimizer=optimizer, simulation=switch, dtype=dtype)
    assert losses(tmp_path / "int8") == losses(tmp_path / "simulated")
    kinds = [{type(p.data.codec) for n, p in model.named_parameters() if "proj" in n} for model in models]
    assert kinds == [{Affine}, {Simulated}]


def test_per_layer_is_the_whole_model(tiny, larger, tmp_path, monkeypatch):
    """With all of it switched on: bit for bit where gradients are multiplied out, and close where they are not."""
    for name, optimizer in [("factored", "q_galore_adamw8bit_per_layer"), ("after", "q_galore_adamw8bit")]:
        run(tiny, tmp_path / name, model_config=larger, optimizer=optimizer, batch_size=4)
    monkeypatch.setattr(PerLayerUpdates, "takes_products", False)
    run(tiny, tmp_path / "inside", model_config=larger, optimizer="q_galore_adamw8bit_per_layer", batch_size=4)
    assert losses(tmp_path / "inside") == losses(tmp_path / "after")
    assert losses(tmp_path / "factored") == pytest.approx(losses(tmp_path / "after"), rel=1e-3)
    assert losses(tmp_path / "factored") != losses(tmp_path / "after")  # so products were used


def test_accumulation_changes_little(tiny, larger, tmp_path):
    """4 x 4 sequences per update against 16 at once: the first bases differ, and the rounding of sums."""
    for batch_size in (4, 16):
        run(tiny, tmp_path / str(batch_size), model_config=larger, batch_size=batch_size, total_batch_size=16)
    one, four = losses(tmp_path / "16"), losses(tmp_path / "4")
    assert four[0] == pytest.approx(one[0], rel=1e-5)
    assert four == pytest.approx(one, rel=0.05)


def test_rounding_to_nearest_is_another_run(tiny, larger, tmp_path):
    for name, switch in [("stochastic", True), ("nearest", None)]:
        run(tiny, tmp_path / name, model_config=larger, stochastic_round=switch)
    assert losses(tmp_path / "stochastic")[0] == losses(tmp_path / "nearest")[0]
    assert losses(tmp_path / "stochastic")[1:] != losses(tmp_path / "nearest")[1:]


def test_the_saved_model_is_an_ordinary_one(tiny, larger, tmp_path, monkeypatch):
    """transformers loads it, and each weight is exactly what the codes stand for."""
    from transformers import AutoModelForCausalLM

    models = captured_model(monkeypatch)
    run(tiny, tmp_path, model_config=larger)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, p in models[0].named_parameters():
        assert torch.equal(saved[name], p.dequantize() if isinstance(p, QuantizedWeight) else p), name


def test_clipping_per_parameter_is_said(tiny, tmp_path, capsys):
    run(tiny, tmp_path, grad_clipping=1.0)
    assert "each parameter's own" in capsys.readouterr().err
    assert record(tmp_path, "start")[0]["grad_norm"] == "all gradients as projected"


def test_two_ranks_are_one(tiny, larger, tmp_path):
    """The reference's INT8 path supports no data parallelism. Here the ranks sum at rank size, inside backward."""
    flags = dict(model_config=larger, total_batch_size=16, workers=2, lr=0.003)
    run(tiny, tmp_path / "one", **flags)
    result = run_on_two_ranks(tiny.flags(tmp_path / "two", **ALL_FLAGS | flags | {"workers": 1}))
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.02)
