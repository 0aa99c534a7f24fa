"""Tokenizers on their way to transformers: the ids stay."""

import random
from pathlib import Path

import pytest
from support.tokenizers import make_bpe_folder, make_unigram_folder, train_sentencepiece
from transformers import AutoTokenizer, LlamaConfig

from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.export.tokenizer import save_tokenizer, to_transformers

UNIGRAM = {"model_type": "unigram", "vocab_size": 20}


def exported(spec: Path, folder: Path):
    """The tokenizer and what AutoTokenizer makes of its files beside a LLaMA's config."""
    original = load_tokenizer(str(spec))
    LlamaConfig().save_pretrained(folder)
    save_tokenizer(to_transformers(original, max_length=77), folder, original=original)
    return original, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def texts(count: int) -> list[str]:
    """Random texts of words that the model knows in part, of white space and of letters that it has never seen."""
    rng = random.Random(7)
    parts = [
        "the",
        "cat",
        "sofa",
        "rathat",
        "thethe",
        "xyz",
        "é",
        "ﬁ",
        "日本",
        "😀",
        " ",
        "  ",
        "\n",
        "\t",
        "▁",
        "the dog",
    ]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(30))) for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True, "vocab_size": 300},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"bos_id": 3, "pad_id": -1, "eos_id": 0},
        UNIGRAM,
        UNIGRAM | {"byte_fallback": True, "vocab_size": 276},
    ],
    ids=["bpe", "bytes", "verbatim", "no prefix", "bos", "unigram", "unigram, bytes"],
)
def test_a_sentencepiece_model_keeps_its_ids_and_texts(options, tmp_path):
    original, loaded = exported(train_sentencepiece(tmp_path / "tiny.model", **options), tmp_path)
    ours = original.encode(texts(300))
    assert [loaded(text, verbose=False)["input_ids"] for text in texts(300)] == ours
    spoken = [original.decode(ids).replace(" ⁇ ", "<unk>") for ids in ours[:50]]
    assert [loaded.decode(ids) for ids in ours[:50]] == spoken
    assert (loaded.eos_token_id, loaded.model_max_length) == (original.eos_id, 77)
    assert loaded.bos_token_id == options.get("bos_id")
    assert loaded.pad_token_id == (None if options.get("pad_id") == -1 else original.pad_id)


@pytest.mark.parametrize("make", [make_unigram_folder, make_bpe_folder])
def test_a_transformers_tokenizer_keeps_its_ids(make, tmp_path):
    (tmp_path / "out").mkdir()
    original, loaded = exported(make(tmp_path / "folder"), tmp_path / "out")
    known = ["the cat", "the the  cat", " cat the", ""]
    assert [loaded(text, verbose=False)["input_ids"] for text in known] == original.encode(known)
    assert loaded.eos_token_id == original.eos_id


def test_a_tokenizer_that_would_give_other_ids_leaves_no_file(tmp_path):
    """After a user-defined symbol the tokenizers library puts a prefix, sentencepiece none."""
    model = train_sentencepiece(tmp_path / "tiny.model", user_defined_symbols=["cat"], vocab_size=45)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="other ids, as for 'a cat bcat'"):
        exported(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize("options", [{"model_type": "word", "vocab_size": 12}, {"treat_whitespace_as_suffix": True}])
def test_models_without_a_counterpart_are_refused(options, tmp_path):
    original = load_tokenizer(str(train_sentencepiece(tmp_path / "tiny.model", **options)))
    with pytest.raises(UserError, match="tiny.model: only sentencepiece's unigram and BPE models"):
        to_transformers(original, max_length=77)
