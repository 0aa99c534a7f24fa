"""Tokenizers in miniature: a sentencepiece model, and folders in the image of T5's and GPT-2's."""

import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

SENTENCES = [f"the {a} sat on the {b} and the dog" for a in ("cat", "rat", "bat") for b in ("mat", "hat", "sofa")]


def train_sentencepiece(path: Path, **options: object) -> Path:
    """A model of 40 pieces, trained on SENTENCES; options: sentencepiece\'s own."""
    model = io.BytesIO()
    options = {"vocab_size": 40, "model_type": "bpe", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, minloglevel=2, num_threads=1, **options
    )
    path.write_bytes(model.getvalue())
    return path


def make_unigram_folder(folder: Path, *, eos: str | None = "</s>", pad: str | None = "<pad>") -> Path:
    """A tokenizer folder in the image of T5's: ordinary pieces, then sentinels, which are pieces of score 0 as well."""
    letters = [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0_/>"]  # as T5, without "<"
    words = [("▁the", -1.0), ("▁cat", -2.0), ("▁", -3.0)]
    sentinels = [("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters, *sentinels]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token, _ in pieces[:3] + sentinels])
    backend.enable_truncation(max_length=4)  # some tokenizer.json files carry one along
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    extra = {"additional_special_tokens": [token for token, _ in sentinels], "model_max_length": 8}
    write_config(folder, eos_token=eos, pad_token=pad, unk_token="<unk>", **extra)
    return folder


def make_bpe_folder(folder: Path) -> Path:
    """A tokenizer folder in the image of GPT-2's: bytes, and one special token that is everything."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    write_config(folder, bos_token=end, eos_token=end, unk_token=end)
    return folder


def write_config(folder: Path, **config: object) -> None:
    """The tokenizer_config.json of a folder; None leaves an entry out."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
