"""N + N updates are 2 N updates, to the last bit; and what a run refuses to go on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from support.command_line import refusal
from support.ranks import run_on_two_ranks
from support.resumed_runs import INT8, LOW_RANK, assert_halves_make_a_whole, checkpoint, digests
from support.runs import ROOT, losses, record, run

import torchrun_main
from peft_pretraining.checkpoint import files
from peft_pretraining.cli.flags import FLAGS, MAY_CHANGE
from peft_pretraining.distributed import STOP_SIGNALS
from peft_pretraining.training import loop
from qgalore.factory import OPTIMIZERS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(tiny, tmp_path, optimizer):
    low_rank = LOW_RANK if "galore" in optimizer else {}
    int8 = INT8 if optimizer.startswith("q_galore") else {}
    assert_halves_make_a_whole(tiny, tmp_path, optimizer=optimizer, **low_rank, **int8)


@pytest.mark.parametrize(
    "flags",
    [
        dict(optimizer="adamw", batch_size=2, total_batch_size=8),
        dict(optimizer="galore_adamw_per_layer", batch_size=2, total_batch_size=8, **LOW_RANK),
        dict(optimizer="q_galore_adamw8bit_per_layer", batch_size=2, total_batch_size=6, workers=4, **LOW_RANK, **INT8),
        dict(optimizer="q_galore_adamw8bit", cos_threshold=0, queue_size=1, rank=8, update_proj_gap=2, **INT8),
        dict(optimizer="galore_adamw", simulation=True, **LOW_RANK, **INT8 | dict(proj_quant=None)),
        dict(optimizer="galore_adamw8bit", proj_type="full", subspace="svd", grad_clipping=0.1, **LOW_RANK),
        dict(optimizer="adamw", batch_size=64, updates=14, workers=0),
        dict(optimizer="adamw", batch_size=64, updates=14, workers=2),
        dict(optimizer="adamw", packing="truncate"),
        dict(optimizer="adamw", activation_checkpointing=True),
    ],
    ids=[
        "accumulation",
        "accumulation per layer",
        "workers, INT8, accumulation per layer",
        "lazy gaps that grow",
        "simulated INT8",
        "both sides, SVD, clipping",
        "over the end of an epoch",
        "over the end of an epoch, workers",
        "one document a sequence",
        "activation checkpointing",
    ],
)
def test_every_way_to_train(tiny, tmp_path, flags):
    assert_halves_make_a_whole(tiny, tmp_path, **flags)


@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw", "q_galore_adamw8bit_per_layer"])
def test_bfloat16(tiny, tmp_path, optimizer, monkeypatch):
    """Master weights of torch's optimizers are in the checkpoint; ours round stochastically by the update's number."""
    monkeypatch.setattr("peft_pretraining.model.dtypes.native_bfloat16", lambda device: True)  # slow, but right
    low_rank = LOW_RANK if "galore" in optimizer else {}
    int8 = INT8 if optimizer.startswith("q_galore") else {}
    assert_halves_make_a_whole(tiny, tmp_path, optimizer=optimizer, dtype="bfloat16", **low_rank, **int8)


@pytest.mark.slow
def test_compiled(tiny, tmp_path):
    optimizer = "q_galore_adamw8bit_per_layer"
    assert_halves_make_a_whole(tiny, tmp_path, optimizer=optimizer, compile=True, **LOW_RANK, **INT8)


@pytest.mark.slow
def test_two_ranks(tiny, tmp_path, capsys):
    flags = dict(optimizer="galore_adamw", total_batch_size=8, save_every=3, workers=1, **LOW_RANK)
    assert run_on_two_ranks(tiny.flags(tmp_path / "whole", **flags)).returncode == 0
    resumed = tiny.flags(tmp_path / "half", continue_from=checkpoint(tmp_path / "whole", 3), **flags)
    result = run_on_two_ranks(resumed)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")[3:]
    assert digests(tmp_path / "half", 6) == digests(tmp_path / "whole", 6)

    run(tiny, tmp_path / "alone", continue_from=checkpoint(tmp_path / "whole", 3), **flags | dict(workers=4))
    assert "the checkpoint is of 2 processes, this run of 1" in capsys.readouterr().err
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-4), "the same sequences"


@pytest.mark.slow
def test_one_process_and_two_train_on_the_same_sequences(tiny, tmp_path):
    """At the same total batch, with other workers: data positions, target tokens and losses of each update; then each
    goes on from the other one's checkpoint. What is left is the order of the sums."""
    flags = dict(total_batch_size=8, num_training_steps=12, save_every=6, keep_last=0)
    run(tiny, tmp_path / "one", workers=0, **flags)
    both = dict(batch_size=2, workers=2, **flags)
    assert run_on_two_ranks(tiny.flags(tmp_path / "two", **both)).returncode == 0
    other = tiny.flags(tmp_path / "one-two", continue_from=checkpoint(tmp_path / "one", 6), **both)
    assert run_on_two_ranks(other).returncode == 0
    run(tiny, tmp_path / "two-one", continue_from=checkpoint(tmp_path / "two", 6), workers=1, **flags)
    wanted = record(tmp_path / "one", "update")
    for name in ("two", "one-two", "two-one"):
        found = record(tmp_path / name, "update")
        assert [line["update"] for line in found] == list(range(1 if name == "two" else 7, 13))
        for ours, theirs in zip(reversed(found), reversed(wanted), strict=False):
            assert ours["tokens_seen"] == theirs["tokens_seen"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        states = [json.loads((checkpoint(tmp_path / run, 12) / "state.json").read_text()) for run in ("one", name)]
        assert states[0]["position"] == states[1]["position"] and len(states[0]["position"]["readers"]) == 16
    ends = [record(tmp_path / name, "end")[0]["perplexity"] for name in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5), "the same validation tokens"


def test_auto_begins_anew_where_there_is_nothing_and_ends_at_once_what_has_ended(tiny, tmp_path):
    for _ in range(2):
        run(tiny, tmp_path, resume="auto")
    events = [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events == ["start", *["update"] * 6, "eval", "end", "start", "resume", "end"]
    first, last = record(tmp_path, "end")
    assert first["perplexity"] == last["perplexity"] and (tmp_path / "model").is_dir()


def test_auto_takes_the_newest_sound_checkpoint(tiny, tmp_path, capsys):
    run(tiny, tmp_path, save_every=2)
    weights = checkpoint(tmp_path, 6) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    capsys.readouterr()
    run(tiny, tmp_path, save_every=2, resume="auto")
    log = capsys.readouterr().err
    assert str(weights) in log and f"going on from {checkpoint(tmp_path, 4)}" in log
    (aside,) = tmp_path.glob("abandoned-*-checkpoint-00000006")
    assert (aside / "model.safetensors").read_bytes() == content, "kept, under a name that nobody resumes from"
    assert [line["update"] for line in record(tmp_path, "update")] == [1, 2, 3, 4, 5, 6, 5, 6]
    assert losses(tmp_path)[4:6] == losses(tmp_path)[6:]


@pytest.mark.parametrize("how", ["continue_from", "resume"])
def test_every_file_of_a_checkpoint_is_hashed_once(tiny, tmp_path, monkeypatch, how):
    """From the start of the program to the restored run; what the run saves later has other names."""
    run(tiny, tmp_path, save_every=3)
    folder, hashed, sha256 = checkpoint(tmp_path, 6), Counter(), files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.update([path]) or sha256(path))
    run(tiny, tmp_path, **{how: "auto" if how == "resume" else folder})
    assert hashed == {folder / name: 1 for name in [*files.FILES, "tokenizer/tokenizer.model"]}


def test_a_damaged_checkpoint_is_refused_by_name(tiny, tmp_path, capsys):
    run(tiny, tmp_path)
    (checkpoint(tmp_path, 6) / "optimizer.safetensors").write_bytes(b"cposix\nsystem\n(S'echo'\ntR.")
    flags = tiny.flags(tmp_path, continue_from=checkpoint(tmp_path, 6))
    assert "optimizer.safetensors" in refusal(flags, capsys)


def test_a_folder_with_checkpoints_is_not_begun_anew(tiny, tmp_path, capsys):
    run(tiny, tmp_path)
    before = losses(tmp_path)
    message = refusal(tiny.flags(tmp_path), capsys)
    assert "holds checkpoints of an earlier run" in message and "--resume auto" in message
    assert losses(tmp_path) == before


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_whose_checkpoints_are_all_damaged_is_not_begun_anew(tiny, tmp_path, capsys, resume):
    """It would write over weights of which perhaps nothing but a manifest is missing."""
    run(tiny, tmp_path, save_every=3)
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    message = refusal(tiny.flags(tmp_path, resume=resume), capsys)
    assert "all are damaged: checkpoint-00000003, checkpoint-00000006. Move them away" in message


def test_a_checkpoint_that_was_moved_aside_is_not_before_all_others(tiny, tmp_path):
    """A hidden name comes before others as text; what is later is told by the update."""
    run(tiny, tmp_path, save_every=2)
    moved = checkpoint(tmp_path, 6).rename(tmp_path / ".checkpoint-00000006.replaced")
    more = dict(num_training_steps=8, warmup_steps=1, allow_changed="num_training_steps,warmup_steps")
    run(tiny, tmp_path, continue_from=moved, save_every=2, **more)
    assert not list(tmp_path.glob("abandoned-*")) and checkpoint(tmp_path, 4).is_dir()


def test_a_name_that_no_disk_takes_is_one_line(tiny, tmp_path, capsys):
    message = refusal(tiny.flags(tmp_path / ("x" * 300)), capsys)
    assert "File name too long. Give a shorter name." in message


def test_a_run_does_not_go_on_beyond_its_end(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "one")
    fewer = dict(num_training_steps=5, warmup_steps=1, allow_changed="num_training_steps,warmup_steps")
    flags = tiny.flags(tmp_path / "two", continue_from=tmp_path / "one", **fewer)
    assert "is of update 6, and --num_training_steps is 5: that is over" in refusal(flags, capsys)


@pytest.mark.parametrize(
    "changed", [dict(rank=4), dict(proj_bits=8), dict(proj_type="right"), dict(optimizer="galore_adamw8bit")], ids=str
)
def test_a_change_that_is_allowed_but_does_not_fit_the_state_is_one_line(tiny, tmp_path, capsys, changed):
    flags = dict(optimizer="galore_adamw", rank=8, proj_quant=True, proj_bits=4)
    run(tiny, tmp_path / "one", **flags)
    there = dict(continue_from=tmp_path / "one", allow_changed=next(iter(changed))) | flags | changed
    if "optimizer" in changed:  # moments of 32 bits are read, whatever new ones have
        run(tiny, tmp_path / "two", **there)
        return
    message = refusal(tiny.flags(tmp_path / "two", **there), capsys)
    assert "does not fit: its state of model.layers.0." in message


@pytest.mark.parametrize(
    "changed", [dict(lr=0.02), dict(rank=4), dict(optimizer="galore_adamw8bit"), dict(seed=1), dict(max_length=16)]
)
def test_what_alters_training_is_refused_with_its_name(tiny, tmp_path, capsys, changed):
    flags = dict(optimizer="galore_adamw", rank=8)
    run(tiny, tmp_path / "one", **flags)
    ((name, value),) = changed.items()
    there = dict(continue_from=tmp_path / "one") | flags | changed
    message = refusal(tiny.flags(tmp_path / "two", **there), capsys)
    old = (flags | dict(lr=0.01, seed=0, max_length=32))[name]
    assert f"--{name} {old} -> {value}" in message and f"--allow_changed {name}" in message
    assert not (tmp_path / "two").exists()


def test_another_model_is_refused(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "one")
    config = tmp_path / "wider.json"
    config.write_text(json.dumps(json.loads(tiny.config.read_text()) | {"intermediate_size": 64}))
    flags = tiny.flags(tmp_path / "two", model_config=config, continue_from=tmp_path / "one")
    assert "wider.json is another model" in refusal(flags, capsys)


def test_changes_that_are_allowed_and_harmless_ones_are_taken(tiny, tmp_path):
    """A longer run at another rate, cut into other micro-batches, with the same files in another place."""
    run(tiny, tmp_path / "one")
    moved = shutil.copytree(tiny.data, tmp_path / "elsewhere")
    more = dict(lr=0.005, num_training_steps=9, warmup_steps=1, allow_changed="lr,num_training_steps,warmup_steps")
    more |= dict(batch_size=2, total_batch_size=4, save_every=2, eval_every=2, dataset=moved)
    run(tiny, tmp_path / "two", continue_from=tmp_path / "one", **more)
    assert [line["update"] for line in record(tmp_path / "two", "update")] == [7, 8, 9]
    assert record(tmp_path / "two", "update")[0]["lr"] < 0.005


def test_a_changed_shard_is_refused_by_name(tiny, tmp_path, capsys):
    data = shutil.copytree(tiny.data, tmp_path / "data")
    run(tiny, tmp_path / "one", dataset=data, save_every=3)
    shard = data / "en" / "c4-train.00001-of-00002.json.gz"
    shard.write_bytes((data / "en" / "c4-train.00000-of-00002.json.gz").read_bytes())
    flags = dict(dataset=data, continue_from=checkpoint(tmp_path / "one", 3))
    message = refusal(tiny.flags(tmp_path / "two", **flags), capsys)
    assert shard.name in message and "--allow_changed dataset" in message


@pytest.mark.parametrize(
    "path, message",
    [("nowhere", "there is no such folder"), ("empty", "no complete checkpoint")],
)
def test_nothing_to_go_on_from(tiny, tmp_path, capsys, path, message):
    (tmp_path / "empty").mkdir()
    assert message in refusal(tiny.flags(tmp_path / "out", continue_from=tmp_path / path), capsys)


def test_what_alters_training_may_not_change():
    """Declared with each flag: where and how a run goes on, what it records and when it saves are its own affair."""
    decisive = "optimizer lr rank proj_type weight_quant seed num_training_steps total_batch_size text_field".split()
    free = "batch_size dataset tokenizer model_config save_every workers num_threads log_details wandb_mode".split()
    assert not MAY_CHANGE & set(decisive) and set(free) <= MAY_CHANGE < FLAGS.keys()


def test_weights_of_a_finished_model_begin_a_new_run(tiny, tmp_path, capsys):
    """From a transformers folder, into INT8: the first loss is near the last one, the update is the first."""
    run(tiny, tmp_path / "one", num_training_steps=40)
    begun = dict(optimizer="q_galore_adamw8bit", continue_from=tmp_path / "one" / "model", **LOW_RANK, **INT8)
    run(tiny, tmp_path / "two", **begun)
    assert [line["update"] for line in record(tmp_path / "two", "update")] == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "two")[0] < 0.7 * losses(tmp_path / "one")[0]


