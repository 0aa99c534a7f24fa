"""Where a run begins: with weights from its seed, with the weights of another model, or at a checkpoint of its own."""

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedConfig

from peft_pretraining.checkpoint.files import (
    CONFIG,
    TOKENIZER,
    Checkpoint,
    checkpoint_folders,
    complete_checkpoints,
    find_checkpoint,
    newest_sound,
)
from peft_pretraining.checkpoint.weights import is_transformers_folder
from peft_pretraining.data.fingerprint import describe_change
from peft_pretraining.errors import UserError
from peft_pretraining.model.config import read_config

INHERITED_NOT = (
    "config", "continue_from", "eval_only", "dry_run", "save_dir", "resume", "ignored", "batch_size", "single_gpu",
    "time_budget", "fit",
)  # fmt: skip
EVALUATION_BATCH = 8  # default number of sequences


@dataclass(frozen=True)
class StartingPoint:
    """Where a run begins. With neither of these it is a new run with weights drawn from its seed."""

    checkpoint: Checkpoint | None = None  # the checkpoint of the run that goes on, with all files verified
    weights: Path | None = None  # a transformers folder with the weights of a new run

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder; None for a new run."""
        return self.checkpoint.folder if self.checkpoint else None

    @property
    def saved(self) -> dict[str, Any]:
        """The checkpoint's state.json; empty for a new run."""
        return self.checkpoint.state if self.checkpoint else {}


def choose_start(args: argparse.Namespace, *, config: PreTrainedConfig, may_change: Collection[str]) -> StartingPoint:
    """The starting point that --continue_from and --resume ask for. A checkpoint that --resume auto finds comes first.

    Raises UserError if there is nothing, where it is damaged, or where the arguments would alter training.
    """
    if args.eval_only:
        return StartingPoint()
    checkpoint = newest_sound(Path(args.save_dir)) if args.resume else None
    if checkpoint is None and args.continue_from:
        if is_transformers_folder(args.continue_from) and not complete_checkpoints(Path(args.continue_from)):
            _refuse_a_taken_folder(args.save_dir)
            return StartingPoint(weights=Path(args.continue_from))
        checkpoint = Checkpoint.open(find_checkpoint(Path(args.continue_from))).verify()
    if checkpoint is None or not same_folder(checkpoint.folder.parent, args.save_dir):
        _refuse_a_taken_folder(args.save_dir)
    if checkpoint is not None:
        check_unchanged(checkpoint, args, config=config, may_change=may_change)
        if checkpoint.update > args.num_training_steps:
            raise UserError(
                f"{checkpoint.folder} is of update {checkpoint.update}, and --num_training_steps is "
                f"{args.num_training_steps}: that is over. Give more, or go on from an earlier checkpoint."
            )
    return StartingPoint(checkpoint=checkpoint)


def same_folder(folder: Path, save_dir: str | Path | None) -> bool:
    """Whether --save_dir is this folder, or not given at all."""
    return save_dir is None or folder.resolve() == Path(save_dir).resolve()


def _refuse_a_taken_folder(save_dir: str | None) -> None:
    """A run that begins in the folder of another would delete its checkpoints, one after the other."""
    if not save_dir:
        return
    if complete_checkpoints(Path(save_dir)):
        raise UserError(
            f"--save_dir {save_dir} holds checkpoints of an earlier run. Go on with it by --resume auto, or choose "
            "another folder."
        )
    if damaged := checkpoint_folders(Path(save_dir)):
        raise UserError(
            f"--save_dir {save_dir} holds checkpoints of an earlier run, and all are damaged: "
            f"{', '.join(folder.name for folder in damaged)}. Move them away, or choose another folder."
        )


