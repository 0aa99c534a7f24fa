"""Every flag of torchrun_main.py: those of the optimizers come from qgalore.options, the others are declared here.

`python -m peft_pretraining.cli.flags` prints docs/flags.md.
"""

import argparse
import math
import re
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from peft_pretraining.model.adapters import KINDS
from qgalore.factory import OPTIMIZERS
from qgalore.options import (
    ABOVE_0,
    GROUP_SIZE,
    OPTIMIZER,
    PROJECTION,
    QUANTIZATION,
    Declared,
    Settings,
    at_least,
    between,
    declared,
    one_of,
    option,
)
from qgalore.storage.int8_products import PRODUCTS

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str) -> int:
    """A count with an optional suffix: 100K is 100,000, 1.5M is 1,500,000, 2B is 2,000,000,000."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        count = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a count such as 5000, 100K, 1.5M or 2B") from None
    if not math.isfinite(count) or count != round(count):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return round(count)


_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?|()(\d+):([0-5]\d):([0-5]\d)")


def parse_duration(text: str) -> int:
    """Seconds from 3h, 90m, 45s, 1h30m, 1d12h or 2:30:00 (hours, minutes, seconds)."""
    match = _TIME.fullmatch(text.lower())
    parts = match.groups() if match else ()
    seconds = sum(int(part or 0) * unit for part, unit in zip(parts, (86400, 3600, 60, 1) * 2, strict=False))
    if seconds == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time such as 3h, 90m, 1h30m, 45s or 2:30:00")
    return seconds


_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def parse_memory(text: str) -> int | str:
    """Bytes of memory: 16GB is 16e9, 16GiB is 16 x 2^30; `auto` stays as it is."""
    if text == "auto":
        return text
    number, unit = next(
        ((text.removesuffix(unit), size) for unit, size in _UNITS.items() if text.endswith(unit)), ("", 0)
    )
    try:
        size = float(number) * unit
    except ValueError:
        size = 0
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no memory such as 16GB (16e9 bytes), 16GiB, 800MB or auto")
    return round(size)


# fmt: off

MODEL, DATA, TRAINING = "the model, and recipes for it", "text, tokenizer and sequences", "batches, length and speed"
ADAPTERS = "the baselines of GaLore's tables, for optimizers that do not project gradients"
CHECKPOINTS, RECORD = "saving, going on and recovery", "evaluation, record and the run as a whole"
GROUPS = {  # the name of each section, for --help NAME and in a file for --config
    "model": MODEL,
    "data": DATA,
    "training": TRAINING,
    "optimizer": OPTIMIZER,
    "galore": PROJECTION,
    "adapters": ADAPTERS,
    "quantization": QUANTIZATION,
    "checkpoints": CHECKPOINTS,
    "run": RECORD,
}


@dataclass(frozen=True)
class RunOptions:
    """What a run may be told besides the Settings of its optimizer."""

    preset: str | None = option(None, "name of a recipe in configs/presets, such as galore_60m; it sets every flag "
        "that the command line does not give", unit="NAME", section=MODEL, shown="none", may_change=True)
    config: str | None = option(None, "YAML file with any of these flags, such as the config.yaml of an earlier run; "
        "it wins over --preset, and the command line over both", unit="YAML", section=MODEL,
        shown="none", may_change=True)
    model_config: str | None = option(None, "file with the shape of the model, such as configs/llama_60m.json",
        unit="JSON", section=MODEL, may_change=True, required=True)
    dtype: str | None = option(None, "data type of weights and activations, bfloat16 or float32", unit="TYPE",
        section=MODEL, shown="bfloat16 where the device multiplies it natively")
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more "
        "time", section=MODEL, may_change=True)
    offload_activations: bool = option(False, "keep what --activation_checkpointing recomputes from, the input of each "
        "layer, in host memory", section=MODEL, needs=("recomputes",), may_change=True)
    use_hf_model: bool = option(False, "accepted for the reference's scripts; it has no effect, because the model "
        "always comes from transformers", section=MODEL)
    task: str = option("pretrain", "what is learned. pretrain: the next token of texts; sft (supervised fine-tuning): "
        "the answers in dialogues, which --dataset and --validation then hold, by the tokenizer's chat template",
        section=DATA, choices=("pretrain", "sft"))
    dataset: str = option("c4", "training text. c4: streamed from the Hugging Face hub; pydocs: documentation of the "
        "installed Python packages, without a download; a path: a folder with train (and validation) in its files' "
        "names, a file, or a quoted glob of .jsonl, .json, .ndjson or .txt files (also .gz and .zst) or .parquet "
        "files; or a folder of tokens from scripts/tokenize_corpus.py",
        unit="NAME|PATH", section=DATA, may_change=True)
    text_field: str = option("text", "field or column of local files that holds the text; dots lead into nested "
        "objects", unit="NAME", section=DATA, needs=("texts",))
    validation: str | None = option(None, "validation text, given like --dataset; all files of a folder "
        "without such names", unit="PATH", section=DATA,
        shown="the dataset's validation files, else one document in a hundred")
    tokenizer: str | None = option(None, "tokenizer: a sentencepiece .model file, a transformers folder, or a name "
        "on the hub", unit="NAME|PATH", section=DATA,
        shown="t5-base; for pydocs its own; for sft that of --continue_from", may_change=True)
    max_length: int = option(256, "tokens in a sequence", unit="TOKENS", section=DATA, range=at_least(2))
    packing: str = option("concat", "how documents become sequences. concat: joined by EOS tokens and cut, without "
        "padding or loss; truncate: one document per sequence, cut or padded, as the reference does; whole: as many "
        "dialogues of --task sft as fit, none of which sees another", section=DATA,
        choices=("concat", "truncate", "whole"), shown="concat; for sft whole")
    workers: int = option(1, "processes per rank that read and tokenize; 0: the training process does it",
        unit="PROCESSES", section=DATA, range=at_least(0), may_change=True)
    batch_size: int | None = option(None, "sequences in a micro-batch of one process", unit="SEQUENCES",
        section=TRAINING, range=at_least(1), may_change=True, required=True)
    fit: int | str | None = option(None, "memory of the GPU (or of the process, on a CPU), such as 16GB (16e9 bytes), "
        "16GiB or auto; chooses --batch_size and what saves memory without changing results, where they are not given, "
        "by planning; what changes results only if --allow_changed names it", unit="MEMORY", section=TRAINING,
        parse=parse_memory, shown="nothing is chosen", may_change=True)
    freeze_others: bool | None = option(None, "leave embeddings, norms and head as they are: only the attention and "
        "MLP matrices are trained, or the factors that --peft puts in their place; the default for --peft lora with "
        "--task sft", section=TRAINING)
    gradient_accumulation: int | None = option(None, "micro-batches per update and process", unit="MICRO-BATCHES",
        section=TRAINING, range=at_least(1), shown="as --total_batch_size implies, else 1", may_change=True)
    total_batch_size: int | None = option(None, "sequences per update, over all processes", unit="SEQUENCES",
        section=TRAINING, range=at_least(1), shown="batch_size x gradient_accumulation x processes")
    num_training_steps: int = option(10_000, "updates in the whole run", unit="UPDATES", section=TRAINING,
        range=at_least(1))
    max_train_tokens: int | None = option(None, "tokens to train on, instead of --num_training_steps; K, M and B are "
        "understood", unit="TOKENS", section=TRAINING, range=at_least(1), parse=parse_count,
        shown="as many as --num_training_steps take", may_change=True)
    num_train_epochs: float | None = option(None, "passes over the dialogues of --task sft, instead of "
        "--num_training_steps; they are counted at the start", unit="EPOCHS", section=TRAINING, range=ABOVE_0,
        shown="as many as --num_training_steps take", may_change=True)
    grad_clipping: float = option(0.0, "maximum norm of the gradients: global, or per parameter with a per-layer "
        "optimizer; 0: no clipping", unit="NORM", section=TRAINING, range=at_least(0))
    seed: int = option(0, "decides the initial weights, the order of the data, random bases and stochastic rounding",
        unit="INTEGER", section=TRAINING, range=between(0, 2**63 - 1))
    num_threads: int | None = option(None, "CPU threads per process", unit="THREADS", section=TRAINING,
        range=at_least(1), shown="OMP_NUM_THREADS, else cores / processes of this machine", may_change=True)
    compile: bool = option(False, "compile the decoder layers and the updates of our own optimizers: a minute or so "
        "at the start, faster afterwards", section=TRAINING, may_change=True)
    parallel: str = option("ddp", "several processes. ddp: each holds the model, and gradients are summed; fsdp: each "
        "holds some rows of every weight and of what the optimizer keeps; hsdp: so do the processes of each machine",
        section=TRAINING, choices=("ddp", "fsdp", "hsdp"),
        may_change=True)
    check_replicas: int = option(0, "updates from one comparison of the weights and states of all processes to the "
        "next, bit by bit; 0: never", unit="UPDATES", section=TRAINING, range=at_least(0), may_change=True)
    single_gpu: bool = option(False, "refuse to run as more than one process", section=TRAINING, may_change=True)
    optimizer: str = option("adamw", f"name of the optimizer: {', '.join(OPTIMIZERS)}", unit="NAME", section=OPTIMIZER)
    scheduler: str | None = option(None, "shape of the learning rate after the warm-up", section=OPTIMIZER,
        choices=("linear", "cosine", "cosine_restarts"), shown="cosine; cosine_restarts for --peft relora")
    warmup_steps: int | None = option(None, "updates over which the learning rate climbs to its peak", unit="UPDATES",
        section=OPTIMIZER, range=at_least(0), shown="a tenth of the run, at most 1000")
    min_lr_ratio: float = option(0.1, "last learning rate, divided by the peak", unit="RATIO", section=OPTIMIZER)
    cycle_length: int | None = option(None, "updates from one restart of the learning rate to the next; --scheduler "
        "cosine_restarts needs it", unit="UPDATES", section=OPTIMIZER, range=at_least(1),
        shown="none; --reset_every for --peft relora")
    restart_warmup_steps: int | None = option(None, "updates over which the learning rate climbs after a restart",
        unit="UPDATES", section=OPTIMIZER, range=at_least(0),
        shown="0; for --peft relora a tenth of a cycle, at most 100")

    peft: str | None = option(None, "what replaces the attention and MLP matrices; embeddings, norms and head train "
        "in full, unless --freeze_others. lora: frozen initial weights plus a product of rank --rank; relora: the "
        "same, merged and restarted every --reset_every; low_rank: the product alone", section=ADAPTERS,
        choices=KINDS, shown="none")
    peft_alpha: int = option(32, "factor on the product of lora and relora, divided by --rank", unit="FACTOR",
        section=ADAPTERS, range=at_least(1), needs=("peft", "lora"))
    reset_every: int | None = option(None, "updates from one reset of relora to the next; its paper has 5000 in a "
        "run of 20,000", unit="UPDATES", section=ADAPTERS, range=at_least(2), shown="none", needs=("peft",))
    weight_quant: bool = option(False, "keep the attention and MLP weights in --weight_bits, without another copy",
        section=QUANTIZATION)
    weight_bits: int = option(8, "bits of a quantized weight, 8 or 4", unit="BITS", section=QUANTIZATION,
        range=one_of(4, 8), needs=("weight_quant",))
    weight_group_size: int = option(256, "largest number of elements in a row of a weight that share a scale; -1: "
        "the whole row", unit="ELEMENTS", section=QUANTIZATION, range=GROUP_SIZE, needs=("weight_quant",))
    stochastic_round: bool = option(False, "round quantized weights stochastically, so that small updates count on "
        "average", section=QUANTIZATION, needs=("weight_quant",))
    simulation: bool = option(False, "keep, as float32, exactly the values that quantized weights would have",
        section=QUANTIZATION, needs=("weight_quant",))
    embedding_weight_bits: int | None = option(None, "bits of the weights of embedding and head, 8 or 4, "
        "which are then quantized like the others", unit="BITS", section=QUANTIZATION, range=one_of(4, 8),
        needs=("weight_quant",), shown="none: the model's data type")
    int8_matmul: str | None = option(None, "multiply quantized weights as INT8, with activations quantized on the fly: "
        "forward, the products of the forward pass; all, those of the backward pass as well; each row of a weight is "
        "one group then", section=QUANTIZATION, choices=PRODUCTS, shown="none", needs=("weight_quant",))
    proj_quant: bool = option(False, "keep the bases in --proj_bits", section=QUANTIZATION, needs=("projected",))
    accumulation_dtype: str | None = option(None, "data type of the sums over micro-batches", unit="TYPE",
        section=QUANTIZATION, choices=("bfloat16", "float32"), shown="the model's")
    accumulate_on: str = option("device", "where a per-layer optimizer keeps the sums over micro-batches; on the host "
        "they take no GPU memory, and cross the bus twice a micro-batch", section=QUANTIZATION,
        choices=("device", "host"), needs=("per_layer",), may_change=True)
    save_every: int = option(10_000, "updates from one checkpoint to the next; every run ends with one",
        unit="UPDATES", section=CHECKPOINTS, range=at_least(1), may_change=True)
    keep_last: int = option(3, "checkpoints that stay; older ones are deleted; 0: all stay", unit="CHECKPOINTS",
        section=CHECKPOINTS, range=at_least(0), may_change=True)
    keep_every: int = option(0, "checkpoints after a multiple of this many updates are never deleted; 0: no exception",
        unit="UPDATES", section=CHECKPOINTS, range=at_least(0), may_change=True)
    continue_from: str | None = option(None, "go on from a checkpoint, or from the newest complete one in the folder "
        "of a run; or begin a new run with the weights in a transformers folder", unit="DIR", section=CHECKPOINTS,
        shown="a new run", may_change=True)
    resume: str | None = option(None, "go on from the newest sound checkpoint in --save_dir, if there is one",
        section=CHECKPOINTS, choices=("auto",), shown="a new run", may_change=True)
    time_budget: int | None = option(None, "time from the start of the process in which the run saves and ends, "
        "with exit status 75, as after a signal: 3h, 90m, 1h30m or 2:30:00; --resume auto goes on", unit="TIME",
        section=CHECKPOINTS, parse=parse_duration, shown="none", may_change=True)
    allow_changed: str | None = option(None, "flags, separated by commas, that may differ from those of the run that "
        "goes on", unit="A,B", section=CHECKPOINTS, shown="none that alters training", may_change=True)
    eval_only: bool = option(False, "evaluate what --continue_from names, print the result, and stop; other flags "
        "are taken from its run", section=CHECKPOINTS, may_change=True)
    max_bad_updates: int = option(10, "updates in a row whose loss or gradient may be not finite: each is skipped, "
        "and at this many the run stops", unit="UPDATES", section=CHECKPOINTS, range=at_least(1), may_change=True)
    max_bad_documents: int = option(100, "documents that may be unreadable: each is skipped, and at one more the run "
        "stops; K, M and B are understood", unit="DOCUMENTS", section=CHECKPOINTS, range=at_least(0),
        parse=parse_count, may_change=True)
    spike_rollback: float = option(0.0, "robust standard deviations above the median of recent losses at which a "
        "loss counts as a spike: the run goes back to its last checkpoint and on with other data; 0: never",
        unit="DEVIATIONS", section=CHECKPOINTS, range=at_least(0), may_change=True)
    save_dir: str | None = option(None, "folder for the record, the checkpoints and the model", unit="DIR",
        section=RECORD, shown="checkpoints/CONFIG-DATE", may_change=True)
    eval_every: int = option(5000, "updates from one evaluation to the next; every run ends with one", unit="UPDATES",
        section=RECORD, range=at_least(1), may_change=True)
    eval_tokens: int = option(10_000_000, "validation tokens to evaluate on, the same ones every time; K, M and B "
        "are understood", unit="TOKENS", section=RECORD, range=at_least(1), parse=parse_count, may_change=True)
    wandb_mode: str = option("online", "whether wandb records the run; online becomes offline where there is no "
        "account", section=RECORD, choices=("online", "offline", "disabled"), may_change=True)
    tensorboard: bool = option(False, "also write curves for TensorBoard, to SAVE_DIR/tensorboard", section=RECORD,
        may_change=True)
    no_report: bool = option(False, "draw no SAVE_DIR/report.html, the page of the run", section=RECORD,
        may_change=True)
    unset_wandb: bool = option(False, "the reference's name for --wandb_mode disabled", section=RECORD,
        may_change=True)
    project: str = option("qgalore", "project of the run in wandb", unit="NAME", section=RECORD, may_change=True)
    name: str | None = option(None, "name of the run in wandb", unit="NAME", section=RECORD,
        shown="CONFIG-OPTIMIZER, and -PEFT with --peft", may_change=True)
    tags: str | None = option(None, "tags of the run in wandb, separated by commas", unit="A,B", section=RECORD,
        shown="none", may_change=True)
    dry_run: bool = option(False, "check every argument and file, print who is trained how, and stop", section=RECORD,
        may_change=True)

# fmt: on


def _flags() -> dict[str, Declared]:
    """Every option by the name of its flag, section by section."""
    known = [*declared(RunOptions), *declared(Settings)]
    return {each.flag: each for section in GROUPS.values() for each in known if each.option.section == section}


FLAGS = _flags()
MAY_CHANGE = frozenset(name for name, each in FLAGS.items() if each.option.may_change)


def add_flags(parser: argparse.ArgumentParser, *, names: Collection[str] = FLAGS) -> None:
    """Adds every flag, or those of `names`, under its section. A flag that is not given leaves no attribute behind."""
    groups = {section: parser.add_argument_group(section) for section in GROUPS.values()}
    for name, each in ((name, FLAGS[name]) for name in names):
        groups[each.option.section].add_argument(f"--{name}", **_argparse_options(each))


def _argparse_options(each: Declared) -> dict[str, Any]:
    """What argparse wants to know of a flag."""
    known, kind = each.option, flag_type(each)
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": describe(each).replace("%", "%%")}
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    choices = known.flag_choices or known.choices
    return options | {"type": kind, "choices": choices, "metavar": None if choices else known.unit}


def describe(each: Declared) -> str:
    """The meaning of a flag and its default, in words."""
    default = shown_default(each)
    return each.option.help if default is None else f"{each.option.help} (default: {default})"


def shown_default(each: Declared) -> str | None:
    """The default in words; None if there is none to be told."""
    if flag_type(each) is bool or each.option.required:
        return None
    default = each.option.shown or each.default
    return None if default is None else str(default)


def flag_type(each: Declared) -> Callable[[str], Any]:
    """What turns the text of a flag into its value; bool for a switch."""
    kinds = typing.get_args(each.annotation) if isinstance(each.annotation, types.UnionType) else (each.annotation,)
    return each.option.parse or next(kind for kind in kinds if kind is not type(None))


def required() -> list[str]:
    """Names of the flags that a run cannot do without."""
    return [name for name, each in FLAGS.items() if each.option.required]


def defaults() -> dict[str, Any]:
    """The default of every flag."""
    return {name: each.default for name, each in FLAGS.items()}


def reference_page() -> str:
    """docs/flags.md."""
    lines = ["# Flags of torchrun_main.py", "", "Written by `python -m peft_pretraining.cli.flags`; do not edit.", ""]
    for group, section in GROUPS.items():
        lines += [
            f"## {group}: {section}",
            "",
            "| flag | value | meaning | default |",
            "|---|---|---|---|",
        ]
        for name, each in FLAGS.items():
            if each.option.section == section:
                choices = each.option.flag_choices or each.option.choices
                value = ", ".join(f"`{choice}`" for choice in choices) if choices else each.option.unit
                default = "required" if each.option.required else shown_default(each) or ""
                cells = (f"`--{name}`", value, each.option.help, default)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference_page(), end="")
