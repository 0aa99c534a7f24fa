"""Numbers and documents that go bad in the middle of a run."""

import io
import json
import math
from itertools import chain

import pytest
import torch
from support.command_line import refusal
from support.runs import losses, record

import torchrun_main
from peft_pretraining.errors import UserError
from peft_pretraining.model import loss
from peft_pretraining.training import loop
from peft_pretraining.training.health import MIN_LOSSES, Health, is_spike
from peft_pretraining.training.metrics import JsonlSink

LOSS = loss.token_loss_sum


@pytest.fixture
def spoil(monkeypatch):
    """spoil({7: f}): the loss of the seventh micro-batch of this process is f(loss)."""

    def install(changes):
        seen = iter(range(1, 1000))

        def spoilt(model, *batch):
            loss = LOSS(model, *batch)
            if not torch.is_grad_enabled():
                return loss
            return changes.get(next(seen), lambda loss: loss)(loss)

        monkeypatch.setattr(loss, "token_loss_sum", spoilt)

    return install


def to_nan(loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


@pytest.mark.parametrize(
    "flags", [dict(optimizer="adamw"), dict(optimizer="galore_adamw_per_layer", rank=8)], ids=["whole", "per layer"]
)
def test_an_update_with_a_bad_number_is_skipped_counted_and_named(tiny, tmp_path, spoil, capsys, flags):
    spoil({3: to_nan, 4: to_nan})
    assert torchrun_main.command_line(tiny.flags(tmp_path, num_training_steps=20, **flags)) == 0
    assert [line["update"] for line in record(tmp_path, "bad_update")] == [3, 4]
    (first, _) = record(tmp_path, "bad_update")
    assert "model.embed_tokens.weight" in first["parameters"] and first["loss"] is None
    assert "update 3 skipped: the gradient of model.embed_tokens.weight and" in capsys.readouterr().err
    assert [loss is None for loss in losses(tmp_path)] == [update in (3, 4) for update in range(1, 21)]
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    state = json.loads((tmp_path / "checkpoint-00000020" / "state.json").read_text())["state"]
    assert state["health"]["bad_updates"] == 2 and state["health"]["bad_in_a_row"] == 0
    assert len(state["health"]["losses"]) == 18


def test_too_many_bad_updates_in_a_row_end_the_run_at_its_last_good_checkpoint(tiny, tmp_path, spoil, capsys):
    """A checkpoint is due in the middle of them, and is not written."""
    spoil({update: to_nan for update in range(3, 100)})
    flags = tiny.flags(tmp_path, num_training_steps=50, save_every=2, max_bad_updates=4)
    message = refusal(flags, capsys)
    assert message.startswith("4 updates in a row were skipped, the last because the gradient of model.embed_tokens")
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-00000002'}" in message and "--lr" in message
    assert len(losses(tmp_path)) == 6 and not (tmp_path / "checkpoint-00000004").exists()


def test_a_rate_that_blows_up_ends_the_run(tiny, tmp_path, capsys):
    flags = tiny.flags(tmp_path, optimizer="sgd", lr=1e30, num_training_steps=50)
    assert "10 updates in a row were skipped" in refusal(flags, capsys)


def test_a_spike_goes_back_to_the_last_checkpoint_and_on_with_other_data(tiny, tmp_path, spoil, capsys):
    """The updates after the checkpoint are done again, from its weights and with data not seen before."""
    flags = dict(num_training_steps=50, save_every=10, spike_rollback=20, optimizer="galore_adamw", rank=8)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "calm", **flags)) == 0
    spoil({44: lambda loss: 50 * loss})
    assert torchrun_main.command_line(tiny.flags(tmp_path / "spiked", **flags)) == 0
    assert not record(tmp_path / "calm", "rollback")
    (rollback,) = record(tmp_path / "spiked", "rollback")
    assert (rollback["update"], rollback["to"]) == (44, 40)
    calm, spiked = losses(tmp_path / "calm"), losses(tmp_path / "spiked")
    assert [line["update"] for line in record(tmp_path / "spiked", "update")] == [*range(1, 45), *range(41, 51)]
    assert spiked[:43] == calm[:43] and spiked[43] == pytest.approx(50 * calm[43])
    assert spiked[44] != calm[40] and spiked[44] == pytest.approx(calm[40], rel=0.3)
    assert record(tmp_path / "spiked", "end")[0]["updates"] == 50
    state = json.loads((tmp_path / "spiked" / "checkpoint-00000050" / "state.json").read_text())["state"]
    assert state["health"]["rollbacks"] == 1 and state["health"]["rollbacks_since_save"] == 0


