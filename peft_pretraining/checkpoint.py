"""Models on disk, as transformers folders."""

import os
import shutil
import time
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from peft_pretraining.errors import UserError


def choose_save_dir(save_dir: str | None, *, model_config: str) -> Path:
    """--save_dir, or without it a new folder named after the model and the time."""
    if save_dir:
        return Path(save_dir)
    return Path("checkpoints") / f"{Path(model_config).stem}-{time.strftime('%Y-%m-%d-%H-%M-%S')}"


def prepare_save_dir(save_dir: Path) -> None:
    """Makes the folder and proves that it can be written. Raises UserError where it cannot."""
    probe = save_dir / f".writable-{os.getpid()}"
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--save_dir {save_dir} cannot be written ({reason}). Choose another folder.") from None


def _plain(tensor: Tensor) -> Tensor:
    """An ordinary tensor in the model's dtype: INT8 weights are written as the values that they stand for."""
    return tensor.dequantize() if hasattr(tensor, "store_") else tensor


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes config.json and model.safetensors into `folder`, which is complete or absent at any moment.

    AutoModelForCausalLM.from_pretrained(folder) loads it. An older folder of that name is replaced.
    """
    beside = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(beside, ignore_errors=True)
    disable_progress_bar()  # transformers' own would break ours
    model.save_pretrained(beside, state_dict={name: _plain(tensor) for name, tensor in model.state_dict().items()})
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
