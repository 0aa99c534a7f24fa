"""The command line of run_glue: the flags of GaLore's script with their meanings, and some of torchrun_main.py.

What the rest of the program reads are the flags of torchrun_main.py, so those of GaLore's script are put into these.
"""

import argparse
import math
from importlib.util import find_spec
from typing import Any

from peft_pretraining.cli.flags import FLAGS, MAY_CHANGE, add_flags, defaults
from peft_pretraining.cli.no_effect import without_effect
from peft_pretraining.errors import Parser, UserError
from peft_pretraining.glue.methods import METHODS
from peft_pretraining.glue.rates import DECAYS
from peft_pretraining.glue.tasks import TASKS
from peft_pretraining.model.dtypes import DTYPES
from qgalore.factory import find_recipe

# GaLore's name of a flag that torchrun_main.py has, too.
SAME = {
    "lora_r": "rank", "learning_rate": "lr", "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation", "num_warmup_steps": "warmup_steps",
    "output_dir": "save_dir", "model_name_or_path": "model_config", "lora_alpha": "peft_alpha",
}  # fmt: skip
# Flags of torchrun_main.py that mean the same here.
SHARED = (
    "weight_decay", "update_proj_gap", "galore_scale", "proj_type", "subspace", "moments_on_refresh", "residual",
    "proj_lr", "proj_reg", "cos_threshold", "gamma_proj", "queue_size", "proj_group_size", "matrix_lr_ratio", "beta1",
    "beta2", "embedding_state_bits", "moments_bits", "weight_bits", "weight_group_size", "freeze_others",
    "grad_clipping", "activation_checkpointing", "seed", "num_threads", "keep_last", "time_budget", "resume",
    "continue_from", "allow_changed", "max_bad_updates", "log_details", "no_report",
)  # fmt: skip
HUB = "this program uploads nothing: leave it out, and use `hf upload REPOSITORY OUTPUT_DIR` afterwards"
REFUSED = {
    "push_to_hub": HUB,
    "hub_model_id": HUB,
    "hub_token": HUB,
    "trust_remote_code": "code from the hub is never run: leave it out",
}
CHANGEABLE = MAY_CHANGE | {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "output_dir",
    "checkpointing_steps", "resume_from_checkpoint", "with_tracking", "report_to", "low_rank_method", "train_file",
    "validation_file", "validation_mismatched_file", "model_name_or_path", "load_pretrained_model", "tokenizer_name",
    "micro_batches",
}  # fmt: skip
NEVER = 1 << 62
GROUP_SIZES = {8: 256, 4: 64}  # by the bits of a weight; NF4's blocks, too, have 64
ABOUT = (
    "Fine-tunes a model of transformers for classification or regression, as GaLore's run_glue.py, by full training, "
    "LoRA, QLoRA, GaLore, Q-GaLore or APOLLO. See docs/finetuning.md."
)


def parse_args(argv: list[str] | None, *, world_size: int) -> argparse.Namespace:
    """The arguments, checked. What depends on the number of examples is left to complete_length.

    world_size: processes of this run. Raises UserError for anything that cannot be meant.
    """
    given = make_parser().parse_args(argv)
    for name, why in REFUSED.items():
        if getattr(given, name):
            raise UserError(f"--{name}: {why}.")
    given.method = _method_of(given)
    method = METHODS[given.method]
    own = vars(given)
    told = {name: value for name, value in own.items() if name in FLAGS}
    told |= {flag: own[name] for name, flag in SAME.items() if own[name] is not None}
    bits = told.get("weight_bits", method.weight_bits or 8)
    usual = {"weight_bits": bits, "weight_group_size": GROUP_SIZES.get(bits)}
    args = argparse.Namespace(**own | defaults() | usual | told | method.flags)
    args.optimizer, args.peft = method.optimizer, "lora" if method.adapters else None
    args.weight_quant = method.weight_bits is not None
    args.dataset = given.task_name or given.train_file
    args.allow_changed = ",".join(filter(None, ["model_config", args.allow_changed]))
    args.name = f"{args.dataset}-{given.method}"
    args.total_batch_size = args.batch_size * args.gradient_accumulation * world_size
    _check(args)
    _complete_saving(args)
    _complete_record(args)
    if args.cos_threshold is None:
        args.cos_threshold = find_recipe(args.optimizer).lazy_threshold
    names = {flag: name for name, flag in SAME.items()}
    passed = set(told) - {flag for name, flag in SAME.items() if own[name] == make_parser().get_default(name)}
    args.ignored = {f"--{names.get(n, n)}": why for n, why in without_effect(args).items() if n in passed}
    return args


