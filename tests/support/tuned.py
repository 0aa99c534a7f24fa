"""A model in transformers' format and dialogues that it is tuned on, in seconds."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from peft_pretraining.model.build import build_model
from support.dialogues import VOCABULARY, make_chat_folder, sums, write_dialogues


@dataclass(frozen=True)
class Tuned:
    """A transformers folder with a chat template, and dialogues of small sums, for runs of seconds."""

    base: Path
    data: Path

    def flags(self, save_dir: Path, **more: object) -> list[str]:
        """The command line of a short run. A flag with True is a switch; None leaves a flag out."""
        flags = dict(
            task="sft", continue_from=self.base, model_config=self.base / "config.json", tokenizer=self.base,
            dataset=self.data, max_length=192, batch_size=4, num_training_steps=6, lr=0.01, eval_tokens="1K", workers=0,
            num_threads=1, dtype="float32", wandb_mode="disabled", no_report=True, save_dir=save_dir,
        )  # fmt: skip
        given = {name: value for name, value in (flags | more).items() if value is not None}
        return [part for name, value in given.items() for part in ([f"--{name}"] + [str(value)] * (value is not True))]


def make_tuned(folder: Path) -> Tuned:
    """The same in every session."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    make_chat_folder(folder / "base")
    build_model(config, device="cpu", dtype=torch.float32, seed=3).save_pretrained(folder / "base")
    write_dialogues(folder / "data" / "train.jsonl", sums(120))
    write_dialogues(folder / "data" / "valid.jsonl", sums(12, first=200))
    return Tuned(folder / "base", folder / "data")
