"""Every flag of torchrun_main.py: group, type, default, unit and meaning, as one table."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from peft_pretraining.model.adapters import KINDS
from qgalore.factory import LAZY_THRESHOLD, OPTIMIZERS
from qgalore.rules.lifts import RESIDUALS
from qgalore.rules.moments import MOMENT_POLICIES
from qgalore.subspace.projector import PROJ_TYPES, SUBSPACE_METHODS

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


class Flag(NamedTuple):
    """One flag. type: `bool` for a switch.  unit: what its value counts, or what it is.

    shown: the default in words, where `default` is None because it depends on something.
    """

    name: str
    type: Callable[[str], Any]
    default: Any
    unit: str
    help: str
    choices: tuple[str, ...] | None = None
    shown: str | None = None
    required: bool = False


FLAGS: dict[str, tuple[Flag, ...]] = {
    "model": (
        Flag("preset", str, None, "NAME", "a recipe of configs/presets, such as galore_60m: flags for everything that "
             "the command line does not give", shown="none"),
        Flag("model_config", str, None, "JSON", "shape of the model, such as configs/llama_60m.json", required=True),
        Flag("dtype", str, None, "TYPE", "of weights and activations: bfloat16 or float32",
             shown="bfloat16 where the device multiplies it natively"),
        Flag("activation_checkpointing", bool, False, "", "recompute activations in backward: less memory, more time"),
        Flag("use_hf_model", bool, False, "", "no effect: the model always is transformers' LLaMA"),
    ),
    "data": (
        Flag("dataset", str, "c4", "NAME|PATH", "c4: streamed from the hub; pydocs: documentation of the installed "
             "Python packages, nothing is downloaded; else a folder in C4's layout, a file or a quoted glob of "
             ".json.gz, .jsonl, .parquet or .txt"),
        Flag("validation", str, None, "PATH", "validation data of its own",
             shown="the dataset's validation files, else one document in a hundred"),
        Flag("tokenizer", str, None, "NAME|PATH", "a sentencepiece .model, a transformers tokenizer folder or a hub "
             "name", shown="t5-base; for pydocs its own"),
        Flag("max_length", int, 256, "TOKENS", "length of a sequence"),
        Flag("packing", str, "concat", "", "concat: documents joined by EOS, no padding, nothing thrown away; "
             "truncate: a document a sequence, cut or padded, as in the reference", choices=("concat", "truncate")),
        Flag("workers", int, 1, "PROCESSES", "that read and tokenize, per rank; 0: the training process itself"),
    ),
    "training": (
        Flag("batch_size", int, None, "SEQUENCES", "per process and micro-batch", required=True),
        Flag("gradient_accumulation", int, None, "MICRO-BATCHES", "per update and process",
             shown="as --total_batch_size implies, else 1"),
        Flag("total_batch_size", int, None, "SEQUENCES", "per update, over all processes",
             shown="batch_size x gradient_accumulation x processes"),
        Flag("num_training_steps", int, 10_000, "UPDATES", "to train for"),
        Flag("max_train_tokens", parse_count, None, "TOKENS", "to train for, with K, M or B",
             shown="as many as --num_training_steps take"),
        Flag("grad_clipping", float, 0.0, "NORM", "largest global norm of the gradients; 0: no clipping"),
        Flag("seed", int, 0, "INTEGER", "of initial weights, order of the data, random bases and rounding"),
        Flag("num_threads", int, None, "THREADS", "per process on a CPU", shown="cores / processes of this machine"),
        Flag("compile", bool, False, "", "compile the decoder layers and, with optimizers that are not torch's, the "
             "updates: a minute or so at the start, faster from then on"),
        Flag("single_gpu", bool, False, "", "one process and no more: an error under several"),
    ),
    "optimizer": (
        Flag("optimizer", str, "adamw", "NAME", ", ".join(OPTIMIZERS)),
        Flag("lr", float, 1e-4, "RATE", "peak learning rate"),
        Flag("matrix_lr_ratio", float, 1.0, "RATIO", "that of the attention and MLP matrices over --lr; times "
             "--galore_scale where they are projected"),
        Flag("weight_decay", float, 0.0, "RATE", "decoupled; with adam and sgd added to the gradient"),
        Flag("beta1", float, None, "RATE", "decay of the first moment; sgd's momentum", shown="0.9; 0 for sgd"),
        Flag("beta2", float, None, "RATE", "decay of Adam's second moment, of Lion's momentum",
             shown="0.999; 0.99 for lion"),
        Flag("scheduler", str, None, "", "of the learning rate, after the warm-up",
             choices=("linear", "cosine", "cosine_restarts"), shown="cosine; for --peft relora cosine_restarts"),
        Flag("warmup_steps", int, None, "UPDATES", "of linear warm-up", shown="a tenth of the run, at most 1000"),
        Flag("min_lr_ratio", float, 0.1, "RATIO", "last learning rate over the peak"),
        Flag("cycle_length", int, None, "UPDATES", "between restarts; cosine_restarts needs it",
             shown="none; for --peft relora --reset_every"),
        Flag("restart_warmup_steps", int, None, "UPDATES", "of warm-up after each restart",
             shown="0; for --peft relora a tenth of a cycle, at most 100"),
    ),
    "low-rank projection, for optimizers with galore in their name": (
        Flag("rank", int, 128, "COLUMNS", "of each basis, or with --peft of each adapter; clamped to the shorter side "
             "of a matrix"),
        Flag("update_proj_gap", int, 50, "UPDATES", "between refreshes of a basis"),
        Flag("galore_scale", float, 1.0, "FACTOR", "on the update of the projected matrices"),
        Flag("proj_type", str, "std", "", "side that is projected: the shorter (std), the longer, a fixed one or both; "
             "or, of the shorter side, bases that learn by online PCA (continuous: by AdamW, else by the optimizer in "
             "the name) or are drawn at random", choices=PROJ_TYPES),
        Flag("subspace", str, "iterate", "", "iterate: warm orthogonal iteration; svd: exact, every time",
             choices=SUBSPACE_METHODS),
        Flag("moments_on_refresh", str, "project", "", "the first moment is carried into the new basis, kept as it is "
             "(the reference), or both are reset", choices=MOMENT_POLICIES),
        Flag("residual", str, "none", "", "fira: what the projection leaves out of a gradient comes back into the "
             "update, scaled as the rest of it; for AdamW", choices=RESIDUALS),
        Flag("proj_lr", float, None, "RATE", "step size of online PCA; follows the schedule of the learning rate",
             shown="1 / --update_proj_gap"),
        Flag("proj_reg", float, 0.1, "FACTOR", "on the distance of such bases from orthonormal ones, as in Online "
             "Subspace Descent; its code has 0"),
        Flag("cos_threshold", float, None, "OVERLAP", "of successive bases, 0 to 1, from which on a basis counts as "
             "still and its gap grows", shown=f"{LAZY_THRESHOLD} for q_galore, else no gap ever grows"),
        Flag("gamma_proj", float, 2.0, "FACTOR", "by which the gap of a still basis grows"),
        Flag("queue_size", int, 5, "REFRESHES", "whose mean overlap decides"),
        Flag("log_details", bool, False, "", "record how much of a gradient a subspace misses, how far its basis has "
             "turned and what it costs: of one matrix in an update, all in their turn"),
    ),
    "adapters, the baselines of GaLore's tables, for optimizers without galore in their name": (
        Flag("peft", str, None, "", "what takes the place of the attention and MLP matrices; embeddings, norms and "
             "head train in full. lora: frozen initial weights plus a product of --rank; relora: the same, merged and "
             "restarted every --reset_every; low_rank: the product alone", choices=KINDS, shown="none"),
        Flag("peft_alpha", int, 32, "FACTOR", "over the rank, on the product of lora and relora"),
        Flag("reset_every", int, None, "UPDATES", "between resets; --peft relora needs it. In its paper, 5000 of "
             "20,000", shown="none"),
    ),
    "quantization": (
        Flag("weight_quant", bool, False, "", "keep the attention and MLP weights in INT8, with no other copy"),
        Flag("weight_bits", int, 8, "BITS", "of these weights: 8"),
        Flag("weight_group_size", int, 256, "ELEMENTS", "of a row that share a scale, at most; -1: the whole row"),
        Flag("stochastic_round", bool, False, "", "round them stochastically, so that small updates count on average"),
        Flag("simulation", bool, False, "", "keep float32 weights of just the values that INT8 would have"),
        Flag("proj_quant", bool, False, "", "keep the bases in --proj_bits"),
        Flag("proj_bits", int, 4, "BITS", "of the bases: 4 or 8"),
        Flag("proj_group_size", int, 256, "ELEMENTS", "of a basis' row that share a scale, at most; -1: the whole row"),
        Flag("embedding_state_bits", int, 8, "BITS", "of the moments of embedding and head where the others have 8: 8 "
             "or 32"),
        Flag("accumulation_dtype", str, None, "TYPE", "of the sums over micro-batches",
             choices=("bfloat16", "float32"), shown="the model's"),
    ),
    "checkpoints and recovery": (
        Flag("save_every", int, 10_000, "UPDATES", "between checkpoints; one always ends the run"),
        Flag("keep_last", int, 3, "CHECKPOINTS", "older ones are deleted; 0: none is"),
        Flag("keep_every", int, 0, "UPDATES", "whose multiples' checkpoints are never deleted; 0: none"),
        Flag("continue_from", str, None, "DIR", "a checkpoint, a run's folder (its newest complete checkpoint), or a "
             "transformers folder, whose weights a new run begins with", shown="a new run"),
        Flag("resume", str, None, "", "auto: go on from the newest sound checkpoint in --save_dir, if there is one",
             choices=("auto",), shown="begin anew"),
        Flag("allow_changed", str, None, "A,B", "flags that may differ from those of the run that goes on",
             shown="none that alters training"),
        Flag("eval_only", bool, False, "", "evaluate what --continue_from names, say so, and stop; other flags are "
             "taken from its run"),
        Flag("max_bad_updates", int, 10, "UPDATES", "in a row with a loss or gradient that is not finite: each is "
             "skipped, and after so many the run stops"),
        Flag("max_bad_documents", parse_count, 100, "DOCUMENTS", "that cannot be read and are skipped, with K, M or B: "
             "at one more the run stops"),
        Flag("spike_rollback", float, 0.0, "DEVIATIONS", "above the median of recent losses from which on an update is "
             "undone: the run goes back to its last checkpoint and on with other data; 0: never"),
    ),
    "run, evaluation and record": (
        Flag("save_dir", str, None, "DIR", "for metrics.jsonl and models", shown="checkpoints/CONFIG-DATE"),
        Flag("eval_every", int, 5_000, "UPDATES", "between evaluations; one always ends the run"),
        Flag("eval_tokens", parse_count, 10_000_000, "TOKENS", "of validation, with K, M or B; always the same ones"),
        Flag("wandb_mode", str, "online", "", "online falls back to offline where there is no account",
             choices=("online", "offline", "disabled")),
        Flag("unset_wandb", bool, False, "", "the reference's name for --wandb_mode disabled"),
        Flag("project", str, "qgalore", "NAME", "wandb project"),
        Flag("name", str, None, "NAME", "of the run in wandb", shown="CONFIG-OPTIMIZER, and -PEFT with --peft"),
        Flag("tags", str, None, "A,B", "for wandb", shown="none"),
        Flag("dry_run", bool, False, "", "check the arguments, say who is trained how, and stop"),
    ),
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds every flag to the parser, under its group. A flag that is not given leaves no attribute behind."""
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            group.add_argument(f"--{flag.name}", **_options(flag))


def _options(flag: Flag) -> dict[str, Any]:
    """What argparse wants to know of a flag."""
    shown = flag.shown or flag.default
    text = flag.help if flag.type is bool or flag.required or shown is None else f"{flag.help} (default: {shown})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if flag.type is bool:
        return options | {"action": "store_true"}
    return options | {"type": flag.type, "choices": flag.choices, "metavar": None if flag.choices else flag.unit}


def required() -> list[str]:
    """Names of the flags that a run cannot do without."""
    return [flag.name for flags in FLAGS.values() for flag in flags if flag.required]


def defaults() -> dict[str, Any]:
    """The default of every flag."""
    return {flag.name: flag.default for flags in FLAGS.values() for flag in flags}
