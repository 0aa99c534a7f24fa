"""The record: every event reaches every sink, and each sink makes of it what it is for."""

import json
import math

import pytest
from support.checkpoints import logged
from support.command_line import flags_refusal
from support.runs import losses

import torchrun_main
from peft_pretraining.training.metrics import BarSink, JsonlSink, LogSink, Record, WandbSink

UPDATE = dict(loss=2.0, lr=0.01, grad_norm=1.0, tokens_seen=10, tokens_per_second=5.0, memory_bytes=7)


class Curves:
    """As much of a sink as one for TensorBoard needs: here it keeps the points of each curve."""

    def __init__(self):
        self.points, self.closed = {}, 0

    def event(self, name, fields):
        if name in ("update", "eval"):
            for key, value in fields.items():
                self.points.setdefault(f"{name}/{key}", []).append((fields["update"], value))

    def close(self):
        self.closed += 1


class FakeWandb:
    """A wandb run that remembers what it is given."""

    def __init__(self):
        self.config, self.logged, self.axes, self.finished = {}, [], {}, False

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, fields):
        """By wandb's own step, which counts calls: a step that is given and is not larger is thrown away."""
        self.logged.append(fields)

    def finish(self):
        self.finished = True


def test_every_event_reaches_every_sink_until_the_record_is_closed():
    sinks = Curves(), Curves()
    record = Record(*sinks, wandb_id="abc")
    record.event("update", update=1, loss=3.0)
    record.event("eval", update=1, loss=2.5)
    record.event("rollback", update=2, to=1)
    record.event("subspace_details", name="q_proj", update=2)
    for _ in range(2):
        record.close()
    record.event("update", update=2, loss=2.0)
    for sink in sinks:
        assert sink.points["update/loss"] == [(1, 3.0)] and sink.points["eval/loss"] == [(1, 2.5)]
        assert len(sink.points) == 4 and sink.closed == 1
    assert record.wandb_id == "abc"


def test_a_record_without_sinks_takes_everything():
    record = Record()
    record.event("update", **UPDATE, update=1)
    record.close()


def test_lines_are_json_whatever_the_figures_are(tmp_path):
    """A killed run's half of a line goes; what was whole stays."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "start"}\n{"event": "upd')
    sink = JsonlSink(path)
    sink.event("update", {"update": 1, "loss": math.nan, "nested": [{"norm": math.inf}, (1, 2.5)]})
    sink.close()
    assert path.read_bytes() == (
        b'{"event": "start"}\n{"event": "update", "update": 1, "loss": null, "nested": [{"norm": null}, [1, 2.5]]}\n'
    )
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["start", "update"]


def test_wandb_gets_the_configuration_and_the_curves():
    run = FakeWandb()
    sink = WandbSink(run)
    sink.event("start", {"args": {"lr": math.inf}})
    sink.event("update", {"update": 3, "loss": 1.0})
    sink.event("eval", {"update": 3, "perplexity": 2.0})
    sink.event("end", {"updates": 3})
    sink.close()
    assert run.config == {"args": {"lr": None}} and run.finished
    assert run.logged == [{"loss": 1.0, "update": 3}, {"eval/perplexity": 2.0, "update": 3}]


def test_in_wandb_updates_that_are_done_again_count():
    """After a rollback or a resume the update goes back; the curves are drawn over it."""
    run = FakeWandb()
    sink = WandbSink(run)
    for update in (1, 2, 3, 2, 3):
        sink.event("update", {"update": update, "loss": 1.0})
    assert run.axes == {"update": None, "*": "update"}
    assert [fields["update"] for fields in run.logged] == [1, 2, 3, 2, 3]


@pytest.mark.parametrize("updates", [True, False])
def test_the_log_has_evaluations_and_an_update_now_and_then(updates):
    """The first update and the last one: the others come within LOG_PERIOD."""
    sink = LogSink(total=4, updates=updates)
    with logged("INFO") as lines:
        for update in range(1, 5):
            sink.event("update", UPDATE | {"update": update})
        sink.event("eval", {"update": 4, "perplexity": 7.389, "loss": 2.0, "tokens": 1000})
    found = [line.strip() for line in lines]
    assert found[-1] == "update 4: validation perplexity 7.39 (loss 2.0000 on 1,000 tokens)"
    assert [line.split()[1] for line in found[:-1]] == (["1/4", "4/4"] if updates else [])


def test_a_bar_goes_on_where_the_run_does():
    sink = BarSink(total=10)
    sink.event("resume", {"update": 6, "checkpoint": "here"})
    sink.event("update", UPDATE | {"update": 7})
    assert sink._bar.n == (7 if sink.visible else 6)
    sink.close()


def test_tensorboard_reads_the_curves(tiny, tmp_path, monkeypatch):
    """As the user starts it; without the package, one line says so."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert torchrun_main.command_line(tiny.flags(tmp_path, tensorboard=True)) == 0
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.value for point in events.Scalars("update/loss")] == pytest.approx(losses(tmp_path))
    assert events.Scalars("eval/perplexity")[-1].step == 6
    monkeypatch.setattr("peft_pretraining.cli.args.find_spec", lambda name: None)
    assert "pip install tensorboard" in flags_refusal("--tensorboard")
