"""Token shards: the batches of the text to the last bit, whoever wrote them, and no word of a damaged file."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import take
from support.command_line import message_of, refusal
from support.documents import skipped, write_jsonl
from support.resumed_runs import checkpoint
from support.runs import ROOT, losses, record, run

import torchrun_main
from peft_pretraining.data import order, pieces
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.position import Progress
from peft_pretraining.data.sources import open_documents
from peft_pretraining.data.token_shards import TokenIndex, read_index, verify
from peft_pretraining.data.token_writer import tokenize
from peft_pretraining.data.validation import ValidationSet
from scripts import tokenize_corpus

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*use of fork")


class Characters:
    """A token a character."""

    name, eos_id, pad_id = "characters", 0, 1

    def __init__(self, vocab_size: int = 1000) -> None:
        self.vocab_size = vocab_size

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(map(ord, text)) for text in texts]

    def digest(self) -> str:
        return f"characters of {self.vocab_size}"


def write_text(folder: Path, *, validation: bool = True) -> Path:
    """Files of unequal size with long, empty and bad documents, and on request none for validation."""
    rng = random.Random(0)
    for number, count in enumerate((50, 3, 37)):
        texts = [chr(0x100 + i) + "ab " * rng.choice((0, 1, 5, 20)) for i in range(count)]
        lines = [json.dumps({"text": text}) for text in texts]
        lines[2:2] = ["{}", "", '{"text": ""}', "broken"]
        folder.mkdir(exist_ok=True)
        (folder / f"train-{number}.jsonl").write_text("\n".join(lines) + "\n")
    if validation:
        write_jsonl(folder / "valid.jsonl", [f"held out {i}" for i in range(20)])
    return folder


def tokens_of(text: Path, output: Path, *, tokenizer: Any = None, **options: Any) -> TokenIndex:
    options = dict(validation=None, text_field="text", processes=2, max_bad_documents=100) | options
    return tokenize(str(text), tokenizer or Characters(), output, **options)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, chunks and pieces in little text."""
    monkeypatch.setattr(order, "BUFFER_RECORDS", 11)
    monkeypatch.setattr(order, "BUFFER_BYTES", 400)
    monkeypatch.setattr(pieces, "PIECE", 25)
    monkeypatch.setattr(pieces, "CHUNK", 5)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The text's twin


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("packing_kind", ["concat", "truncate"])
@pytest.mark.parametrize("workers, world_size", [(0, 1), (0, 2), (2, 1), (2, 2)])
def test_batches_are_those_of_the_text(tmp_path: Path, packing_kind: Any, workers: int, world_size: int) -> None:
    """Inputs, targets and positions, over epochs; and after a resume in the middle of text, from its position."""
    text = write_text(tmp_path / "text")
    tokens_of(text, tmp_path / "tokens")
    sources = [open_documents(str(tmp_path / name), split="train", seed=7) for name in ("text", "tokens")]
    options: dict[str, Any] = dict(batch_size=3, max_length=17, packing=packing_kind, workers=workers)
    total, stop = (60, 23) if not workers else (16, 5)

    def batches(source: Any, rank: int, count: int, resume: Any = None) -> list[Any]:
        made = train_batches(source, Characters(), rank=rank, world_size=world_size, resume=resume, **options)
        return take(made, count)

    whole = [[batches(source, rank, total) for rank in range(world_size)] for source in sources]
    assert workers or world_size > 1 or whole[0][0][-1].epoch >= 1
    saved = Progress.merged([ranked[stop - 1].position for ranked in whole[0]]).to_json()
    for rank, (expected, found) in enumerate(zip(*whole, strict=True)):
        rest = batches(sources[1], rank, total - stop, resume=saved)
        assert_equal(found, expected)
        assert [batch.position for batch in found] == [batch.position for batch in expected]
        assert_equal(rest, expected[stop:])


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.targets, other.targets)
        assert one.epoch == other.epoch


