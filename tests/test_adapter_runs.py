"""Runs with adapters: interrupted, evaluated, exported, begun with another's weights, on two ranks."""

import pytest
import torch
from safetensors.torch import load_file
from support.adapted_models import LORA, UP_PROJ, build
from support.ranks import run_on_two_ranks
from support.resumed_runs import assert_halves_make_a_whole, checkpoint
from support.runs import losses, record
from transformers import LlamaConfig

import torchrun_main
from peft_pretraining.checkpoint.weights import load_initial_weights
from peft_pretraining.errors import UserError
from peft_pretraining.export.__main__ import export
from peft_pretraining.model.adapters import KINDS
from peft_pretraining.model.build import meta_model


@pytest.mark.parametrize("when, reset_every", [("after", 3), ("at", 4), ("before", 5)])
def test_interrupted_around_a_reset_n_and_n_updates_are_2_n(tiny, tmp_path, when, reset_every):
    flags = dict(peft="relora", rank=4, reset_every=reset_every, restart_warmup_steps=2, warmup_steps=1)
    assert_halves_make_a_whole(tiny, tmp_path, optimizer="adamw" if when != "at" else "adamw8bit_per_layer", **flags)
    rates = [line["lr"] for line in record(tmp_path / "whole", "update")]
    rises = [update for update in range(1, 8) if rates[update] > rates[update - 1]]
    assert rises == [reset_every + 1], "the rate climbs again, in two updates, where the run is long enough"
    file = "model.safetensors"
    saved = [load_file(checkpoint(tmp_path / "whole", update) / file) for update in (4, 8)]
    B = f"{UP_PROJ}.lora_B.default.weight"
    assert saved[0][B].any() == (when != "at"), "the reset belongs to the update that ends the cycle"
    assert saved[1][B].any(), "the last update is no occasion for one"


def test_other_adapters_than_the_checkpoint_s_alter_training(tiny, tmp_path, capsys):
    flags = dict(peft="lora", rank=4, num_training_steps=2)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "one", **flags)) == 0
    for changed in (dict(peft=None), dict(peft="low_rank"), dict(peft_alpha=16)):
        capsys.readouterr()
        there = tiny.flags(tmp_path / "two", continue_from=tmp_path / "one", **flags | changed)
        assert torchrun_main.command_line(there) == 2
        ((name, value),) = changed.items()
        old = {"peft": "lora", "peft_alpha": 32}[name]
        assert f"--{name} {old} -> {value}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_adapters_is_evaluated_and_exported_as_a_plain_model(tiny, tmp_path, kind, capsys):
    flags = dict(peft=kind, rank=4, num_training_steps=9, save_every=5)
    flags |= dict(reset_every=4) if kind == "relora" else {}
    assert torchrun_main.command_line(tiny.flags(tmp_path, **flags)) == 0
    (start,), (end,) = record(tmp_path, "start"), record(tmp_path, "end")
    assert start["parameters"]["total"] == sum(group["elements"] for group in start["groups"])
    trained = {group["name"]: group["trained_by"] for group in start["groups"]}
    assert trained["attention and MLP"].startswith("AdamW, ") and "rank 4" in trained["attention and MLP"]
    assert trained["head"] == "AdamW, full rank"
    moments = sum(group["elements"] for group in start["groups"] if group["name"] != "frozen") * 2 * 4
    assert end["kept_bytes"]["weights"] == start["parameters"]["total"] * 4
    assert moments < end["kept_bytes"]["moments"] < moments + 1000, "two of what is trained, and the steps"

    capsys.readouterr()
    evaluated = ["--eval_only", "--continue_from", str(tmp_path), "--batch_size", "4"]  # rounded as in the run
    assert torchrun_main.command_line(evaluated) == 0
    assert f"perplexity {end['perplexity']:.4f} on 2,000 validation tokens" in capsys.readouterr().out
    folder = checkpoint(tmp_path, 9)
    assert export(folder, tmp_path / "out", verify=True) < 1e-4
    live, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    plain = dict(meta_model(LlamaConfig.from_pretrained(folder)).named_parameters())
    assert live.keys() == exported.keys() == plain.keys()
    assert all(torch.equal(live[name], exported[name]) for name in plain)


def test_lora_begins_with_the_weights_of_a_finished_model(tiny, tmp_path):
    def run(name: str, **flags: object) -> None:
        assert torchrun_main.command_line(tiny.flags(tmp_path / name, **flags)) == 0

    run("one", num_training_steps=40)
    run("two", peft="lora", rank=4, continue_from=tmp_path / "one" / "model")
    assert losses(tmp_path / "two")[0] < 0.7 * losses(tmp_path / "one")[0]
    model = build(LORA)
    with pytest.raises(UserError, match="config"):
        load_initial_weights(model, tmp_path / "nowhere")


def test_activation_checkpointing_changes_nothing(tiny, tmp_path):
    for name, switch in [("with", True), ("without", None)]:
        flags = tiny.flags(tmp_path / name, peft="lora", rank=4, activation_checkpointing=switch)
        assert torchrun_main.command_line(flags) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


@pytest.mark.slow
def test_two_ranks_are_one(tiny, tmp_path):
    shared = dict(total_batch_size=8, peft="relora", rank=4, reset_every=3, warmup_steps=1)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "one", workers=2, **shared)) == 0
    result = run_on_two_ranks(tiny.flags(tmp_path / "two", workers=1, **shared))
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    models = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-2, atol=1e-4)
