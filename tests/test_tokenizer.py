"""Tokenizers of every origin, made here in miniature."""

import os
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import sentencepiece
from support.command_line import message_of
from support.runs import ROOT
from support.tokenizers import make_bpe_folder, make_unigram_folder, train_sentencepiece

from peft_pretraining.data import tokenizer as tokenizer_module
from peft_pretraining.data.tokenizer import SentencePieceTokenizer, Tokenizer, check_fits, load_tokenizer
from peft_pretraining.errors import UserError

COMMIT = "0123456789abcdef" * 2 + "01234567"  # a commit of a made-up hub repository
TEXTS = ["the cat sat on the mat", "", "the dog <extra_id_0> and</s>the cat<pad>"]


def reject(spec: object) -> str:
    """The message with which a tokenizer is refused: one line that names it."""
    message = message_of(lambda: load_tokenizer(str(spec)))
    assert message.startswith(f"--tokenizer {spec}")
    return message


# ---- sentencepiece ---------------------------------------------------------------------------------------------------


def test_sentencepiece_agrees_with_its_own_library(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "tiny.model")
    tokenizer = load_tokenizer(str(path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.encode(TEXTS) == [reference.encode(text) for text in TEXTS]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.name) == (40, 1, 0, str(path))


def test_sentencepiece_never_emits_control_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(train_sentencepiece(tmp_path / "tiny.model")))
    for ids in tokenizer.encode(["a</s>b<pad>c", "</s>"]):
        assert ids and not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)


def test_decode_skips_what_is_no_text(tmp_path: Path) -> None:
    """A model with a larger vocabulary than the tokenizer may sample ids that the tokenizer does not have."""
    path = train_sentencepiece(tmp_path / "tiny.model")
    for tokenizer in (load_tokenizer(str(path)), load_tokenizer(str(make_unigram_folder(tmp_path / "folder")))):
        (ids,) = tokenizer.encode(["the cat"])
        assert tokenizer.decode([*ids, tokenizer.eos_id, 31_999, tokenizer.pad_id]) == "the cat"


def test_without_pad_eos_pads(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "tiny.model", pad_id=-1, eos_id=0, unk_id=1)
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 0)


def test_without_eos_is_refused(tmp_path: Path) -> None:
    assert "no end-of-sequence" in reject(train_sentencepiece(tmp_path / "tiny.model", eos_id=-1, unk_id=1))
    assert "no end-of-sequence" in reject(make_unigram_folder(tmp_path / "folder", eos=None))


def test_pydocs_names_the_model_of_the_embedded_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = train_sentencepiece(tmp_path / "tokenizer.model")
    monkeypatch.setattr("peft_pretraining.data.pydocs.pydocs_tokenizer_model", lambda: path)
    tokenizer = load_tokenizer("pydocs")
    assert (tokenizer.name, tokenizer.vocab_size) == ("pydocs", 40)


