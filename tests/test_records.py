"""Formats, and what can be wrong with a file: what can be read is read, the rest is named."""

import errno
import gzip
import io
import json
import random
from pathlib import Path

import pytest
from support.documents import error_of, read, skipped, texts, write_jsonl

from peft_pretraining.data import records, retry
from peft_pretraining.data.order import Skipped
from peft_pretraining.data.sources import LocalDocuments, open_documents
from peft_pretraining.errors import UserError


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
    assert read(source) == ["a", ""] and not skipped(source), "null is no text"
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
        'no "text" field (fields: body, u\\ud800l\\n). Name the one that holds text: --text_field'
    )
    assert problem_with(b'["a"]').startswith("a JSON array.")
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
    assert sum(isinstance(item, Skipped) for item in source.read(epoch=4, readers=3)) == 1
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
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    with pytest.raises(UserError, match=f"cannot read {path}: No such file or directory. Bring it back"):
        read(source)
    assert waited == list(records.RETRY_WAITS)

    monkeypatch.setattr(retry.time, "sleep", lambda _: (tmp_path / "elsewhere").rename(path))
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
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    found = [record.text() for record in records.read_records(path)]
    assert found == [f"first {i}\nsecond {i}" for i in range(20)]
    assert opened > 5