@pytest.mark.usefixtures("small")
def test_held_out_documents_are_those_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_pretraining.data.sources.HELD_OUT", 4)
    text = write_text(tmp_path / "text", validation=False)
    index = tokens_of(text, tmp_path / "tokens")
    counts = [index.count(split)["documents"] for split in ("train", "validation")]  # type: ignore[arg-type]
    assert sum(counts) == 90 and min(counts) > 10
    assert index.count("train")["bad_documents"] == 6, "three files with two each"
    options: dict[str, Any] = dict(batch_size=4, max_length=17, packing="concat")
    for dataset in (text, tmp_path / "tokens"):
        sources = [open_documents(str(dataset), split=split, seed=1) for split in ("train", "validation")]  # type: ignore[arg-type]
        training = take(train_batches(sources[0], Characters(), **options), 40)  # type: ignore[arg-type]
        held_out = ValidationSet(sources[1], Characters(), tokens=10**6, **options)  # type: ignore[arg-type]
        if dataset == text:
            expected = training, held_out
    assert_equal(training, expected[0])
    assert held_out.tokens == expected[1].tokens and torch.equal(held_out.sequences, expected[1].sequences)


def test_a_run_on_text_goes_on_from_its_tokens(tiny, tmp_path):
    """The whole program: losses and perplexity of a run on text, whose second half reads token shards."""
    flags = ["--dataset", tiny.data, "--tokenizer", tiny.tokenizer, "--output", tmp_path / "tokens"]
    assert tokenize_corpus.command_line([str(flag) for flag in flags]) == 0
    run(tiny, tmp_path / "text", save_every=3, keep_last=0)
    tokens = dict(dataset=tmp_path / "tokens", continue_from=checkpoint(tmp_path / "text", 3), allow_changed="dataset")
    run(tiny, tmp_path / "more", **tokens)
    assert losses(tmp_path / "more") == losses(tmp_path / "text")[3:]
    ends = [record(tmp_path / name, "end")[0]["perplexity"] for name in ("text", "more")]
    assert ends[0] == ends[1]
    other = tiny.flags(tmp_path / "third", dataset=tmp_path / "tokens", validation=tmp_path / "tokens")
    assert torchrun_main.command_line(other) == 0 and losses(tmp_path / "third") == losses(tmp_path / "text")


def test_a_streamed_data_set_is_tokenized_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def generate(shards: list[int]) -> Any:
        yield from ({"text": f"{shard} {i}"} for shard in shards for i in range(5))

    stream = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": [0, 1, 2]})
    monkeypatch.setattr("peft_pretraining.data.hub.probe_hub", lambda: "revision")
    monkeypatch.setattr("peft_pretraining.data.hub.load_stream", lambda split: stream)
    tokens_of(Path("c4"), tmp_path / "tokens")
    source = open_documents(str(tmp_path / "tokens"), split="validation", seed=0)
    found = ["".join(map(chr, d.text[0])) for d in source.read(epoch=0)]  # type: ignore[union-attr]
    assert found == [f"{shard} {i}" for shard in range(3) for i in range(5)]


# Writing


def test_the_folder_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    for processes in (1, 3):
        tokens_of(text, tmp_path / f"{processes}", processes=processes)
    assert content(tmp_path / "1") == content(tmp_path / "3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "text"]
    assert len(content(tmp_path / "1")) == 1 + 2 * 4


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [chr(vocab_size - 1) + "a", "b"])
    write_jsonl(tmp_path / "valid.jsonl", ["c"])
    index = tokens_of(tmp_path, tmp_path / "tokens", tokenizer=Characters(vocab_size))
    raw = np.fromfile(tmp_path / "tokens" / "train-00000.bin", index.dtype)
    assert index.dtype.name == dtype and raw.tolist() == [vocab_size - 1, ord("a"), ord("b")]


