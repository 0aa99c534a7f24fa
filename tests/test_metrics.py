"""The record: every event reaches every sink, and each sink makes of it what it is for."""

import io
import json
import math
import sys
import types

import pytest
from loguru import logger
from support.checkpoints import logged
from support.command_line import flags_refusal
from support.runs import losses

import torchrun_main
from peft_pretraining.training.metrics import BarSink, JsonlSink, LogSink, Record, WandbSink, set_up_log, shows_colors

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


def fake_packages(monkeypatch) -> dict[str, list]:
    """Stand-ins for wandb and TensorBoard; what each is given."""
    given = {"wandb": [], "tensorboard": []}

    class Wandb(FakeWandb):
        id = "abc"

        def log(self, fields):
            given["wandb"] += [("update/loss", fields["update"], fields["loss"])] if "loss" in fields else []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, update):
            given["tensorboard"] += [(name, update, value)] if name == "update/loss" else []

        def close(self):
            pass

    wandb = types.SimpleNamespace(
        api=types.SimpleNamespace(api_key="x"), init=lambda **options: Wandb(), Settings=lambda **options: None
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr("peft_pretraining.cli.args.find_spec", lambda name: True)
    return given


@pytest.mark.parametrize("sinks", [(), ("wandb",), ("tensorboard",), ("wandb", "tensorboard")], ids=" and ".join)
def test_curves_go_where_they_were_asked_for(tiny, tmp_path, monkeypatch, sinks):
    """Both, one or none; metrics.jsonl always."""
    given = fake_packages(monkeypatch)
    flags = dict(wandb_mode="online" if "wandb" in sinks else "disabled", tensorboard="tensorboard" in sinks or None)
    assert torchrun_main.command_line(tiny.flags(tmp_path, num_training_steps=3, **flags)) == 0
    curve = [("update/loss", update, loss) for update, loss in enumerate(losses(tmp_path), start=1)]
    assert len(curve) == 3 and given == {name: curve if name in sinks else [] for name in given}


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal, environment, colors", [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"NO_COLOR": ""}, True),
    (True, {"TERM": "dumb"}, False), (False, {"FORCE_COLOR": "1"}, True),
    (True, {"NO_COLOR": "0", "FORCE_COLOR": "1"}, False),
], ids=str)  # fmt: skip
def test_colors_are_for_terminals_that_want_them(monkeypatch, terminal, environment, colors):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shows_colors(Stream(terminal)) == colors
    monkeypatch.setattr("sys.stderr", Stream(terminal))
    set_up_log(is_main=True)
    logger.info("one line")
    assert ("\x1b[" in sys.stderr.getvalue()) == colors and "one line" in sys.stderr.getvalue()
    logger.remove()


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
