"""The page that a run keeps: when it is drawn, what that may cost, and that it never stops the run."""

import pytest
from support.run_records import evaluation, start, subspaces, update, write
from support.runs import run

from peft_pretraining.training import report_sink
from peft_pretraining.training.report_sink import PAGE, SHARE, ReportSink


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(report_sink, "time", clock)
    return clock


def drawings(monkeypatch, clock, *, seconds: float) -> list[float]:
    """The times at which pages are drawn from now on, each of which takes `seconds`."""
    drawn = []

    def write_report(runs, out):
        clock.now += seconds
        drawn.append(clock.now)

    monkeypatch.setattr("peft_pretraining.report.page.write_report", write_report)
    return drawn


@pytest.mark.parametrize("seconds", [2.0, 10.0])
def test_pages_take_less_than_their_share(monkeypatch, clock, tmp_path, seconds):
    """An evaluation every 20 s: drawn as often as 1% allows, and at the end. A first page of 10 s is not foreseen."""
    drawn, sink = drawings(monkeypatch, clock, seconds=seconds), ReportSink(tmp_path)
    for number in range(1, 501):
        clock.now += 20
        sink.event("update", {"update": number})
        sink.event("eval", {"update": number})
        sink.event("subspaces", {"update": number})
        assert seconds * len(drawn) <= SHARE * (clock.now - 100) or drawn == drawn[:1]
    assert 90 <= seconds * len(drawn) <= 110 and drawn[0] >= 100 + 300
    sink.event("end", {})
    before = len(drawn)
    sink.close()
    assert len(drawn) == before + 1


def test_a_page_that_is_new_is_not_drawn_again(monkeypatch, clock, tmp_path):
    drawn, sink = drawings(monkeypatch, clock, seconds=0.1), ReportSink(tmp_path)
    sink.close()
    assert not drawn  # nothing happened
    clock.now += 1000
    for name in ("start", "update", "eval", "subspaces"):
        sink.event(name, {"update": 1})
    sink.close()
    assert len(drawn) == 1


def test_the_page_has_the_subspaces_of_its_evaluation(clock, tmp_path):
    """They come in an event after that of the evaluation."""
    sink = ReportSink(tmp_path)
    clock.now += 1000
    lines = [start(), update(1), evaluation(1, perplexity=30.0), subspaces(1, refreshes={"q_proj": 1}, overlap=0.5)]
    for count, line in enumerate(lines, start=1):
        write(tmp_path, lines[:count])
        sink.event(line["event"], line)
    assert 'aria-label="Overlap of the last two bases"' in (tmp_path / PAGE).read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_run_writes_its_page_at_its_end(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "on", no_report=None, optimizer="galore_adamw", rank=4)
    assert capsys.readouterr().err.rstrip().endswith(f"the page of this run: {tmp_path / 'on' / PAGE}")
    text = (tmp_path / "on" / PAGE).read_text()
    assert "finished after 6 updates" in text and text.count("<figure>") == 12 - 1  # no overlap is measured
    run(tiny, tmp_path / "off")
    assert not (tmp_path / "off" / PAGE).exists()


def test_a_page_that_cannot_be_drawn_is_one_warning(monkeypatch, tiny, tmp_path, capsys):
    """Also after a failure at an evaluation: no second try, and the run comes to its end."""

    def write_report(runs, out):
        raise OSError("the disk\nis full")

    monkeypatch.setattr("peft_pretraining.report.page.write_report", write_report)
    monkeypatch.setattr(report_sink, "AT_LEAST", 0.0)
    run(tiny, tmp_path, no_report=None, eval_every=2)
    lines = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in lines if PAGE in line]
    assert "WARNING" in warning and "could not be drawn (the disk is full)" in warning


def test_without_matplotlib_a_run_says_so_and_goes_on(monkeypatch, tiny, tmp_path, capsys):
    monkeypatch.setattr(report_sink, "find_spec", lambda name: None)
    run(tiny, tmp_path, no_report=None)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if PAGE in line]
    assert "matplotlib is not installed" in line and not (tmp_path / PAGE).exists()