def test_spikes_that_come_again_and_again_end_the_run(tiny, tmp_path, spoil, capsys):
    spoil({update: lambda loss: 50 * loss for update in range(45, 1000)})
    flags = tiny.flags(tmp_path, num_training_steps=60, save_every=40, spike_rollback=20)
    assert "the loss has spiked 6 times after" in refusal(flags, capsys)


def test_what_a_spike_is():
    losses = [3 + 0.01 * (i % 5) for i in range(MIN_LOSSES)]
    assert is_spike(3.5, losses=losses, factor=5) and not is_spike(3.05, losses=losses, factor=5)
    assert not is_spike(3.5, losses=losses, factor=0), "off"
    assert not is_spike(3.5, losses=losses[1:], factor=5), "too few to tell"
    assert not is_spike(1.0, losses=losses, factor=5), "lower is no spike"
    assert is_spike(3.5, losses=[*losses, 9.0, 9.0, 9.0], factor=5), "earlier spikes hide nothing"
    assert not is_spike(3.0001, losses=[3.0] * MIN_LOSSES, factor=5), "a thousandth is nothing"


def test_health_remembers_a_window():
    health = Health()
    for update in range(200):
        health.note(float(update), bad=update in (150, 199))
    assert health.losses == [float(update) for update in range(200) if update not in (150, 199)][-128:]
    assert (health.bad_updates, health.bad_in_a_row) == (2, 1)


def broken_data(tiny, folder, *, bad: int):
    """The tiny data with `bad` lines that are no JSON in its first shard."""
    (folder / "en").mkdir(parents=True)
    for shard in sorted((tiny.data / "en").iterdir()):
        (folder / "en" / shard.name).write_bytes(shard.read_bytes())
    (folder / "en" / "c4-train.99999.jsonl").write_text('{"text": "ba" "de"}\n' * bad)
    return folder


def test_bad_documents_are_named_and_counted(tiny, tmp_path, capsys):
    """All of them within one epoch; the count is in the record and in the checkpoint."""
    data = broken_data(tiny, tmp_path / "data", bad=3)
    flags = tiny.flags(tmp_path / "out", dataset=data, batch_size=64, num_training_steps=16, keep_last=1)
    assert torchrun_main.command_line(flags) == 0
    log = capsys.readouterr().err
    assert all(f"c4-train.99999.jsonl line {line}: not valid JSON" in log for line in (1, 2, 3))
    state = json.loads((tmp_path / "out" / "checkpoint-00000016" / "state.json").read_text())["state"]
    assert state["health"]["bad_documents"] >= 3
    assert record(tmp_path / "out", "bad_documents")[-1]["total"] == state["health"]["bad_documents"]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_documents_end_the_run_and_nothing_is_lost(tiny, tmp_path, capsys, workers):
    data = broken_data(tiny, tmp_path / "data", bad=3)
    flags = dict(dataset=data, batch_size=64, num_training_steps=16, max_bad_documents=2, workers=workers)
    message = refusal(tiny.flags(tmp_path / "out", **flags), capsys)
    assert "3 documents could not be read (see above)" in message and "--max_bad_documents" in message
    done = len(losses(tmp_path / "out"))
    assert f"The last good checkpoint is {tmp_path / 'out' / f'checkpoint-{done:08}'}" in message


