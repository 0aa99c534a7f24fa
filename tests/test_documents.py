"""Local documents: every one once per epoch, in one global order, with errors that name the line."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.documents import error_of, read, texts, write_jsonl
from support.runs import ROOT

from peft_pretraining.data import sources as documents
from peft_pretraining.data.sources import HELD_OUT, LocalDocuments, find_files, open_documents, split_of


@pytest.fixture
def c4_folder(tmp_path: Path) -> Path:
    """Three shards of unequal size and a validation shard, in C4's layout."""
    for shard, count in enumerate((40, 13, 70)):
        write_jsonl(tmp_path / "en" / f"c4-train.{shard:05}-of-00003.json.gz", texts(f"shard {shard}", count))
    write_jsonl(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz", texts("validation", 9))
    return tmp_path


# The folder's two splits


def test_folder_splits_and_names(c4_folder: Path) -> None:
    train = open_documents(str(c4_folder), split="train", seed=0)
    validation = open_documents(str(c4_folder), split="validation", seed=0)
    assert len(set(read(train))) == len(read(train)) == 123
    assert read(validation) == texts("validation", 9)  # in file order
    assert train.name == f"3 files in {c4_folder / 'en'}"
    assert validation.name == f"1 file in {c4_folder / 'en'}"


@pytest.mark.parametrize("readers", [1, 2, 5, 8])
def test_readers_share_one_global_order(c4_folder: Path, readers: int) -> None:
    source = open_documents(str(c4_folder), split="train", seed=3)
    for epoch in range(3):
        whole = read(source, epoch=epoch)
        shares = [read(source, epoch=epoch, reader=reader, readers=readers) for reader in range(readers)]
        assert Counter(sum(shares, [])) == Counter(whole)
        assert [shares[(i - epoch) % readers][i // readers] for i in range(len(whole))] == whole


def test_epochs_and_seeds_differ_and_repeat(c4_folder: Path) -> None:
    def order(seed: int, epoch: int) -> list[str]:
        return read(open_documents(str(c4_folder), split="train", seed=seed), epoch=epoch)

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(Counter(other) == Counter(orders[0]) for other in orders)
    assert orders[0] == order(0, 0)
    # Independent permutations of 123 documents agree in one place on average.
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 10


def test_readers_that_outnumber_documents_each_get_some(tmp_path: Path) -> None:
    """A DataLoader waits for each of its workers, so one that never finds a document would hang the run."""
    source = LocalDocuments([write_jsonl(tmp_path / "a.jsonl", texts("a", 3))], name="", seed=0, shuffle=True)
    counts = [
        sum(len(read(source, epoch=epoch, reader=reader, readers=8)) for epoch in range(8)) for reader in range(8)
    ]
    assert counts == [3] * 8


def test_pydocs_has_both_splits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from peft_pretraining.data import pydocs

    monkeypatch.setattr(pydocs, "pydocs_files", lambda split: [write_jsonl(tmp_path / f"{split}.jsonl.gz", [split])])
    for split in ("train", "validation"):
        source = open_documents("pydocs", split=split, seed=0)
        assert (source.name, read(source)) == (f"pydocs, {split} (1 file)", [split])
    other = open_documents(str(tmp_path / "train.jsonl.gz"), split="validation", seed=0, validation="pydocs")
    assert read(other) == ["validation"]


# Held-out documents


def test_held_out_documents_are_disjoint_complete_and_stable(tmp_path: Path) -> None:
    everything = texts("book", 5000)
    one = write_jsonl(tmp_path / "one.jsonl", everything)
    write_jsonl(tmp_path / "parts" / "a.jsonl", everything[4000:])
    write_jsonl(tmp_path / "parts" / "b.jsonl", everything[:4000])
    splits = {}
    for dataset in (str(one), f"{tmp_path}/parts/*.jsonl"):
        train = open_documents(dataset, split="train", seed=0)
        validation = open_documents(dataset, split="validation", seed=1)
        splits[dataset] = set(read(train)), set(read(validation))
        assert "held out for validation" in train.name and "held out from training" in validation.name
        shares = [read(train, epoch=2, reader=reader, readers=3) for reader in range(3)]
        assert Counter(sum(shares, [])) == Counter(read(train))
    (train_texts, held_out), other = splits.values()
    assert (train_texts, held_out) == other  # the same ones however the files are cut
    assert train_texts | held_out == set(everything) and not train_texts & held_out
    assert 30 <= len(held_out) <= 75  # 5000 / HELD_OUT = 50, standard deviation 7


def test_held_out_documents_are_frozen() -> None:
    """A run that a later version resumes must not be validated on what it was trained on."""
    assert HELD_OUT == 100
    assert [i for i in range(300) if split_of(f"book document {i}") == "validation"] == [146, 165, 234, 249, 286]


def test_validation_of_its_own_replaces_the_held_out_one(tmp_path: Path) -> None:
    train_file = write_jsonl(tmp_path / "train.jsonl", texts("train", 300))
    own = write_jsonl(tmp_path / "dev.jsonl", texts("dev", 4))
    train = open_documents(str(train_file), split="train", seed=0, validation=str(own))
    validation = open_documents(str(train_file), split="validation", seed=0, validation=str(own))
    assert len(read(train)) == 300
    assert read(validation) == texts("dev", 4)


def test_folder_without_validation_holds_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-0.jsonl", texts("book", 1000))
    splits = [read(open_documents(str(tmp_path), split=split, seed=0)) for split in ("train", "validation")]
    assert len(splits[0]) + len(splits[1]) == 1000 and len(splits[1]) > 0


# Dependencies


def test_local_files_need_neither_datasets_nor_pyarrow(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", texts("a", 3))
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(b"PAR1")
    script = f"""
import sys
sys.modules["datasets"] = sys.modules["pyarrow"] = sys.modules["huggingface_hub"] = None
from peft_pretraining.data.sources import open_documents
from peft_pretraining.errors import UserError
source = open_documents({str(tmp_path)!r}, split="train", seed=0, validation="unused")
print(len(list(source.read(epoch=0))))
for dataset in ({str(parquet)!r}, "c4"):
    try:
        open_documents(dataset, split="train", seed=0).check()
    except UserError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    lines = run.stdout.splitlines()
    assert lines[0] == "3", run.stderr
    assert lines[1] == f"{parquet}: reading it needs pyarrow (pip install pyarrow)."
    assert lines[2].startswith("--dataset c4 needs the datasets package (pip install datasets)")


# Errors read like advice


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    advice = "Give a folder, a file, a glob in quotes, or one of: c4, pydocs."
    assert error_of("no/such/folder") == f"no such file or folder: no/such/folder. {advice}"
    assert error_of(tmp_path / "*.jsonl") == f"no file matches {tmp_path}/*.jsonl. {advice}"
    assert error_of(tmp_path).startswith(f"no train files in {tmp_path}, or in its folders en and data. Name them")
    write_jsonl(tmp_path / "c4-validation.json", ["a"])
    assert error_of(tmp_path).startswith(f"{tmp_path} holds a validation split but no train files. Name them like")
    (tmp_path / "a.csv").write_text("a\n")
    assert error_of(tmp_path / "a.csv").startswith(f"cannot read {tmp_path / 'a.csv'}: its suffix is none of .json,")
    assert "no such file" in error_of(tmp_path / "c4-validation.json", split="validation", validation="nowhere")


def test_datasets_without_documents(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert error_of(empty).startswith(f"empty files in {tmp_path}: empty.jsonl")
    assert error_of(write_jsonl(tmp_path / "blank.jsonl", ["", " \n"])).startswith("no document in")
    few = write_jsonl(tmp_path / "few.jsonl", ["one"])
    assert error_of(few, split="validation").endswith("Give a larger dataset, or --validation PATH.")


def test_a_source_without_any_readable_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n" * 10)
    assert error_of(path, validation="unused").startswith(
        f'no document in {path} can be read. The first problem: {path} line 1: no "text" field'
    )
    path.write_text("{}\n" * 10 + '{"text": "late"}\n')
    open_documents(str(path), split="train", seed=0, validation="unused").check()
    monkeypatch.setattr(documents, "MAX_UNREADABLE", 10)
    assert "can be read" in error_of(path, validation="unused")


def test_find_files_sorts_and_expands(tmp_path: Path) -> None:
    for name in ("c.jsonl", "a.txt", "b.jsonl.gz"):
        (tmp_path / name).write_text("a\n")
    assert [path.name for path in find_files(f"{tmp_path}/*")["train"]] == ["a.txt", "b.jsonl.gz", "c.jsonl"]
