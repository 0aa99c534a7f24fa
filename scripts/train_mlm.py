"""Pre-trains a small RoBERTa by masked language modelling, and its tokenizer, as something to fine-tune.

    python scripts/train_mlm.py --dataset data/books --out runs/small_roberta --minutes 60

--dataset is that of torchrun_main.py. A byte-level BPE is trained first; texts are joined and cut into windows of
--max_length tokens. For the share --causal of the time the model learns to predict the next token, then masked ones. A
small model that begins with masks learns for a long while to count words and no more; and in equal time the two in turn
end better, too (Gisserot-Boukhlef et al. 2025, arXiv 2507.00994). 30% of the tokens are masked, which a short training
makes more of than RoBERTa's 15% (Wettig et al. 2023, arXiv 2202.08005). Norms come before the layers, as in LLaMA, and
positions begin as sinusoids. Muon trains the matrices, AdamW the rest, in transformers' Trainer, on a GPU in bfloat16
if there is one. In either part the learning rates fall to 0 within its time, however many updates these are. Writes a
transformers folder and prints the masked loss: one of more than 6 is that of counting words, and such a model has
nothing to fine-tune yet.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForCausalLM,
    RobertaPreLayerNormForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import qgalore
from peft_pretraining.data.sources import open_documents

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>",
    "cls_token": "<s>", "sep_token": "</s>"}  # fmt: skip
UPDATES = 1 << 30  # more than there is time for


class Windows(torch.utils.data.Dataset):
    """Joined texts as windows of tokens, each between <s> and </s>."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, *, length: int) -> None:
        ids: list[int] = []
        for start in range(0, len(texts), 256):
            found = tokenizer(texts[start : start + 256], add_special_tokens=False, verbose=False)["input_ids"]
            ids += itertools.chain.from_iterable([*one, tokenizer.eos_token_id] for one in found)
        inner = length - 2
        self.tokenizer = tokenizer
        self.ids = torch.tensor(ids[: len(ids) // inner * inner]).view(-1, inner)
        self.ends = torch.tensor([tokenizer.bos_token_id]), torch.tensor([tokenizer.eos_token_id])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.cat([self.ends[0], self.ids[index], self.ends[1]])}


class MaskedTrainer(Trainer):
    """Computes the head where tokens are masked, and nowhere else."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **others: Any) -> Any:
        labels = inputs["labels"]
        hidden = model.roberta_prelayernorm(
            inputs["input_ids"], attention_mask=inputs.get("attention_mask")
        ).last_hidden_state
        chosen = labels != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), labels[chosen])
        return (loss, {"loss": loss}) if return_outputs else loss


class TimeLimit(TrainerCallback):
    """Ends the training when the time is over."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()

    @property
    def left(self) -> float:
        """The share of the time that is left, from 1 to 0."""
        return max(0.0, 1 - (time.monotonic() - self.began) / self.seconds)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop |= self.left == 0


def texts_of(dataset: str, split: str, *, limit: int) -> Iterator[str]:
    """The first texts of a data set, up to so many characters."""
    source, read = open_documents(dataset, split=split, seed=0), 0
    for file in itertools.chain.from_iterable(source.parts(0)):
        for record in source.records(file, line=1):
            yield (text := record.text())
            read += len(text)
            if read >= limit:
                return


def train_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    inner = ByteLevelBPETokenizer(add_prefix_space=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # their ids are RoBERTa's, but for the last
    inner.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    inner._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, **SPECIAL)


@torch.no_grad()
def begin_with_sinusoids(positions: torch.nn.Embedding) -> None:
    """Rows whose shift by a place is a rotation, the same for all (Vaswani et al. 2017, section 3.5), at the scale of
    the other embeddings."""
    rows, width = positions.weight.shape
    angle = torch.arange(rows)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    positions.weight.copy_(torch.cat([angle.sin(), angle.cos()], dim=1) * 0.02 * math.sqrt(2))


def make_optimizer(model: torch.nn.Module, *, lr: float, matrix_lr: float) -> torch.optim.Optimizer:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and head."""
    matrices, others = qgalore.make_groups(model, rank=1)
    matrices = {"params": matrices["params"], "rule": "muon", "lr": matrix_lr}
    return qgalore.LowRankOptimizer([matrices, others], lr=lr, betas=(0.9, 0.95))


def make_config(
    tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, *, causal: bool
) -> RobertaPreLayerNormConfig:
    return RobertaPreLayerNormConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64), intermediate_size=4 * args.hidden,
        max_position_embeddings=args.positions + 2, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, is_decoder=causal,
    )  # fmt: skip


def make_trainer(
    model: torch.nn.Module, data: tuple[Windows, Windows], *, share: float, masked: bool, args: argparse.Namespace
) -> Trainer:
    """A Trainer whose rates rise for 100 updates, then fall to 0 as its share of the time runs out.

    data: what is learned, and what is held out.
    """
    model.base_model.compile()
    limit = TimeLimit(60 * args.minutes * share)
    optimizer = make_optimizer(model, lr=args.lr, matrix_lr=args.matrix_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1, (update + 1) / 100) * limit.left)
    return (MaskedTrainer if masked else Trainer)(
        model,
        TrainingArguments(
            output_dir=args.out, per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=64,
            max_steps=args.max_steps or UPDATES, logging_steps=50, save_strategy="no", report_to=[], seed=args.seed,
            bf16=torch.cuda.is_available(), disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        data_collator=DataCollatorForLanguageModeling(data[0].tokenizer, mlm=masked, mlm_probability=args.masked),
        train_dataset=data[0], eval_dataset=data[1], callbacks=[limit], optimizers=(optimizer, schedule),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    texts = list(texts_of(args.dataset, "train", limit=args.characters))
    tokenizer = train_tokenizer(texts[:4000], vocab_size=args.vocab_size)
    tokenizer.model_max_length = args.positions
    held_out = list(texts_of(args.dataset, "validation", limit=300_000))
    data = tuple(Windows(each, tokenizer, length=args.max_length) for each in (texts, held_out))
    model = RobertaPreLayerNormForMaskedLM(make_config(tokenizer, args, causal=False))
    begin_with_sinusoids(model.base_model.embeddings.position_embeddings)
    told: dict[str, Any] = {}
    if args.causal:
        decoder = RobertaPreLayerNormForCausalLM(make_config(tokenizer, args, causal=True))
        decoder.load_state_dict(model.state_dict())
        first = make_trainer(decoder, data, share=args.causal, masked=False, args=args)
        first.train()
        told["causal"], told["causal_loss"] = first.state.global_step, first.evaluate()["eval_loss"]
        model.load_state_dict(decoder.state_dict())
    trainer = make_trainer(model, data, share=1 - args.causal, masked=True, args=args)
    trainer.train()
    torch.manual_seed(0)  # the same masks for every model
    loss = trainer.evaluate()["eval_loss"]
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    told |= {
        "masked": trainer.state.global_step, "masked_loss": loss, "perplexity": math.exp(loss),
        "parameters": model.num_parameters(), "windows": len(data[0]), "minutes": args.minutes,
    }  # fmt: skip
    (Path(args.out) / "training.json").write_text(json.dumps(told | {"args": vars(args)}, indent=1) + "\n")
    print(json.dumps(told))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--causal", type=float, default=0.5, help="share of the time for predicting the next token")
    parser.add_argument("--max_steps", type=int, help="end either part after so many updates, if the time lasts")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--positions", type=int, default=512, help="tokens that the model can see at most")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--masked", type=float, default=0.3, help="share of the tokens")
    parser.add_argument("--lr", type=float, default=0.008, help="of embeddings, norms and head")
    parser.add_argument("--matrix_lr", type=float, default=0.02)
    parser.add_argument("--characters", type=int, default=60_000_000, help="of training text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 <= args.causal < 1:
        parser.error(f"--causal {args.causal}: must be at least 0 and below 1, as masks come last.")
    return args


if __name__ == "__main__":
    sys.exit(main())