def check_unchanged(
    checkpoint: Checkpoint, args: argparse.Namespace, *, config: PreTrainedConfig, may_change: Collection[str]
) -> None:
    """Raises UserError that names the flags which would alter the training of the run that `checkpoint` is of.

    may_change: the flags that may differ; so may those that --allow_changed names.
    """
    saved = checkpoint.state["args"]
    allowed = set((args.allow_changed or "").split(","))
    now = vars(args)
    changed = [
        name
        for name in sorted(saved.keys() & now.keys() - {*may_change, "ignored"})
        if saved[name] != now[name] and name not in allowed
    ]
    lines = [f"--{name} {saved[name]} -> {now[name]}" for name in changed]
    if "model_config" not in allowed and _shape(read_config(checkpoint.file(CONFIG))) != _shape(config):
        lines.append(f"--model_config: {args.model_config} is another model")
        changed.append("model_config")
    if lines:
        raise UserError(
            f"{checkpoint.folder} is of a run that was trained otherwise: {'; '.join(lines)}. "
            f"Give what it had, or allow it: --allow_changed {','.join(changed)}"
        )


def _shape(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that make two models different; names, versions and dtypes do not."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
    return {name: value for name, value in config.to_dict().items() if name not in ignored}


def check_data(now: dict[str, str], *, start: StartingPoint, args: argparse.Namespace) -> None:
    """Raises UserError if the training data is not that of the checkpoint, whose position would then mean nothing.

    The same files may be in another place. If there are no fingerprints, --dataset must be the same.

    now: fingerprint of the training data, see DocumentSource.
    """
    if start.checkpoint is None:
        return
    saved, dataset = start.saved["fingerprint"], start.saved["args"]["dataset"]
    if saved and now:
        change = describe_change(saved, now)
    else:
        change = None if dataset == args.dataset else f"--dataset {dataset} -> {args.dataset}"
    if change is None:
        return
    if "dataset" not in (args.allow_changed or "").split(","):
        raise UserError(
            f"the training data has changed since {start.folder}: {change}. Bring the files back, or go on "
            "with the changed data: --allow_changed dataset"
        )
    logger.warning(f"the training data has changed: {change}. Documents may be read twice or not at all.")


def check_validation(now: dict[str, str], *, start: StartingPoint) -> None:
    """Warns if the validation data is not that of the checkpoint: its losses cannot be compared with the new ones.

    now: fingerprint of the validation data, see DocumentSource.
    """
    if change := describe_change(start.saved.get("validation_fingerprint", {}), now):
        logger.warning(f"the validation data has changed: {change}. Losses before and after cannot be compared.")


def check_tokenizer(digest: str, *, start: StartingPoint, args: argparse.Namespace) -> None:
    """Raises UserError if the tokenizer is not that of the checkpoint, whatever its path is.

    digest: that of the tokenizer, see Tokenizer.digest.
    """
    if start.checkpoint is None or "tokenizer" in (args.allow_changed or "").split(","):
        return
    saved, name = start.saved.get("tokenizer"), start.saved["args"]["tokenizer"]
    if name != args.tokenizer if saved is None else saved != digest:
        raise UserError(
            f"--tokenizer {args.tokenizer} gives other ids than the one that {start.folder} was trained with ({name}). "
            f"Take that one (a copy is in {start.folder / TOKENIZER if start.folder else TOKENIZER}), or allow it: "
            "--allow_changed tokenizer"
        )


def inherited_args(path: str) -> dict[str, Any]:
    """The arguments that an evaluation takes from a checkpoint, a run's folder or a transformers folder."""
    if is_transformers_folder(path):
        own = {"tokenizer": path} if (Path(path) / "tokenizer_config.json").exists() else {}
        return {"model_config": str(Path(path) / "config.json"), "batch_size": EVALUATION_BATCH} | own
    checkpoint = Checkpoint.open(find_checkpoint(Path(path)))
    kept = {name: value for name, value in checkpoint.state["args"].items() if name not in INHERITED_NOT}
    sizes = {"batch_size": EVALUATION_BATCH, "total_batch_size": None, "gradient_accumulation": None}
    tokenizer = {"tokenizer": str(checkpoint.tokenizer)} if checkpoint.tokenizer else {}
    return kept | sizes | tokenizer | {"model_config": str(checkpoint.folder / CONFIG)}
