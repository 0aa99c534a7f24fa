"""Settings of all tests, and the tiny data set, tokenizer and model that runs of seconds are made on."""

import gzip
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("support")  # so that what fails there is explained as in a test

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "disabled"  # whatever a test forgets to say, nothing leaves this machine

torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@dataclass(frozen=True)
class Tiny:
    """A data set in C4's layout, a sentencepiece model and a model shape, all tiny, for runs of seconds."""

    data: Path
    tokenizer: Path
    config: Path
    vocab_size: int

    def flags(self, save_dir: Path, **more: object) -> list[str]:
        """The command line of a short run on it. A flag with True is a switch; None leaves a flag out."""
        flags: dict[str, object] = {
            "model_config": self.config,
            "dataset": self.data,
            "tokenizer": self.tokenizer,
            "max_length": 32,
            "batch_size": 4,
            "num_training_steps": 6,
            "lr": 0.01,
            "eval_tokens": "2K",
            "workers": 0,
            "num_threads": 1,
            "dtype": "float32",
            "wandb_mode": "disabled",
            "no_report": True,
            "save_dir": save_dir,
        } | more
        given = {name: value for name, value in flags.items() if value is not None}
        return [part for name, value in given.items() for part in ([f"--{name}"] + [str(value)] * (value is not True))]


def tiny_text(count: int, *, seed: int) -> list[str]:
    """Documents of a toy language, in which every word but the first follows from the one before."""
    rng = random.Random(seed)
    words = ["ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu"]
    documents = []
    for _ in range(count):
        start, step = rng.randrange(len(words)), rng.choice((1, 2, 4))
        documents.append(" ".join(words[(start + i * step) % len(words)] for i in range(rng.randrange(5, 60))))
    return documents


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    import sentencepiece

    folder = tmp_path_factory.mktemp("tiny")
    data = folder / "data" / "en"
    data.mkdir(parents=True)
    for name, count, seed in [
        ("c4-train.00000-of-00002", 300, 1),
        ("c4-train.00001-of-00002", 300, 2),
        ("c4-validation.00000-of-00001", 80, 3),
    ]:
        with gzip.open(data / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in tiny_text(count, seed=seed))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_text(600, seed=4)),
        model_prefix=str(folder / "tiny"),
        vocab_size=60,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tiny.model")).get_piece_size()
    config = {
        "architectures": ["LLaMAForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_sequence_length": 64,
        "pad_token_id": -1,
    }
    (folder / "llama_tiny.json").write_text(json.dumps(config))
    return Tiny(folder / "data", folder / "tiny.model", folder / "llama_tiny.json", vocab_size)
