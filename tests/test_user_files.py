"""Data as people have it: folders with more in them than shards, files of every kind, and what is said of each."""

import gzip
import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest
from support.documents import error_of, read
from support.runs import record

import torchrun_main
from peft_pretraining.data.sources import open_documents

TEXTS = ["one fine day", "another", "the third"]


def lines(texts=TEXTS, field="text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_all(dataset, *, split="validation", **options):
    return read(open_documents(str(dataset), split=split, seed=0, **options))


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", lines()), ("a.ndjson", lines()), ("A.JSONL", lines()), ("a.json", lines()),
    ("a.jsonl.gz", gzip.compress(lines(), mtime=0)), ("a.jsonl.zst", zstd(lines())), ("a.ndjson.zst", zstd(lines())),
    ("a.txt", "\n\n".join(TEXTS).encode()),
    ("a.txt.zst", zstd("\r\n\r\n".join(TEXTS).encode())), ("a.jsonl", b"\xef\xbb\xbf" + lines()),
    ("a.jsonl", lines().replace(b"\n", b"\r\n\r\n")), ("a.jsonl", lines().rstrip(b"\n")),
])  # fmt: skip
def test_files_of_every_kind_are_read(tmp_path, name, content):
    path = write(tmp_path / name, content)
    assert read_all("pydocs", validation=str(path)) == TEXTS


def test_a_zst_file_of_several_frames(tmp_path):
    path = write(tmp_path / "a.json.zst", zstd(lines()) + zstd(lines(["a second frame"])))
    assert read_all("pydocs", validation=str(path)) == [*TEXTS, "a second frame"]


def test_a_damaged_zst_file_is_read_as_far_as_it_goes(tmp_path):
    texts = [os.urandom(400).hex() for _ in range(2000)]
    path = write(tmp_path / "a.jsonl.zst", zstd(lines(texts))[:-1000])
    found = read_all("pydocs", validation=str(path))
    assert 0 < len(found) < 2000 and found == texts[: len(found)]


def test_the_fake_files_of_macos_are_no_shards(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"c4-{split}.00000.json.gz", gzip.compress(lines(), mtime=0))
        write(tmp_path / f"._c4-{split}.00000.json.gz", b"\0\5\26\7")
    assert read_all(tmp_path) == TEXTS


def test_a_snapshot_of_the_hub_is_found(tmp_path):
    table = pyarrow.table({"text": TEXTS})
    (tmp_path / "data").mkdir()
    write(tmp_path / "README.md", b"---\n")
    write(tmp_path / ".gitattributes", b"*")
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "data" / "validation-00000-of-00001.parquet")
    assert read_all(tmp_path) == TEXTS


def test_a_folder_for_validation_may_hold_files_of_any_name(tmp_path):
    write(tmp_path / "c4-heldout.json.gz", gzip.compress(lines(), mtime=0))
    assert read_all("pydocs", validation=str(tmp_path)) == TEXTS
    assert "no train files" in error_of(tmp_path)


@pytest.mark.parametrize("name, content, says", [
    ("train-1.jsonl", b"", "empty files in .*: train-1.jsonl"),
    ("train-1.json.gz", b"version https://git-lfs", "Git LFS pointers .* git lfs pull"),
    ("train-1.jsonl.bz2", b"BZh", "shards that cannot be read: train-1.jsonl.bz2"),
    ("train-1.csv", b"text\n", "shards that cannot be read: train-1.csv"),
    ("train-1.jsonl", None, "links that lead nowhere in .*: train-1.jsonl"),
])  # fmt: skip
def test_a_shard_that_cannot_be_read_is_never_left_out(tmp_path, name, content, says):
    write(tmp_path / "train-0.jsonl", lines())
    if content is None:
        (tmp_path / name).symlink_to(tmp_path / "gone.jsonl")
    else:
        write(tmp_path / name, content)
    assert_says(says, str(tmp_path))


def assert_says(says, dataset, **options):
    text = error_of(dataset, **options)
    assert re.search(says, text) and "\n" not in text, text


