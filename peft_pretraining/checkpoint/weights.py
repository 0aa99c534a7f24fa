"""Weights from disk, one tensor at a time: of a model in transformers' format, or of one of our checkpoints.

Both are safetensors, which are never unpickled. All names and shapes are checked, from the files' headers, before the
first weight is written; then every tensor is read, copied and forgotten, so no second copy of the model ever exists.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_pretraining.checkpoint.files import open_tensors
from peft_pretraining.checkpoint.old_format import upgrade_quantized
from peft_pretraining.checkpoint.shared_file import rows_of
from peft_pretraining.errors import UserError
from peft_pretraining.model.adapters import base_parameters
from peft_pretraining.model.config import read_config
from peft_pretraining.model.dtypes import DTYPES
from peft_pretraining.model.family import Family, family_of
from qgalore.sharding import local, shard_of
from qgalore.storage.affine import Affine
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.storage.stored import Stored, build_codec, part_key

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # safetensors' names


@dataclass(frozen=True)
class Quantized:
    """How a checkpoint holds a quantized weight."""

    codec: Affine
    dtype: torch.dtype  # the dtype that it appears in

    def part_names(self, name: str) -> list[str]:
        return [part_key(name, part) for part in self.codec.PARTS]

    def build(self, parts: Iterable[Tensor]) -> QuantizedWeight:
        named = dict(zip(self.codec.PARTS, parts, strict=True))
        return QuantizedWeight(Stored(self.codec, named, self.codec.shape_of(named)), dtype=self.dtype)


@dataclass(frozen=True)
class StoredWeights:
    """The weights in a folder."""

    folder: Path
    files: Mapping[str, Path]  # the file of each tensor, by its name
    quantized: Mapping[str, Quantized]  # the quantized weights, by name

    def names(self) -> set[str]:
        """The weights' names; a quantized weight counts once."""
        parts = {part for name, settings in self.quantized.items() for part in settings.part_names(name)}
        return self.files.keys() - parts | self.quantized.keys()

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raises UserError, naming the first mismatch, unless the weights have exactly these names and shapes."""
        missing, unknown = shapes.keys() - self.names(), self.names() - shapes.keys()
        if missing:
            raise UserError(f"{self.folder}: {min(missing)}{_and_more(missing)} missing.")
        if unknown:
            raise UserError(f"{self.folder}: holds {min(unknown)}{_and_more(unknown)}, which the model does not have.")
        for name, shape in shapes.items():
            for stored, (wanted, dtypes) in self._expected(name, shape).items():
                found, dtype = self._header(stored)
                if found != wanted or dtype not in dtypes:
                    needed = f"{' or '.join(dtypes)} {wanted}"
                    raise UserError(f"{self.folder}: {stored} is {dtype} {found}, but the model needs {needed}.")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a weight appears in."""
        return self.quantized[name].dtype if name in self.quantized else FLOATS[self._header(name)[1]]

    def read(self, name: str) -> Tensor:
        """One weight, on the CPU: an ordinary tensor as stored, or a QuantizedWeight. Raises UserError for NaN."""
        if name in self.quantized:
            settings = self.quantized[name]
            weight: Tensor = settings.build(_read_tensor(self.files[part], part) for part in settings.part_names(name))
        else:
            weight = _read_tensor(self.files[name], name)
        # One NaN in a group makes its scale NaN.
        if not torch.isfinite(getattr(weight, "scale", weight)).all():
            raise UserError(f"{self.folder}: {name} holds NaN or infinity. Take an earlier or another model.")
        return weight

    def _header(self, stored: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor in the files."""
        path = self.files.get(stored)
        if path is None:
            raise UserError(f"{self.folder}: {stored} is missing.")
        with open_tensors(path) as file:
            if stored not in file.keys():
                raise UserError(f"{path}: {stored} is missing.")
            header = file.get_slice(stored)
            return tuple(header.get_shape()), header.get_dtype()

    def _expected(self, name: str, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Shape and possible dtypes of each tensor that the files must hold for a weight."""
        if name not in self.quantized:
            return {name: (tuple(shape), tuple(FLOATS))}
        codec = self.quantized[name].codec
        group_size = codec.group_size
        if len(shape) != 2 or group_size < 1 or shape[1] % group_size:
            raise UserError(f"{self.folder}: {name} {tuple(shape)} cannot be in 8 bits in groups of {group_size}.")
        return {
            part_key(name, part): (tuple(part_shape), ("F32" if dtype.is_floating_point else "U8",))
            for part, (part_shape, dtype) in codec.spec(shape).items()
        }


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder is one of our checkpoints."""
    return (Path(path) / "manifest.json").is_file()


def is_transformers_folder(path: str | Path) -> bool:
    """Whether a folder holds a model in transformers' format. Our checkpoints do not."""
    return (Path(path) / "config.json").is_file() and not is_checkpoint(path)


def load_initial_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Copies the weights of a model in transformers' format (config.json and safetensors) into `model`.

    Each is cast to its parameter's dtype, or rounded to nearest if the parameter is quantized. Adapters stay as
    they are: at the start, those of LoRA add nothing.
    Raises UserError if files, architecture, names or shapes do not fit; the model is then as it was. Only NaN, or a
    damaged file, may be found after some weights have been copied.
    """
    _load(base_parameters(model), Path(folder), config=model.config, open_weights=open_transformers)


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """As load_initial_weights, also from a checkpoint of ours: for evaluation, as it leaves the optimizer's state.

    8-bit weights go bit for bit into parameters of the same kind and group size; otherwise they are decoded.
    """
    if not is_checkpoint(folder):
        load_initial_weights(model, folder)
        return
    _load(dict(model.named_parameters()), Path(folder), config=model.config, open_weights=open_checkpoint)


def open_checkpoint(folder: Path) -> StoredWeights:
    """The weights of a checkpoint of ours. Raises UserError if it cannot be read."""
    path = folder / "model.safetensors"
    with open_tensors(path) as file:
        files, metadata = dict.fromkeys(file.keys(), path), file.metadata() or {}
    try:
        quantized = {
            name: _described(upgrade_quantized(entry))
            for name, entry in json.loads(metadata.get("quantized", "{}")).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: what it says of its 8-bit weights cannot be understood ({error!r}).") from error
    return StoredWeights(folder, files, quantized)


def _described(entry: dict[str, Any]) -> Quantized:
    """The description of a quantized weight in a checkpoint, parsed. Raises KeyError, TypeError or ValueError."""
    codec = build_codec({key: value for key, value in entry.items() if key != "dtype"})
    if not isinstance(codec, Affine):
        raise ValueError(f"{type(codec).__name__} is not for weights")
    return Quantized(codec, DTYPES[entry["dtype"]])


def open_transformers(folder: Path) -> StoredWeights:
    """The weights of a transformers folder, in one file or in shards. Raises UserError if it cannot be read."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        with open_tensors(whole) as file:
            files = dict.fromkeys(file.keys(), whole)
    elif index.is_file():
        files = _read_index(index)
    elif pickles := sorted(folder.glob("pytorch_model*.bin*")):
        raise UserError(
            f"{folder}: {pickles[0].name} is a pickle, which can run code, and is not read. Convert it where you trust "
            "it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors."
        )
    else:
        raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json there.")
    # Derived from rope_theta; transformers wrote it until version 4.31 and ignores it, too.
    files = {name: path for name, path in files.items() if not name.endswith("rotary_emb.inv_freq")}
    return StoredWeights(folder, files, quantized={})


def _load(
    parameters: Mapping[str, nn.Parameter],
    folder: Path,
    *,
    config: PreTrainedConfig,
    open_weights: Callable[[Path], StoredWeights],
) -> None:
    """Fills the parameters of a model of this config, by their names in the folder."""
    theirs = read_config(folder / "config.json")
    _check_config(config, theirs, folder=folder)
    weights = open_weights(folder)
    if theirs.tie_word_embeddings:
        weights = _untie(weights, family_of(theirs))
    weights.check({name: parameter.shape for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(rows_of(weights.read(name), shard_of(parameter)))


def _check_config(ours: PreTrainedConfig, theirs: PreTrainedConfig, *, folder: Path) -> None:
    """Raises UserError if the folder's model computes something else than ours would with its weights."""
    wanted, found = _architecture(ours), _architecture(theirs)
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{folder}: {name} is {found.get(name)} there, but {wanted.get(name)} in the model to be filled. "
                f"Build it from {folder / 'config.json'}."
            )


def _architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config that the meaning of the weights depends on."""
    fields = ("model_type", *family_of(config).shape)
    return {name: getattr(config, name, None) for name in fields} | dict(config.rope_parameters or {})


def _untie(weights: StoredWeights, family: Family) -> StoredWeights:
    """Leaves out the head, which is tied to the embedding. Raises UserError if it is another matrix."""
    files, head, embedding = dict(weights.files), family.head_weight, family.embedding_weight
    if {embedding, head} <= files.keys() and not torch.equal(weights.read(head), weights.read(embedding)):
        raise UserError(f"{weights.folder}: its config ties {head} to {embedding}, but the two differ.")
    files.pop(head, None)
    return StoredWeights(weights.folder, files, weights.quantized)


def _read_index(index: Path) -> dict[str, Path]:
    """The file of each tensor. Only files beside the index count: a name must not lead out of the folder."""
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{index}: cannot be read as an index of safetensors files ({error!r}).") from error
    for name, file in files.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file:
            raise UserError(f"{index}: {name} is said to be in {file!r}, which is not a safetensors file beside it.")
    return {name: index.parent / file for name, file in files.items()}


def _and_more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _read_tensor(path: Path, name: str) -> Tensor:
    with open_tensors(path) as file:
        return file.get_tensor(name)
