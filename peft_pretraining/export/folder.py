"""Models as transformers folders: complete or absent at any moment, and written one tensor at a time.

Memory holds one tensor in plain form, never the model: a machine that trains a 7B in INT8 has no room for a copy.
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from peft_pretraining.checkpoint.tensor_file import write_tensors
from peft_pretraining.checkpoint.weights import StoredWeights
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.export.tokenizer import save_tokenizer, to_transformers
from peft_pretraining.model.adapters import Adapters, merging
from peft_pretraining.model.build import meta_model
from qgalore.storage.quantized_weight import QuantizedWeight

SHARD = "5GB"  # the largest file


@contextlib.contextmanager
def appearing(folder: Path, *, replace: bool = False) -> Generator[Path, None, None]:
    """Gives an empty folder to write to, which becomes `folder` at the end, or vanishes on an error.

    replace: whether an older `folder` is replaced. Raises UserError if it is in the way, or nothing can be written.
    """
    folder = folder.resolve()
    beside = folder.with_name(f".{folder.name}.incomplete")
    try:
        if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder. Choose another one, or remove it.")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{folder} cannot be written ({reason}).") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_weights(
    like: Mapping[str, Tensor], folder: Path, *, read: Callable[[str], Tensor], max_shard_size: str = SHARD
) -> None:
    """Weights as safetensors and, where they are several files, their index.

    like: for each name a tensor of the shape and dtype to write, which may be on the meta device.
    read: gives the weight of a name, a QuantizedWeight or an ordinary tensor.
    max_shard_size: the size of the largest file. Raises UserError if it is not a size.
    """
    try:
        split = split_torch_state_dict_into_shards(dict(like), max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"--max_shard_size {max_shard_size}: a number with KB, MB, GB or TB is needed.") from error
    for file, names in split.filename_to_tensors.items():
        shard = {name: like[name] for name in names}
        write_tensors(
            folder / file,
            shard,
            read=lambda name: _plain(read(name), dtype=like[name].dtype),
            metadata={"format": "pt"},
        )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _plain(weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """An ordinary tensor on the CPU; the values of 8-bit weights are rounded once."""
    values = weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)
    return values.detach().cpu().contiguous()


def write_description(config: PreTrainedConfig, folder: Path, *, tokenizer: Tokenizer | None) -> str | None:
    """config.json, generation_config.json and the tokenizer, for AutoModelForCausalLM and AutoTokenizer.

    config: the model's; the ids of the tokenizer's special tokens are put into it.
    tokenizer: None if there is none to write.
    Returns why transformers' form of the tokenizer had to be left out; None if it is there, or none was given.
    """
    problem, pad = None, config.pad_token_id
    config.use_cache = True
    if tokenizer:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    config.save_pretrained(folder)  # AutoTokenizer looks there, too
    if tokenizer:
        try:
            pad = _write_tokenizer(tokenizer, folder, max_length=config.max_position_embeddings)
        except UserError as error:
            problem = str(error)
    ids = dict(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=pad)
    GenerationConfig(**ids).save_pretrained(folder)
    return problem


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> int | None:
    """The tokenizer's own `.model` file, which other tools read, and transformers' form.

    Returns the id of the padding, which is not put into the model's config, where it would freeze the padding's row.
    Raises UserError if transformers has no form for this tokenizer.
    """
    for name, content in tokenizer.files().items():
        if name.endswith(".model"):
            (folder / name).write_bytes(content)
    converted = to_transformers(tokenizer, max_length=max_length)
    save_tokenizer(converted, folder, original=tokenizer)
    return converted.pad_token_id


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: Tokenizer,
    adapters: Adapters | None = None,
    weights: StoredWeights | None = None,
) -> str | None:
    """Writes the live model in its own dtype as a transformers folder, as the export does. Replaces an older one.

    adapters: the adapters in the model, which are merged into its weights on the way.
    weights: the model's weights in a checkpoint, if this process does not hold all of them.
    Returns what write_description does.
    """
    live: dict[str, Tensor] = dict(model.named_parameters())
    read = live.__getitem__ if weights is None else weights.read
    like: dict[str, Tensor] = dict(meta_model(model.config, dtype=model.dtype).named_parameters())
    config = copy.deepcopy(model.config)
    with appearing(folder, replace=True) as beside:
        problem = write_description(config, beside, tokenizer=tokenizer)
        write_weights(like, beside, read=merging(read, adapters, names=live))
    return problem
