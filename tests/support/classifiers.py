"""Tiny classifiers of each kind in transformers folders, and files in the schema of each task of GLUE."""

import csv
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_pretraining.glue.tasks import TASKS

WORDS = "ba de fi go hu ka le mi no pu ra se ti vo zu good bad".split()
SIZES = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=48)


def make_classifier(folder: Path, kind: str, *, dropout: float = 0.1, head: bool = False) -> Path:
    """A folder with random weights and a tokenizer of whole words.

    kind: bert, roberta or llama.
    head: whether with a classifier of two classes, else the body alone, as it is pre-trained.
    """
    tokenizer = word_tokenizer()
    torch.manual_seed(7)
    shape = SIZES | dict(vocab_size=len(tokenizer), pad_token_id=0)
    dropouts = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**shape, **dropouts, max_position_embeddings=512))
    elif kind == "roberta":
        model = RobertaForSequenceClassification(RobertaConfig(**shape, **dropouts, max_position_embeddings=514))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**shape, max_position_embeddings=512))
    (model if head else model.base_model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, [CLS] and [SEP] around a text or a pair."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = {word: number for number, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=512,
    )  # fmt: skip


def make_rows(task: str, count: int, *, seed: int) -> list[dict]:
    """Rows in the schema of a task: its columns, `label` and `idx`. The first word of the last text tells the label."""
    rng, row = random.Random(seed), TASKS[task]
    rows = []
    for number in range(count):
        classes = len(row.labels) or 6
        label = rng.randrange(classes)
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(3, 12))) for _ in row.columns]
        texts[-1] = f"{WORDS[label]} {texts[-1]}"
        value = label if row.labels else round(label * 0.8 + rng.random() * 0.2, 3)
        rows.append(dict(zip(row.columns, texts, strict=True)) | {"label": value, "idx": number})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as a csv, tsv, json or jsonl file, by the ending of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_task(folder: Path, task: str, *, train: int = 24, validation: int = 12, ending: str = ".csv") -> Path:
    """The files of a task, as run_glue looks for them in ./glue/TASK."""
    write_rows(folder / f"train{ending}", make_rows(task, train, seed=1))
    for number, name in enumerate(TASKS[task].evaluations):
        write_rows(folder / f"{name}{ending}", make_rows(task, validation, seed=2 + number))
    return folder