def make_parser() -> Parser:
    """The parser, also for --help and the documentation."""
    parser = Parser(prog="python -m peft_pretraining.run_glue", description=ABOUT, allow_abbrev=False)
    for add in (_add_data, _add_model, _add_training, _add_saving):
        add(parser)
    add_flags(parser, names=SHARED)
    return parser


def _add_data(parser: Parser) -> None:
    data = parser.add_argument_group("task and data")
    data.add_argument(
        "--task_name", choices=TASKS, help="task of GLUE; without files it is read from ./glue/TASK, or from the hub"
    )
    data.add_argument("--train_file", help="csv, tsv, json or jsonl file with a column `label`")
    data.add_argument("--validation_file", help="the same, to evaluate on; of mnli, the matched one")
    data.add_argument("--validation_mismatched_file", help="the mismatched one of mnli")
    data.add_argument("--max_length", type=int, default=128, help="longer texts are cut (default: 128 tokens)")
    data.add_argument(
        "--pad_to_max_length", action="store_true", help="pad all texts to --max_length, not to the longest of a batch"
    )


def _add_model(parser: Parser) -> None:
    model = parser.add_argument_group("model and method")
    model.add_argument("--model_name_or_path", required=True, help="transformers folder, or a name on the hub")
    model.add_argument(
        "--method", choices=METHODS, help="how it is trained (default: full, or galore with --enable_galore)"
    )
    model.add_argument("--enable_galore", action="store_true", help="the same as --method galore")
    model.add_argument(
        "--lora_all_modules",
        action="store_true",
        help="project all linear layers of attention and "
        "MLP, or give them adapters; else only query (and value in a LLaMA)",
    )
    model.add_argument("--lora_r", type=int, default=8, help="rank of bases or adapters (default: 8)")
    model.add_argument(
        "--lora_alpha", type=int, default=16, help="factor of adapters, divided by --lora_r (default: 16)"
    )
    model.add_argument(
        "--qlora_codec",
        choices=("affine", "nf4"),
        default="affine",
        help="how --method qlora keeps "
        "weights in 4 bits: groups with scale and zero point, or bitsandbytes' NF4 (default: affine)",
    )
    model.add_argument(
        "--eval_llama",
        action="store_true",
        help="a LLaMA whose shape --model_name_or_path gives, "
        "with weights from --load_pretrained_model; padding on the left",
    )
    model.add_argument(
        "--load_pretrained_model",
        metavar="DIR",
        help="folder with pytorch_model.bin or model.safetensors, whose weights are taken where names fit",
    )
    model.add_argument("--tokenizer_name", help="tokenizer (default: the model's; t5-base with --eval_llama)")
    model.add_argument("--use_slow_tokenizer", action="store_true", help="a tokenizer in Python, not in Rust")
    model.add_argument("--ignore_mismatched_sizes", action="store_true", help="draw a classifier of another size anew")
    model.add_argument("--low_rank_method", help="accepted for GaLore's scripts; it has no effect there, either")
    model.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="data type of weights and activations (default: float32)"
    )


def _add_training(parser: Parser) -> None:
    train = parser.add_argument_group("training")
    train.add_argument(
        "--per_device_train_batch_size", type=int, default=8, help="examples in a micro-batch (default: 8)"
    )
    train.add_argument(
        "--per_device_eval_batch_size", type=int, default=8, help="examples at once in an evaluation (default: 8)"
    )
    train.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="micro-batches in an update (default: 1)"
    )
    train.add_argument("--learning_rate", type=float, default=5e-5, help="peak learning rate (default: 5e-5)")
    train.add_argument("--num_train_epochs", type=int, default=3, help="epochs (default: 3)")
    train.add_argument("--max_train_steps", type=int, help="updates; wins over --num_train_epochs")
    train.add_argument(
        "--lr_scheduler_type", choices=DECAYS, default="linear", help="shape of the learning rate (default: linear)"
    )
    train.add_argument("--num_warmup_steps", type=int, default=0, help="updates of warm-up (default: 0)")
    train.add_argument(
        "--compile",
        action="store_true",
        help="compile the updates of our own optimizers: a minute or so at the start, faster afterwards",
    )