def test_bad_documents_are_counted_and_too_many_end_it(tmp_path: Path) -> None:
    """As in training. What was finished before is kept; with a larger limit it is the folder of an unbroken run."""
    text = write_text(tmp_path / "text")
    tokens_of(text, tmp_path / "whole")
    message = message_of(lambda: tokens_of(text, tmp_path / "tokens", processes=1, max_bad_documents=3))
    assert message.startswith(
        "4 documents could not be read (see above). Repair the data, or raise --max_bad_documents"
    )
    assert not (tmp_path / "tokens").exists()
    index = tokens_of(text, tmp_path / "tokens", processes=1, max_bad_documents=6)
    assert index.count("train") == {"documents": 90, "tokens": index.count("train")["tokens"], "bad_documents": 6}
    assert content(tmp_path / "tokens") == content(tmp_path / "whole")
    source = open_documents(str(tmp_path / "tokens"), split="train", seed=0)
    assert not skipped(source), "they were counted once"


@pytest.mark.slow
def test_after_a_kill_it_goes_on(tiny, tmp_path: Path) -> None:
    """Killed when some files are done: no folder is there, and the rest completes that of an unbroken run."""
    for number in range(400):
        write_jsonl(tmp_path / "text" / f"train-{number:03}.jsonl", [f"ba de fi {number}"] * 5)
    write_jsonl(tmp_path / "text" / "valid.jsonl", ["go hu"])
    flags = ["--dataset", tmp_path / "text", "--tokenizer", tiny.tokenizer]
    flags = [str(flag) for flag in (*flags, "--processes", 2, "--output", tmp_path / "tokens")]
    partial = tmp_path / ".tokens.incomplete" / "partial.json"
    with subprocess.Popen([sys.executable, "scripts/tokenize_corpus.py", *flags], cwd=ROOT, stderr=-1) as process:
        while not partial.exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "tokens").exists()
    done = len(read_index(partial.parent, name=partial.name).shards["train"])
    assert 0 < done < 400
    times = {path.name: path.stat().st_mtime_ns for path in partial.parent.glob("*.bin")}
    assert tokenize_corpus.command_line(flags) == 0
    assert tokenize_corpus.command_line([*flags[:-1], str(tmp_path / "whole")]) == 0
    assert content(tmp_path / "tokens") == content(tmp_path / "whole")
    kept = [name for name, when in times.items() if (tmp_path / "tokens" / name).stat().st_mtime_ns == when]
    assert len(kept) == done, "what was finished is not done again"


def test_other_text_or_another_tokenizer_begins_again(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    message_of(lambda: tokens_of(text, tmp_path / "tokens", processes=1, max_bad_documents=3))
    write_jsonl(text / "train-0.jsonl", ["other"])
    tokens_of(text, tmp_path / "tokens")
    message_of(lambda: tokens_of(text, tmp_path / "more", processes=1, max_bad_documents=3))
    tokens_of(text, tmp_path / "more", tokenizer=Characters(70_000))
    tokens_of(text, tmp_path / "whole", tokenizer=Characters(70_000))
    assert content(tmp_path / "more") == content(tmp_path / "whole") != content(tmp_path / "tokens")


# What is refused


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    return tokens_of(write_text(folder / "text"), folder / "tokens").folder


@pytest.fixture
def tokens(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "tokens"))


def read_all(folder: Path) -> list[str]:
    source = open_documents(str(folder), split="train", seed=0)
    source.check()
    return skipped(source)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.idx"])
def test_a_lost_or_cut_file_is_named_before_anything_is_read(tokens: Path, name: str) -> None:
    path, whole = tokens / name, (tokens / name).read_bytes()
    path.write_bytes(whole[:-4])
    message = message_of(partial(read_all, tokens))
    assert message.startswith(
        f"{path} has {len(whole) - 4} bytes, but was written with {len(whole)}. Bring the file back"
    )
    path.unlink()
    assert message_of(partial(read_all, tokens)).startswith(f"{path}: cannot be read (No such file or directory).")


