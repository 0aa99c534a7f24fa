"""Data that is no longer the same is noticed, and a data set that has only moved is not."""

import shutil
from pathlib import Path

import pytest

from peft_pretraining.data import hub as hub_stream
from peft_pretraining.data.fingerprint import EDGE, describe_change, fingerprint_files
from peft_pretraining.data.hub import HubDocuments
from peft_pretraining.data.sources import open_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/x.jsonl", "b/x.jsonl", "c.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * EDGE)
    return tmp_path / "data"


def fingerprint(folder: Path) -> dict[str, str]:
    return fingerprint_files(sorted(folder.rglob("*.jsonl")))


def test_names_are_relative_and_a_copy_is_the_same(folder: Path, tmp_path: Path) -> None:
    saved = fingerprint(folder)
    assert sorted(saved) == ["a/x.jsonl", "b/x.jsonl", "c.jsonl"] and len(set(saved.values())) == 3
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(copy) == saved
    assert describe_change(saved, fingerprint(copy)) is None


def test_changes_are_named(folder: Path) -> None:
    saved = fingerprint(folder)
    content = bytearray((folder / "c.jsonl").read_bytes())
    content[-1] ^= 1  # of the same size
    (folder / "c.jsonl").write_bytes(content)
    (folder / "a" / "x.jsonl").unlink()
    for i in range(5):
        (folder / f"new{i}.jsonl").write_text("x")
    assert describe_change(saved, fingerprint(folder)) == (
        "changed: c.jsonl; missing: a/x.jsonl; added: new0.jsonl, new1.jsonl, new2.jsonl and 2 more"
    )


def test_what_is_unknown_has_not_changed(folder: Path) -> None:
    assert describe_change({}, fingerprint(folder)) is None and describe_change(fingerprint(folder), {}) is None


def test_sources_have_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(open_documents(str(folder / "c.jsonl"), split="train", seed=0).fingerprint()) == ["c.jsonl"]
    monkeypatch.setattr(hub_stream, "probe_hub", lambda: "5e0f")
    monkeypatch.setattr(HubDocuments, "_open", lambda self: None)
    source = HubDocuments(split="train", seed=0)
    assert source.fingerprint() == {}
    source.check()
    assert source.fingerprint() == {"allenai/c4": "5e0f"}