def test_a_folder_with_only_a_model_is_read_by_sentencepiece(tmp_path: Path) -> None:
    """transformers, without protobuf, reads such a folder of T5 as a vocabulary of 104 tokens."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    train_sentencepiece(tmp_path / "spiece.model")
    tokenizer = load_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.vocab_size == 40


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_sentinels_are_not_counted_and_never_come_out(tmp_path: Path) -> None:
    """T5's 32000 pieces must fit a model of 32000, although its hub tokenizer has 32100 with the sentinels.

    transformers' split_special_tokens does not ensure that: the sentinels are pieces of the Unigram model as well, and
    "<extra_id_0>" in a document came out as 32099.
    """
    tokenizer = load_tokenizer(str(make_unigram_folder(tmp_path / "folder")))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (36, 1, 0)
    cat, empty, forged = tokenizer.encode(["the cat", "", "the <extra_id_0></s><pad><extra_id_1> cat"])
    assert (cat, empty) == ([3, 4], [])
    assert max(forged) < tokenizer.vocab_size and not {0, 1} & set(forged)
    assert tokenizer.decode(forged).replace(" ", "") == "theextra_id_0>/s>pad>extra_id_>cat"  # "<" and "1" are unknown


def test_a_gpt2_like_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_bpe_folder(tmp_path / "folder")))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (257, 256, 256)
    text = "naïve <|endoftext|> cat\n"
    (ids,) = tokenizer.encode([text])
    assert len(ids) == len(text.encode()) and max(ids) < 256
    assert tokenizer.decode(ids) == text


def test_long_documents_are_whole_and_raise_no_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(make_unigram_folder(tmp_path / "folder")))
    assert tokenizer.encode(["the cat " * 5000]) == [[3, 4] * 5000 + [5]]
    assert tokenizer.encode([]) == []
    assert capfd.readouterr() == ("", "")


def test_tokenizers_travel_to_workers(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "tiny.model")
    for spec in (path, make_unigram_folder(tmp_path / "unigram"), make_bpe_folder(tmp_path / "bpe")):
        tokenizer: Tokenizer = load_tokenizer(str(spec))
        data = pickle.dumps(tokenizer)
        path.unlink(missing_ok=True)  # the workers do not need the file
        copy = pickle.loads(data)
        assert copy.encode(TEXTS) == tokenizer.encode(TEXTS)
        assert (copy.name, copy.vocab_size, copy.eos_id) == (str(spec), tokenizer.vocab_size, tokenizer.eos_id)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(train_sentencepiece(tmp_path / "tiny.model")))
    check_fits(tokenizer, vocab_size=40)
    with pytest.raises(UserError, match=r"tiny\.model has 40 tokens, but the model's vocabulary only 39"):
        check_fits(tokenizer, vocab_size=39)


@pytest.mark.parametrize("spec", ["missing.model", "./missing", "/missing/folder", "~/missing", "a/b/c"])
def test_a_path_that_does_not_exist(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder" in reject(spec)


def test_damaged_files(tmp_path: Path) -> None:
    whole = train_sentencepiece(tmp_path / "tiny.model").read_bytes()
    for content in (b"", b"no model at all", whole[:200]):
        (tmp_path / "damaged.model").write_bytes(content)
        assert "not a sentencepiece model" in reject(tmp_path / "damaged.model")
    (tmp_path / "tokenizer.json").write_text("{")
    assert "give its folder" in reject(tmp_path / "tokenizer.json")
    assert "transformers cannot load it" in reject(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert "holds no tokenizer" in reject(tmp_path)


def test_a_made_up_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers makes a T5 tokenizer of 104 tokens, none of them a word, from a folder without a vocabulary."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="finds no vocabulary"):
        tokenizer_module._load_by_transformers(str(tmp_path), name="t5", local=True)


def test_the_hub_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    def refuse(*_: object, **options: object) -> None:
        assert options["local_files_only"] is False
        raise OSError("nobody/nothing is not a valid model identifier\nlisted on the hub. Long advice follows.")

    monkeypatch.setattr(tokenizer_module, "_hub_reachable", lambda: True)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    assert reject("nobody/nothing").endswith("(nobody/nothing is not a valid model identifier).")


@pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 23),
    reason="earlier versions want a config.json beside a cached tokenizer",
)
def test_without_the_hub(tmp_path: Path) -> None:
    """What the cache holds is used; for the rest one line names the ways without the hub, and within seconds."""
    repository = tmp_path / "hub" / "models--org--cached"
    for folder in ("snapshots", "refs", f".no_exist/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    make_unigram_folder(repository / "snapshots" / COMMIT)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / ".no_exist" / COMMIT / "config.json").touch()  # so the hub client notes what a repository lacks
    code = """if True:
        from peft_pretraining.errors import UserError
        from peft_pretraining.data.tokenizer import load_tokenizer
        print(load_tokenizer("org/cached").vocab_size)
        try:
            load_tokenizer("t5-base")
        except UserError as error:
            print(error)
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=30)
    assert all("INFO" in line and "loading the tokenizer" in line for line in run.stderr.splitlines()), run.stderr
    vocab_size, message = run.stdout.splitlines()
    assert vocab_size == "36"
    for part in ("--tokenizer t5-base", "cannot be reached", "PATH.model", "--dataset pydocs --tokenizer pydocs"):
        assert part in message
