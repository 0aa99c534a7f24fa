"""Local documents: every one once per epoch, in one global order, with errors that name the line."""

import errno
import gzip
import io
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from peft_pretraining import documents, records
from peft_pretraining.document_order import Document, Skipped
from peft_pretraining.documents import HELD_OUT, LocalDocuments, find_files, open_documents, split_of
from peft_pretraining.errors import UserError

ROOT = Path(__file__).parents[1]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def texts(prefix: str, count: int) -> list[str]:
    return [f"{prefix} document {i}" for i in range(count)]


def read(source: documents.DocumentSource, epoch: int = 0, reader: int = 0, readers: int = 1) -> list[str]:
    items = source.read(epoch=epoch, reader=reader, readers=readers)
    return [item.text for item in items if isinstance(item, Document)]


def skipped(source: documents.DocumentSource) -> list[str]:
    return [item.reason for item in source.read(epoch=0, reader=0, readers=1) if isinstance(item, Skipped)]


def error_of(dataset: Path | str, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        open_documents(str(dataset), split=options.pop("split", "train"), seed=0, **options).check()
    message = str(caught.value)
    assert "\n" not in message
    return message


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
    from peft_pretraining import pydocs

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


# Formats


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = write_jsonl(tmp_path / f"a{suffix}", ["one", "zwei\nZeilen", "三"])
    assert [record.text() for record in records.read_records(path)] == ["one", "zwei\nZeilen", "三"]


def test_json_oddities(tmp_path: Path) -> None:
    """A byte-order mark, a blank line, no newline at the end, and half a surrogate pair, which no tokenizer takes."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\r\n{"text": "\\ud800b"}\n{"text": "c"}')
    assert [(record.line, record.text()) for record in records.read_records(path)] == [(1, "a"), (3, "?b"), (4, "c")]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_text_documents_are_separated_by_blank_lines(tmp_path: Path, suffix: str) -> None:
    content = b"\n\nfirst\nits second line\n\n \t\nsecond\r\n\nthird"
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    found = [(record.line, record.text()) for record in records.read_records(path)]
    assert found == [(3, "first\nits second line"), (7, "second"), (9, "third")]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts("p", 3000), "id": range(3000)}), path, row_group_size=700)
    assert [record.text() for record in records.read_records(path)] == texts("p", 3000)

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    source = open_documents(str(path), split="train", seed=0, validation="unused")
    assert read(source) == ["a"]
    assert skipped(source) == [f'{path} row 2: "text" is not a string but null. Fix or remove it.']
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    unreadable = f"no document in {path}, without the 1 in 100 documents held out for validation can be read. "
    assert error_of(path) == f'{unreadable}The first problem: {path} has no "text" column (columns: body).'
    path.write_bytes(b"PAR1 and then nothing")
    assert error_of(path).startswith(f"{unreadable}The first problem: {path} is damaged after row 0 (")


def test_parquet_begins_at_any_row_and_keeps_what_is_not_damaged(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "train.parquet"
    rows = [b"row %d" % i for i in range(50)]
    rows[7] = b"\xff"
    column = pyarrow.array(rows, pyarrow.binary()).view(pyarrow.string())  # as other writers leave it: unchecked
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=20, compression="gzip")
    for start in (1, 8, 20, 21, 50, 51):
        assert [record.line for record in records.read_records(path, line=start)] == list(range(start, 51))
    source = LocalDocuments([path], name="", seed=0, shuffle=False)
    assert len(read(source)) == 49
    assert skipped(source)[0].startswith(f"{path} row 8: not valid UTF-8 (byte 0xff at column 1).")

    content = bytearray(path.read_bytes())
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    end = group.data_page_offset + 40
    content[group.data_page_offset - 10 : end] = bytes(50)
    path.write_bytes(bytes(content))
    assert read(source) == [f"row {i}" for i in range(20) if i != 7]
    assert skipped(source)[1].startswith(f"{path} is damaged after row 20 (")
    assert [record.line for record in records.read_records(path, line=21)] == [21]


def test_local_files_need_neither_datasets_nor_pyarrow(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", texts("a", 3))
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(b"PAR1")
    script = f"""
import sys
sys.modules["datasets"] = sys.modules["pyarrow"] = sys.modules["huggingface_hub"] = None
from peft_pretraining.documents import open_documents
from peft_pretraining.errors import UserError
source = open_documents({str(tmp_path)!r}, split="train", seed=0, validation="unused")
print(len(list(source.read(epoch=0, reader=0, readers=1))))
for dataset in ({str(parquet)!r}, "c4"):
    try:
        open_documents(dataset, split="train", seed=0).check()
    except UserError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    lines = run.stdout.splitlines()
    assert lines[0] == "3", run.stderr
    assert lines[1] == f"{parquet}: reading .parquet needs pyarrow (pip install pyarrow)."
    assert lines[2].startswith("--dataset c4 needs the datasets package (pip install datasets)")


# Errors read like advice


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    advice = "Give a folder, a file, a glob in quotes, or one of: c4, pydocs."
    assert error_of("no/such/folder") == f"no such file or folder: no/such/folder. {advice}"
    assert error_of(tmp_path / "*.jsonl") == f"no file matches {tmp_path}/*.jsonl. {advice}"
    assert error_of(tmp_path).startswith(f"no train files in {tmp_path} or {tmp_path / 'en'}. Name them like")
    write_jsonl(tmp_path / "c4-validation.json", ["a"])
    assert error_of(tmp_path).startswith(f"{tmp_path} holds a validation split but no train files. Name them like")
    (tmp_path / "a.csv").touch()
    assert error_of(tmp_path / "a.csv").startswith(f"cannot read {tmp_path / 'a.csv'}: its suffix is none of .json.gz")
    assert "no such file" in error_of(tmp_path / "c4-validation.json", split="validation", validation="nowhere")


def test_datasets_without_documents(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert error_of(empty).startswith("no document in")
    assert error_of(write_jsonl(tmp_path / "blank.jsonl", ["", " \n"])).startswith("no document in")
    few = write_jsonl(tmp_path / "few.jsonl", ["one"])
    assert error_of(few, split="validation").endswith("Give a larger dataset, or --validation PATH.")


def test_bad_lines_are_skipped_and_named(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    good = '{"text": "fine"}\n'
    source = LocalDocuments([path], name="", seed=0, shuffle=True)

    def problem_with(line: bytes) -> str:
        path.write_bytes(good.encode() * 117 + line + b"\n" + good.encode())
        source.check()
        assert read(source) == ["fine"] * 118
        (reason,) = skipped(source)
        assert reason.startswith(f"{path} line 118: ") and "\n" not in reason
        return reason.removeprefix(f"{path} line 118: ")

    assert problem_with(b'{"text": "a" "b"}') == (
        "not valid JSON (Expecting ',' delimiter at column 14). Fix or remove the line."
    )
    assert problem_with(b'{"body": "a", "u\\ud800l\\n": 1}') == (
        'no "text" field (fields: body, u\\ud800l\\n). Rename the field that holds the text.'
    )
    assert problem_with(b'["a"]').startswith('not an object with a "text" field.')
    assert problem_with(b'{"text": 3}') == '"text" is not a string but 3. Fix or remove it.'
    assert problem_with(b'{"text": ' + b"1" * 5000 + b"}").startswith("JSON nested too deeply or numbers too long.")
    assert problem_with(b'{"text": "\xff"}') == (
        "not valid UTF-8 (byte 0xff at column 11). Convert the file to UTF-8 or remove the line."
    )


def test_bad_paragraphs_are_skipped_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\nthr\xe9e\n\nfour")
    source = LocalDocuments([path], name="", seed=0, shuffle=False)
    assert read(source) == ["one", "four"]
    assert skipped(source)[0].startswith(f"{path} line 4: not valid UTF-8 (byte 0xe9 at column 4).")


def test_a_source_without_any_readable_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n" * 10)
    assert error_of(path, validation="unused").startswith(
        f'no document in {path} can be read. The first problem: {path} line 1: no "text" field'
    )
    path.write_text("{}\n" * 10 + '{"text": "late"}\n')
    open_documents(str(path), split="train", seed=0, validation="unused").check()
    monkeypatch.setattr(documents, "MOST_UNREADABLE", 10)
    assert "can be read" in error_of(path, validation="unused")


@pytest.mark.parametrize("suffix", ["jsonl.gz", "txt.gz"])
def test_the_rest_of_a_damaged_file_is_skipped_and_reading_goes_on(tmp_path: Path, suffix: str) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", texts("good", 30))
    path = tmp_path / f"bad.{suffix}"
    whole = [random.Random(i).randbytes(300).hex() for i in range(400)]
    lines = [json.dumps({"text": text}) if suffix == "jsonl.gz" else f"{text}\n" for text in whole]
    path.write_bytes(gzip.compress("\n".join(lines).encode())[:50_000])
    source = LocalDocuments([path, good], name="", seed=0, shuffle=True)
    (reason,) = skipped(source)
    after = int(reason.removeprefix(f"{path} is damaged after line ").split()[0])
    saved = after if suffix == "jsonl.gz" else after // 2
    assert 50 < saved < 400
    assert sorted(read(source)) == sorted(whole[:saved] + texts("good", 30))
    assert "end-of-stream marker" in reason and reason.endswith("): the rest of it is skipped")
    # Once an epoch, by one reader only, and again where reading begins at that place.
    assert sum(isinstance(item, Skipped) for r in range(3) for item in source.read(epoch=4, reader=r, readers=3)) == 1
    (record,) = records.read_records(path, line=after + 1)
    assert record.problem == reason and record.line == after + 1


def test_false_and_empty_gzip_is_reported(tmp_path: Path) -> None:
    for content, problem in ((b"this is not gzip", "Not a gzipped file"), (b"", "the file is empty")):
        path = tmp_path / "bad.jsonl.gz"
        path.write_bytes(content)
        (reason,) = skipped(LocalDocuments([path], name="", seed=0, shuffle=True))
        assert reason.startswith(f"{path} is damaged after line 0 ({problem}")


def test_a_file_that_is_gone_is_waited_for_and_then_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", texts("a", 30))
    source = LocalDocuments([path], name="", seed=0, shuffle=True)
    path.rename(tmp_path / "elsewhere")
    waited: list[float] = []
    monkeypatch.setattr(records.time, "sleep", waited.append)
    with pytest.raises(UserError, match=f"cannot read {path}: No such file or directory. Bring it back"):
        read(source)
    assert waited == list(records.RETRY_WAITS)

    monkeypatch.setattr(records.time, "sleep", lambda _: (tmp_path / "elsewhere").rename(path))
    assert sorted(read(source)) == sorted(texts("a", 30))


def test_a_file_server_that_hiccups_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"first {i}\nsecond {i}" for i in range(20)))
    opened = 0
    real = records._open

    class Flaky(io.BufferedReader):
        def __next__(self) -> bytes:
            if self.tell() > 40 * opened:  # gets a little further each time
                raise OSError(errno.ESTALE, "Stale file handle")
            return super().__next__()

    def open_flaky(path: Path) -> io.BufferedReader:
        nonlocal opened
        opened += 1
        return Flaky(real(path).detach())

    monkeypatch.setattr(records, "_open", open_flaky)
    monkeypatch.setattr(records.time, "sleep", lambda _: None)
    found = [record.text() for record in records.read_records(path)]
    assert found == [f"first {i}\nsecond {i}" for i in range(20)]
    assert opened > 5


def test_find_files_sorts_and_expands(tmp_path: Path) -> None:
    for name in ("c.jsonl", "a.txt", "b.jsonl.gz"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(f"{tmp_path}/*")["train"]] == ["a.txt", "b.jsonl.gz", "c.jsonl"]