def test_a_damaged_idx_is_named_when_it_is_opened_and_a_damaged_bin_by_verify(tokens: Path) -> None:
    index = read_index(tokens)
    verify(index)
    for name in ("train-00002.idx", "validation-00000.bin"):
        path, whole = tokens / name, (tokens / name).read_bytes()
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        assert message_of(lambda: verify(index)).startswith(f"{path} is damaged: its checksum is not the one")
        assert name.endswith(".bin") or message_of(partial(read_all, tokens)).startswith(f"{path} is damaged")
        path.write_bytes(whole)


def test_a_token_beyond_the_vocabulary_is_a_bad_document(tokens: Path) -> None:
    path, whole = tokens / "train-00001.bin", (tokens / "train-00001.bin").read_bytes()
    path.write_bytes(whole[:-1] + b"\xff")
    (reason,) = read_all(tokens)
    assert reason.startswith(f"{path} is damaged: among tokens ") and "where the vocabulary has 1000" in reason


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda index: index.update(format=2), "format 2, where this version reads 1"),
        (lambda index: index.update(dtype="uint32"), "not an index of token shards, or damaged"),
        (lambda index: index.pop("tokenizer"), "not an index of token shards, or damaged"),
        (lambda index: index["train"]["shards"].pop(), "not an index of token shards, or damaged"),
        (lambda index: index["train"]["shards"][0].update(name="../other"), "not an index of token shards, or damaged"),
        (lambda index: index["train"]["shards"][0].update(rows=-1), "not an index of token shards, or damaged"),
        (lambda index: index.update(train=[]), "not an index of token shards, or damaged"),
    ],
)
def test_a_wrong_index_is_named(tokens: Path, change: Any, problem: str) -> None:
    index = json.loads((tokens / "tokens.json").read_text())
    change(index)
    (tokens / "tokens.json").write_text(json.dumps(index))
    assert message_of(partial(read_all, tokens)).startswith(
        f"{tokens / 'tokens.json'}: {problem}. ".replace(". .", ".")
    )


def test_an_index_that_is_lost_or_no_json_is_named(tokens: Path) -> None:
    (tokens / "tokens.json").write_text("{")
    assert message_of(partial(read_all, tokens)).startswith(
        f"{tokens / 'tokens.json'}: cannot be read (it is not JSON)"
    )
    (tokens / "tokens.json").unlink()
    assert message_of(partial(read_all, tokens)).startswith(f"{tokens / 'tokens.json'}: cannot be read (No such file")


def test_another_tokenizer_is_refused(tiny, tokens: Path, tmp_path: Path, capsys) -> None:
    message = refusal(tiny.flags(tmp_path / "run", dataset=tokens), capsys)
    assert message.startswith(
        f"{tokens} was tokenized with characters, and --tokenizer {tiny.tokenizer} gives other ids."
    )
    message = refusal(tiny.flags(tmp_path / "run", validation=tokens), capsys)
    assert message.startswith(f"{tokens} was tokenized with characters")


def test_what_the_script_refuses(tiny, tokens: Path, tmp_path: Path, capsys) -> None:
    def refused(*flags: object) -> str:
        return refusal(["--tokenizer", tiny.tokenizer, *flags], capsys, program=tokenize_corpus.command_line)

    assert refused("--dataset", tiny.data, "--output", tokens).startswith(f"{tokens} exists, and is not overwritten.")
    assert refused("--dataset", tokens, "--output", tmp_path / "new") == f"{tokens} is tokenized already."
    assert refused("--dataset", tiny.data).startswith("give --output FOLDER, or --verify FOLDER.")
    assert refused("--dataset", tiny.data, "--output", tmp_path / "a", "--processes", 0).startswith(
        "--processes must be"
    )
    assert refused("--dataset", tmp_path / "no", "--output", tmp_path / "a").startswith("no such file or folder")
    (tokens / "train-00000.bin").unlink()
    assert refused("--verify", tokens).startswith(f"{tokens / 'train-00000.bin'}: cannot be read")
