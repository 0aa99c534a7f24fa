"""The whole program on a tiny model and a toy language: what it promises, end to end."""

import json
import math
from importlib.metadata import version

import pytest
import torch
from support.ranks import run_on_two_ranks
from support.runs import losses, record, run
from transformers import AutoModelForCausalLM


def test_a_run_leaves_its_record_and_a_model(tiny, tmp_path):
    flags = dict(optimizer="galore_adamw", rank=8, matrix_lr_ratio=0.5)
    run(tiny, tmp_path, num_training_steps=30, eval_every=10, save_every=20, **flags)
    (start,) = record(tmp_path, "start")
    assert {"args", "versions", "commit", "device", "parameters", "groups"} <= start.keys()
    assert start["args"]["rank"] == 8 and start["versions"]["torch"] == version("torch")
    assert sum(group["elements"] for group in start["groups"]) == start["parameters"]["total"]
    assert {group["trained_by"].split(",")[1] for group in start["groups"]} == {" rank 8 (std)", " full rank"}

    updates = record(tmp_path, "update")
    assert [line["update"] for line in updates] == list(range(1, 31)), "exactly num_training_steps updates"
    fields = {"event", "update", "loss", "lr", "grad_norm", "tokens_seen", "tokens_per_second", "memory_bytes"}
    assert all(line.keys() == fields for line in updates)
    assert [line["tokens_seen"] for line in updates] == [4 * 32 * update for update in range(1, 31)]
    assert all(line["lr"] > 0 for line in updates) and max(line["lr"] for line in updates) == 0.01
    assert updates[-1]["lr"] == pytest.approx(0.001), "min_lr_ratio of the peak, at the last update"

    evaluations = record(tmp_path, "eval")
    assert [line["update"] for line in evaluations] == [10, 20, 30]
    assert all(line["tokens"] == 2000 for line in evaluations)
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"])) for line in evaluations)
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"] < tiny.vocab_size
    (end,) = record(tmp_path, "end")
    assert end["updates"] == 30 and end["tokens_seen"] == 30 * 128 and end["seconds"] > 0
    assert end["perplexity"] == evaluations[-1]["perplexity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-00000020",
        "checkpoint-00000030",
        "config.yaml",
        "metrics.jsonl",
        "model",
    ]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_the_saved_model_is_the_trained_one(tiny, tmp_path):
    """transformers loads it, and its own loss on the validation set is the one in the record."""
    run(tiny, tmp_path, num_training_steps=20, eval_tokens="1K", packing="truncate")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    from peft_pretraining.data.sources import open_documents
    from peft_pretraining.data.tokenizer import load_tokenizer
    from peft_pretraining.data.validation import ValidationSet

    source = open_documents(str(tiny.data), split="validation", seed=0)
    held_out = ValidationSet(
        source, load_tokenizer(str(tiny.tokenizer)), tokens=1000, max_length=32, packing="truncate", batch_size=7
    )
    total = count = 0
    with torch.no_grad():
        for batch in held_out:
            logits = model(batch.input_ids).logits
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            count += (batch.targets != -100).sum()
    (end,) = record(tmp_path, "end")
    assert (total / count).exp().item() == pytest.approx(end["perplexity"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_losses_to_the_last_bit(tiny, tmp_path, optimizer, dtype, monkeypatch):
    monkeypatch.setattr("peft_pretraining.model.dtypes.native_bfloat16", lambda device: True)  # slow, but right
    flags = dict(optimizer=optimizer, dtype=dtype, rank=8 if optimizer == "galore_adamw" else None, update_proj_gap=2)
    for name, seed in [("one", 0), ("two", 0), ("other", 1)]:
        run(tiny, tmp_path / name, seed=seed, **flags)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert losses(tmp_path / "one") != losses(tmp_path / "other")


@pytest.mark.parametrize("workers", [0, 2])
def test_how_a_batch_is_cut_does_not_matter(tiny, tmp_path, workers):
    """32 sequences an update as 32 x 1, 8 x 4 and 4 x 8: the same losses, to float32 rounding."""
    runs = {}
    for batch_size in (32, 8, 4):
        folder = tmp_path / str(batch_size)
        run(tiny, folder, batch_size=batch_size, total_batch_size=32, workers=workers, optimizer="galore_adamw", rank=8)
        runs[batch_size] = losses(folder)
    assert runs[8] == pytest.approx(runs[32], rel=1e-5)
    assert runs[4] == pytest.approx(runs[32], rel=1e-5)


@pytest.mark.parametrize("clipping", [0.0, 0.05], ids=["at rank size", "whole gradients"])
def test_two_ranks_are_one(tiny, tmp_path, clipping):
    """Two processes with one reader each see the sequences of one process with two readers: the same losses."""
    shared = dict(total_batch_size=8, workers=2, optimizer="galore_adamw", rank=8, update_proj_gap=2)
    run(tiny, tmp_path / "one", grad_clipping=clipping, **shared)
    flags = tiny.flags(tmp_path / "two", **shared | {"workers": 1, "grad_clipping": clipping})
    result = run_on_two_ranks(flags)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    norms = [[line["grad_norm"] for line in record(tmp_path / name, "update")] for name in ("one", "two")]
    ends = [record(tmp_path / name, "end")[0] for name in ("one", "two")]
    assert ends[1]["perplexity"] == pytest.approx(ends[0]["perplexity"], rel=1e-4)
    assert ends[1]["tokens_seen"] == ends[0]["tokens_seen"]
    if clipping:
        assert norms[1] == pytest.approx(norms[0], rel=1e-3)
        assert min(norms[0]) > clipping, "it clips"
    else:
        assert all(low <= whole * 1.0001 for low, whole in zip(norms[1], norms[0], strict=True))
        assert record(tmp_path / "two", "start")[0]["grad_norm"] == "all gradients as projected"


def test_clipping_limits_the_update(tiny, tmp_path):
    """With plain SGD at rate 1, no momentum, the weights move by exactly the clipped norm in one update."""
    flags = dict(optimizer="sgd", lr=1.0, num_training_steps=1, warmup_steps=0, min_lr_ratio=1.0)
    for name, more in [("moved", dict(grad_clipping=0.01)), ("still", dict(lr=1e-30))]:
        run(tiny, tmp_path / name, **flags | more)
    moved, still = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("moved", "still"))
    pairs = zip(moved.parameters(), still.parameters(), strict=True)
    assert math.sqrt(sum((p - q).square().sum().item() for p, q in pairs)) == pytest.approx(0.01, rel=1e-3)


def test_the_data_begins_again_when_it_ends(tiny, tmp_path, capsys):
    run(tiny, tmp_path, batch_size=64, num_training_steps=12, optimizer="sgd")
    assert "the data has ended: epoch 2 begins, reshuffled" in capsys.readouterr().err


def test_activation_checkpointing_changes_nothing_but_memory(tiny, tmp_path):
    for name, switch in [("with", True), ("without", None)]:
        run(tiny, tmp_path / name, activation_checkpointing=switch)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_a_dry_run_checks_and_writes_nothing(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "out", dry_run=True, optimizer="galore_adamw", rank=8)
    assert "AdamW, rank 8 (std), orthogonal iteration every 50 updates, scale 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_flags_without_effect_are_named(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "out", dry_run=True, optimizer="adamw", rank=8, stochastic_round=True)
    log = capsys.readouterr().err
    assert "--rank has no effect with --optimizer adamw" in log
    assert "--stochastic_round has no effect without --weight_quant" in log


def test_half_a_line_of_a_killed_run_is_cut_off(tiny, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "old"}\n{"event": "upda')
    run(tiny, tmp_path, num_training_steps=2)
    events = [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events == ["old", "start", "update", "update", "eval", "end"]


def test_wandb_never_stops_a_run(tiny, tmp_path, monkeypatch, capsys):
    """wandb that fails to start: a warning, and training goes on."""
    import sys
    import types

    def fail(**_):
        raise RuntimeError("no space left")

    broken = types.SimpleNamespace(init=fail, Settings=dict, api=types.SimpleNamespace(api_key="key"))
    monkeypatch.setitem(sys.modules, "wandb", broken)
    run(tiny, tmp_path / "online", num_training_steps=2, wandb_mode="online")
    assert "wandb is not used: no space left" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(tiny, tmp_path / "offline", num_training_steps=2, wandb_mode="offline")
    assert "wandb is not used" in capsys.readouterr().err


def test_a_resumed_run_is_the_same_run_in_wandb(tiny, tmp_path, monkeypatch):
    import sys
    import types

    asked = []

    def init(**options):
        asked.append(options)
        ignored = dict.fromkeys(("log", "finish", "define_metric"), lambda *_, **__: None)
        return types.SimpleNamespace(id=options["id"] or "abc", config={}, **ignored)

    known = types.SimpleNamespace(init=init, Settings=dict, api=types.SimpleNamespace(api_key="key"))
    monkeypatch.setitem(sys.modules, "wandb", known)
    run(tiny, tmp_path, num_training_steps=2, wandb_mode="online", save_every=1)
    flags = dict(num_training_steps=2, wandb_mode="online", continue_from=tmp_path / "checkpoint-00000001")
    run(tiny, tmp_path, **flags)
    assert [(options["id"], options["resume"]) for options in asked] == [(None, None), ("abc", "allow")]
