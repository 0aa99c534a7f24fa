"""Tokenizers trained on one's own text: scripts/train_tokenizer.py."""

import json

import pytest
from support.command_line import refusal

from peft_pretraining.data.tokenizer import load_tokenizer
from scripts import train_tokenizer


def flags(tiny, output, **more):
    given = {"dataset": tiny.data, "vocab_size": 300, "documents": 50, "output": output} | more
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_it_is_trained_on_training_documents_and_gives_them_back(tiny, tmp_path):
    """The same file each time; every text comes back as it was, also one with characters that were never seen."""
    files = [tmp_path / name for name in ("a.model", "b.model")]
    assert [train_tokenizer.command_line(flags(tiny, file)) for file in files] == [0, 0]
    assert files[0].read_bytes() == files[1].read_bytes()
    tokenizer = load_tokenizer(str(files[0]))
    assert len(tokenizer.processor) == 300
    for text in ("ba de fi", "  two spaces\n\nand lines ", "Ünïcode \u4e2d"):
        assert tokenizer.processor.decode(tokenizer.encode([text])[0]) == text
    assert len(tokenizer.encode(["ba de fi go hu ka le mi no pu"])[0]) <= 20, "words of the text are tokens"


@pytest.mark.parametrize(
    "more, said",
    [
        ({"vocab_size": 100}, "--vocab_size must be at least 260"),
        ({"vocab_size": 5000}, "no tokenizer of 5000 tokens can be trained on these texts"),
        ({"dataset": "nothing/here"}, "nothing/here"),
        ({"documents": 0}, "--documents at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(more, said, tiny, tmp_path, capsys):
    assert said in refusal(flags(tiny, tmp_path / "a.model", **more), capsys, program=train_tokenizer.command_line)
    assert not (tmp_path / "a.model").exists()


def test_nothing_is_written_over(tiny, tmp_path, capsys):
    taken = tmp_path / "a.model"
    taken.write_text(json.dumps("mine"))
    found = refusal(flags(tiny, taken), capsys, program=train_tokenizer.command_line)
    assert "exists; name a file that does not" in found and json.loads(taken.read_text()) == "mine"