def _add_saving(parser: Parser) -> None:
    saving = parser.add_argument_group("saving and record")
    saving.add_argument("--output_dir", help="folder for model, results, record and checkpoints")
    saving.add_argument(
        "--checkpointing_steps", help="updates from one checkpoint to the next, or `epoch` (default: one at the end)"
    )
    saving.add_argument(
        "--resume_from_checkpoint",
        metavar="DIR",
        help="checkpoint, or folder with checkpoints, to "
        "go on from; `auto`: the newest in --output_dir, if there is one",
    )
    saving.add_argument("--with_tracking", action="store_true", help="also record to what --report_to names")
    saving.add_argument(
        "--report_to",
        choices=("all", "wandb", "tensorboard"),
        default="all",
        help="wandb, tensorboard or both, with --with_tracking (default: all)",
    )
    for name in ("push_to_hub", "hub_model_id", "hub_token", "trust_remote_code"):
        switch: dict[str, Any] = {"action": "store_true"} if name == "push_to_hub" else {}
        saving.add_argument(f"--{name}", help="refused", **switch)


def complete_length(args: argparse.Namespace, *, examples: int) -> None:
    """What depends on the number of training examples: updates, evaluations, checkpoints, the schedule's end."""
    args.updates_per_epoch = per_epoch = math.ceil(examples / args.total_batch_size)
    args.num_training_steps = args.max_train_steps or args.num_train_epochs * per_epoch
    args.eval_every = per_epoch
    if args.checkpointing_steps == "epoch":
        args.save_every = per_epoch
    if args.warmup_steps > args.num_training_steps:
        raise UserError(f"--num_warmup_steps {args.warmup_steps}: the run has {args.num_training_steps} updates.")


def _method_of(given: argparse.Namespace) -> str:
    method = given.method or ("galore" if given.enable_galore else "full")
    if given.enable_galore and not find_recipe(METHODS[method].optimizer).projected:
        raise UserError(
            f"--enable_galore contradicts --method {method}, which projects nothing: leave one of them out."
        )
    return method


def _check(args: argparse.Namespace) -> None:
    """Refuses numbers out of range, under the names that were given."""
    names = {flag: name for name, flag in SAME.items()}
    for flag, each in FLAGS.items():
        if problem := each.option.problem(getattr(args, flag)):
            raise UserError(f"--{names.get(flag, flag)} {getattr(args, flag)}: {problem}.")
    for name in ("num_train_epochs", "max_train_steps", "per_device_eval_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1.")
    if args.qlora_codec == "nf4" and args.method != "qlora":
        raise UserError(f"--qlora_codec nf4 with --method {args.method}: only qlora has a codec to choose.")
    if args.qlora_codec == "nf4" and args.weight_bits != 4:
        raise UserError(f"--weight_bits {args.weight_bits} with --qlora_codec nf4, which has 4 bits: leave it out.")
    if args.qlora_codec == "nf4" and find_spec("bitsandbytes") is None:
        raise UserError(
            "--qlora_codec nf4 needs the package bitsandbytes: pip install bitsandbytes. Or leave it out: our own 4 "
            "bits need none."
        )


def _complete_saving(args: argparse.Namespace) -> None:
    steps, args.save_every = args.checkpointing_steps, NEVER
    if steps not in (None, "epoch"):
        if not steps.isdecimal() or int(steps) < 1:
            raise UserError(f"--checkpointing_steps {steps}: a number of updates or `epoch` is needed.")
        args.save_every = int(steps)
    if args.resume_from_checkpoint == "auto":
        args.resume = "auto"
    elif args.resume_from_checkpoint:
        args.continue_from = args.resume_from_checkpoint
    if args.resume and not args.save_dir:
        raise UserError("--resume_from_checkpoint auto needs --output_dir DIR: the folder that it looks into.")


def _complete_record(args: argparse.Namespace) -> None:
    tracked = args.report_to if args.with_tracking else ""
    args.wandb_mode = "online" if tracked in ("all", "wandb") else "disabled"
    args.tensorboard = tracked in ("all", "tensorboard")
