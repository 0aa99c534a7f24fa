"""A run of a preset says whether it is where the preset's own run was."""

import json

import pytest
from loguru import logger
from support.runs import run

from peft_pretraining.cli import presets
from peft_pretraining.data.sources import open_documents
from peft_pretraining.training.expectation import TOLERANCE, ExpectationSink, digest
from peft_pretraining.training.metrics import Record


@pytest.fixture
def preset(tiny, tmp_path, monkeypatch):
    """Writes a preset `small`, whose own run had this perplexity after 3 updates, on this text."""
    monkeypatch.setattr(presets, "FOLDER", tmp_path)

    def write(perplexity, *, text=None):
        validation = open_documents(str(tiny.data), split="validation", seed=0).fingerprint()
        expected = {"validation": text or digest(validation), "perplexity": {"3": perplexity}}
        known = {"about": "a run", "source": "docs/results.md", "perplexity": None, "expected": expected}
        (tmp_path / "small.json").write_text(json.dumps(known | {"flags": {"optimizer": "adamw", "lr": 0.01}}))

    return write


def said(tiny, tmp_path, capfd, **flags) -> str:
    """What a run of the preset says after its evaluations at updates 3 and 6."""
    run(tiny, tmp_path / f"run{len(list(tmp_path.iterdir()))}", preset="small", eval_every=3, **{"lr": None} | flags)
    return capfd.readouterr().err


def test_a_run_that_is_behind_says_so(preset, tiny, tmp_path, capfd):
    preset(1.5)
    found = said(tiny, tmp_path, capfd)
    assert found.count("behind: --preset small was at perplexity 1.50 after 3 updates") == 1
    preset(1e6)
    assert "as expected: --preset small was at perplexity 1000000.00" in said(tiny, tmp_path, capfd)


def test_other_text_or_other_flags_are_not_compared(preset, tiny, tmp_path, capfd):
    preset(1.5, text="of another text")
    assert "was at perplexity" not in said(tiny, tmp_path, capfd)
    preset(1.5)
    assert "was at perplexity" not in said(tiny, tmp_path, capfd, lr=0.02)


def test_a_little_behind_is_as_expected():
    sink = ExpectationSink("small", perplexity={3: 100.0})
    record, told = Record(sink), []
    number = logger.add(told.append, format="{level} {message}")
    for perplexity in (100 * (1 + 0.9 * TOLERANCE), 100 * (1 + 1.1 * TOLERANCE)):
        record.event("eval", update=3, perplexity=perplexity)
        record.event("eval", update=4, perplexity=perplexity)
        record.event("update", update=3)
    logger.remove(number)
    assert [line.split()[0] for line in told] == ["INFO", "WARNING"]
