"""Trains a small LLaMA on a text file with transformers' Trainer, updates inside backward and INT8 weights.

    python scripts/train_with_trainer.py --text book.txt --output runs/book

The tokens are the bytes of the text, so nothing is downloaded. A run that was stopped goes on by the same command.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from qgalore.hf import LogRefreshes, QGaLore, export, quantize

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, use_cache=False,
)  # fmt: skip


def windows(path: Path, *, length: int) -> list[dict[str, torch.Tensor]]:
    """The text in pieces of `length` bytes, each with itself as labels: the model shifts them."""
    text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    return [{"input_ids": part, "labels": part} for part in text.unfold(0, length, length)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file of at least 2 KB")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoints and of the model")
    parser.add_argument("--steps", type=int, default=300, help="updates (default 300)")
    parser.add_argument("--optimizer", default="q_galore_adamw8bit_per_layer", help="a name of qgalore.OPTIMIZERS")
    args = parser.parse_args(argv)
    if not args.text.is_file() or args.text.stat().st_size < 2048:
        print(f"error: --text {args.text} is no file of at least 2 KB", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    quantize(model)
    training = TrainingArguments(
        str(args.output), max_steps=args.steps, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=0.005, lr_scheduler_type="cosine", warmup_steps=args.steps // 10, logging_steps=10,
        save_steps=100, save_total_limit=2, report_to=[],
    )  # fmt: skip
    pair = QGaLore.for_trainer(training, args.optimizer, rank=32, update_proj_gap=10, proj_bits=4)
    trainer = Trainer(
        model, training, train_dataset=windows(args.text, length=128), optimizer_cls_and_kwargs=pair,
        callbacks=[LogRefreshes()],
    )  # fmt: skip
    last = get_last_checkpoint(str(args.output)) if args.output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    export(model, args.output / "model")
    print(f"the model is in {args.output / 'model'}: LlamaForCausalLM.from_pretrained loads it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