def test_other_data_beside_shards_is_named(tmp_path, capsys):
    from peft_pretraining.training.metrics import set_up_log

    set_up_log(is_main=True)
    for name in ("train-0.jsonl", "part-1.jsonl", "extra.parquet", "README.md", "SHA256SUMS"):
        write(tmp_path / name, lines())
    open_documents(str(tmp_path), split="train", seed=0)
    log = capsys.readouterr().err
    assert "not read in" in log and "extra.parquet, part-1.jsonl" in log and "README" not in log


@pytest.mark.parametrize("field, rows", [
    ("content", [{"content": text, "text": 3} for text in TEXTS]),
    ("meta.body", [{"meta": {"body": text}} for text in TEXTS]),
    ("meta.body", [{"meta.body": text, "meta": {"body": 1}} for text in TEXTS]),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_text_may_be_in_any_field(tmp_path, kind, field, rows):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_all("pydocs", validation=str(path), text_field=field) == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_null_is_an_empty_document(tmp_path, kind):
    rows = [{"text": text} for text in (TEXTS[0], None, TEXTS[1])]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_all("pydocs", validation=str(path)) == [TEXTS[0], "", TEXTS[1]]


@pytest.mark.parametrize("content, says", [
    (json.dumps([{"text": "a"}]).encode(), "a JSON array. Write one object a line"),
    (json.dumps([{"text": "a"}], indent=1).encode(), "JSON that spans several lines"),
    (b'{"content": "a"}\n', r'no "text" field \(fields: content\). Name the one that holds text: --text_field'),
    (b'{"text": ["a"]}\n', '"text" is not a string'),
    ("\ufeff{}".encode("utf-16"), "not valid UTF-8"),
])  # fmt: skip
def test_what_is_no_text_is_said_in_one_line(tmp_path, content, says):
    path = write(tmp_path / "a.jsonl", content)
    text = error_of(path)
    assert re.search(says, text) and "\n" not in text, text


def test_a_missing_column_names_the_ones_that_are_there(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS}), path)
    assert 'has no "text" column (columns: content)' in error_of(path)


@pytest.mark.parametrize("type", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_parquet_strings_of_any_type(tmp_path, type):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(TEXTS).cast(type)}), path, compression="zstd")
    assert read_all("pydocs", validation=str(path)) == TEXTS


def test_a_folder_with_glob_characters_in_its_name(tmp_path):
    write(tmp_path / "run[1]" / "train-0.jsonl", lines())
    folder = tmp_path / "run[1]"
    assert open_documents(str(folder), split="train", seed=0).name.startswith("1 file in")
    assert_says(r"write \[\[\] for a \[ in a name", f"{folder}/*.jsonl")


def test_a_bad_document_counts_once_however_many_epochs(tiny, tmp_path):
    """A small set with one bad line is read over and over; the run must not end for it."""
    good = [" ".join(["ba", "de", "fi", "go"] * 10)] * 6
    write(tmp_path / "data" / "train-0.jsonl", lines(good) + b"not json\n")
    write(tmp_path / "data" / "validation-0.jsonl", lines(good))
    flags = tiny.flags(tmp_path / "run", dataset=tmp_path / "data", max_bad_documents=1, num_training_steps=12)
    assert torchrun_main.command_line(flags) == 0
    events = record(tmp_path / "run", "bad_documents")
    assert len(events) > 2 and {event["total"] for event in events} == {1}


def test_a_changed_validation_set_is_warned_of(tiny, tmp_path, capsys):
    text = " ".join(["ba", "de", "fi", "go"] * 10)
    held_out = write(tmp_path / "held.jsonl", lines([text] * 20))
    shared = dict(validation=held_out, save_every=3)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "run", **shared)) == 0
    write(held_out, lines([text + " hu"] * 20))
    more = dict(continue_from=tmp_path / "run" / "checkpoint-00000003", **shared)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "more", **more)) == 0
    assert "the validation data has changed: changed: held.jsonl" in capsys.readouterr().err