def test_evaluation_only(tiny, tmp_path, capsys):
    """Of a checkpoint, a run's folder and a transformers folder: the perplexity that the run ended with."""
    run(tiny, tmp_path, optimizer="q_galore_adamw8bit", **LOW_RANK, **INT8)
    (end,) = record(tmp_path, "end")
    lines = (tmp_path / "metrics.jsonl").read_text()
    for place in (checkpoint(tmp_path, 6), tmp_path):
        capsys.readouterr()
        assert torchrun_main.command_line(["--eval_only", "--continue_from", str(place)]) == 0
        assert f"perplexity {end['perplexity']:.4f} on 2,000 validation tokens" in capsys.readouterr().out
    own = ["--dataset", tiny.data, "--tokenizer", tiny.tokenizer, "--max_length", 32, "--eval_tokens", "2K"]
    own += ["--dtype", "float32"]
    flags = ["--eval_only", "--continue_from", tmp_path / "model", *own]
    assert torchrun_main.command_line([str(flag) for flag in flags]) == 0
    assert f"perplexity {end['perplexity']:.4f} on 2,000 validation tokens" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == lines, "nothing is recorded"


@pytest.mark.parametrize("number", [number for number in STOP_SIGNALS if number != signal.SIGINT], ids=str)
def test_every_signal_that_says_stop_is_heard(tiny, tmp_path, monkeypatch, number):
    """Here with data workers, which leave it to the process that trains."""
    step = loop.train_step

    def told(run):
        step(run)
        if run.state.update == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(loop, "train_step", told)
    before = signal.getsignal(number)
    assert torchrun_main.command_line(tiny.flags(tmp_path, num_training_steps=50, workers=1)) == 75
    assert checkpoint(tmp_path, 4).is_dir() and signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored(tiny, tmp_path, monkeypatch):
    """As nohup leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        step = loop.train_step
        monkeypatch.setattr(loop, "train_step", lambda run: (step(run), signal.raise_signal(signal.SIGHUP)))
        run(tiny, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [[], ["nohup"]], ids=["torchrun", "nohup torchrun"])
def test_a_hangup_of_torchrun_saves_the_run(tiny, tmp_path, prefix):
    """torchrun puts a handler of its own in the place of nohup's SIG_IGN, and passes the signal on."""
    torchrun = [*prefix, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = tiny.flags(tmp_path / "cut", num_training_steps=400)
    process = subprocess.Popen([*torchrun, "torchrun_main.py", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut" / "metrics.jsonl"
    while not (log.exists() and '"update": 5,' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    done = record(tmp_path / "cut", "update")[-1]["update"]
    assert process.returncode != 0 and checkpoint(tmp_path / "cut", done).is_dir(), errors


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_update_saves_and_says_so(tiny, tmp_path, number, status):
    """The whole process group is told, workers included, as by a terminal or a scheduler."""
    flags = dict(num_training_steps=400, optimizer="galore_adamw", rank=8, workers=2)
    command = [sys.executable, "torchrun_main.py", *tiny.flags(tmp_path / "cut", **flags)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "cut" / "metrics.jsonl"
    while not (log.exists() and '"update": 5,' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    done = record(tmp_path / "cut", "update")[-1]["update"]
    assert 5 <= done < 400 and checkpoint(tmp_path / "cut", done).is_dir()
    assert f"go on with --continue_from {checkpoint(tmp_path / 'cut', done)}" in errors
    assert "Traceback" not in errors