def test_a_shard_that_disappears_ends_the_run_after_saving_it(tiny, tmp_path, capsys, monkeypatch):
    """Between two epochs; put back, the run goes on as if nothing had been."""
    flags = dict(batch_size=64, num_training_steps=16)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "whole", **flags)) == 0
    data = broken_data(tiny, tmp_path / "data", bad=0)
    (data / "en" / "c4-train.99999.jsonl").unlink()
    shard = data / "en" / "c4-train.00001-of-00002.json.gz"
    step = loop.train_step
    monkeypatch.setattr("peft_pretraining.data.records.RETRY_WAITS", (0.0,))

    def losing_a_shard(run):
        step(run)
        if run.state.update == 2:
            shard.rename(tmp_path / "aside")

    monkeypatch.setattr("peft_pretraining.training.loop.train_step", losing_a_shard)
    message = refusal(tiny.flags(tmp_path / "cut", dataset=data, **flags), capsys)
    done = len(losses(tmp_path / "cut"))
    assert str(shard) in message and f"checkpoint-{done:08}" in message and done < 16
    monkeypatch.undo()
    (tmp_path / "aside").rename(shard)
    resumed = tiny.flags(tmp_path / "cut", dataset=data, resume="auto", **flags)
    assert torchrun_main.command_line(resumed) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_data_that_fails_within_an_update_leaves_the_state_at_the_update_before(tiny, tmp_path, capsys, monkeypatch):
    """The second micro-batch of update 3 fails: what is saved is update 2 and the data behind it, and nothing else."""
    flags = dict(batch_size=32, total_batch_size=64, num_training_steps=6)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "whole", save_every=2, **flags)) == 0
    step = loop.train_step

    def failing_once(run):
        if run.state.update == 2:
            run.batches = chain([next(run.batches)], broken())
        step(run)

    def broken():
        raise UserError("the file is gone")
        yield

    monkeypatch.setattr("peft_pretraining.training.loop.train_step", failing_once)
    assert "the file is gone. The last good checkpoint is" in refusal(tiny.flags(tmp_path / "cut", **flags), capsys)
    monkeypatch.undo()
    saved, expected = (
        json.loads((tmp_path / name / "checkpoint-00000002" / "state.json").read_text()) for name in ("cut", "whole")
    )
    assert saved["position"] == expected["position"] and saved["state"]["epoch"] == expected["state"]["epoch"]
    assert torchrun_main.command_line(tiny.flags(tmp_path / "cut", resume="auto", **flags)) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_position_moves_when_the_update_is_done(tiny, tmp_path, spoil, monkeypatch):
    """An error in the middle of update 3, its data already read: the state still is that after update 2."""
    runs, states = [], []
    step = loop.train_step

    def watching(run):
        runs.append(run)
        states.append((run.state.position, run.state.epoch, run.state.update))
        step(run)

    def failing(loss):
        raise RuntimeError("out of memory")

    spoil({3: failing})
    monkeypatch.setattr("peft_pretraining.training.loop.train_step", watching)
    with pytest.raises(RuntimeError, match="out of memory"):
        torchrun_main.command_line(tiny.flags(tmp_path))
    state = runs[-1].state
    assert (state.position, state.epoch, state.update) == states[-1]
    assert states[0][0] is None and states[1][0] != states[2][0]


def test_a_full_disk_stops_no_run(tiny, tmp_path, capsys, monkeypatch):
    """Every save after the first fails: each says so, the first checkpoint stays, the run ends as it should."""
    from peft_pretraining.checkpoint import atomic_write

    write = atomic_write._write_file
    monkeypatch.setattr(
        "peft_pretraining.checkpoint.atomic_write._write_file",
        lambda path, content: write(path, content) if "00000002" in str(path) else no_space(),
    )
    assert torchrun_main.command_line(tiny.flags(tmp_path, save_every=2)) == 0
    log = capsys.readouterr().err
    assert log.count("could not save") == 2 and log.count("No space left on device") == 2
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-00000002"]
    assert len(losses(tmp_path)) == 6 and (tmp_path / "model").is_dir()


def test_a_full_disk_costs_the_record_no_line(tmp_path):
    """Half a line fits, then nothing for a while: when there is room again, all of them are there, each once."""

    class Full(io.FileIO):
        room = 30

        def write(self, data):
            if not self.room:
                no_space()
            written = super().write(data[: self.room])
            self.room -= written
            return written

    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink._file = Full(tmp_path / "metrics.jsonl", "ab")
    for number in range(3):
        sink.event("noted", {"number": number})
    sink._file.room = 1000
    sink.event("noted", {"number": 3})
    sink.close()
    assert [line["number"] for line in record(tmp_path, "noted")] == [0, 1, 2, 3]


def no_space():
    raise OSError(28, "No space left on device")
