"""Everything that training continues from, copied out of a live model and optimizer and put back bit for bit.

    model.safetensors       each parameter by name; INT8 weights as the parts that hold them, `NAME.codes` and so on
    optimizer.safetensors   tensors of the optimizer's state, `NAME:KEY`
    state.json              the caller's own values; numbers and lists of the optimizer's state, under "optimizer"
    rng.safetensors         torch's generators
    tokenizer/              the tokenizer's files

Nothing is converted: what has 8 bits in memory has 8 bits in the file. JSON writes floats with as many digits as it
takes to read the same float64 again, and NaN and infinities as NaN, Infinity and -Infinity, as Python's json does.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_pretraining.checkpoint.atomic_write import Content, Snapshot
from peft_pretraining.checkpoint.files import CONFIG, FORMAT, MODEL, OPTIMIZER, RNG, STATE, TOKENIZER, Checkpoint
from peft_pretraining.checkpoint.old_format import upgrade_quantized, upgrade_state
from peft_pretraining.checkpoint.shared_file import SharedFile, rows_of, rows_to_write
from peft_pretraining.checkpoint.tensor_file import TensorFile
from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from qgalore.loaded_state import misfit
from qgalore.master_weights import MasterWeights
from qgalore.optimizer import LowRankOptimizer
from qgalore.sharding import as_dtensor, local, shard_of
from qgalore.storage.quantized_weight import QuantizedWeight, open_weight
from qgalore.storage.stored import describe_codec, part_key
from qgalore.subspace.projector import is_spread

RESERVED = ("format", "optimizer")  # keys of state.json that are not the caller's


def take_snapshot(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    *,
    update: int,
    progress: Mapping[str, Any],
    tokenizer: Mapping[str, bytes] | None = None,
    copied: bool = True,
    world: World | None = None,
) -> Snapshot:
    """A snapshot of model, optimizer and generators.

    progress: other values to remember, as JSON.
    tokenizer: the files of the tokenizer, by name.
    copied: whether tensors are copied to host memory, so that training may go on. The copy takes as many bytes as model
        and optimizer keep. Otherwise the snapshot holds the tensors of the run, and must be written before they change.
    world: the processes that the parameters are spread over, which all call this; None if this one has all of them.
    Raises ValueError or TypeError if `progress` uses a key of RESERVED or is not JSON.
    """
    if taken := progress.keys() & set(RESERVED):
        raise ValueError(f"progress must not have the keys {', '.join(sorted(taken))}")
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    tensors, scalars = _split_states({names[p]: state for p, state in optimizer.state.items()})
    weights = {key: tensor for p, name in names.items() for key, tensor in _pieces(name, p).items()}
    quantized = {name: _settings(weight) for p, name in names.items() if (weight := _quantized(p)) is not None}
    held = {MODEL: weights, OPTIMIZER: tensors, RNG: _rng_states()}
    held = _to_host(held) if copied else held
    spread = _spread(names, optimizer) if world is not None else set()
    ranks = next((shard.group.size() for shard in map(shard_of, names) if shard is not None), 1)

    def pack(file: str, metadata: dict[str, str]) -> TensorFile | SharedFile:
        if world is None:
            return TensorFile(held[file], metadata)
        own = spread & held[file].keys()
        return SharedFile(rows_to_write(held[file], spread=own, world=world, ranks=ranks), metadata)

    files: dict[str, Content] = {
        **{f"{TOKENIZER}/{name}": content for name, content in (tokenizer or {}).items()},
        CONFIG: model.config.to_json_string(),
        MODEL: pack(MODEL, {"format": "pt", "quantized": json.dumps(quantized)}),
        OPTIMIZER: pack(OPTIMIZER, {"optimizer": _title(optimizer)}),
        RNG: TensorFile(held[RNG]),
        STATE: json.dumps({**progress, "format": FORMAT, "optimizer": scalars}),
    }
    return Snapshot(update, files)


def _spread(names: Mapping[Tensor, str], optimizer: torch.optim.Optimizer) -> set[str]:
    """The keys, in the files, of the tensors of which each rank has other rows."""
    shards = {p: name for p, name in names.items() if shard_of(p) is not None}
    weights = {key for p, name in shards.items() for key in _pieces(name, p)}
    states = {
        f"{shards[p]}:{key}"
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if p in shards and is_spread(key, value)
    }
    return weights | states


def _quantized(p: Tensor) -> QuantizedWeight | None:
    """The quantized weight that a parameter is, or that holds its rows."""
    held = local(p.detach())
    return held if isinstance(held, QuantizedWeight) else None


def _split_states(states: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors as `NAME:KEY`, and everything else as {NAME: {KEY: value}}."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, state in states.items():
        tensors |= {f"{name}:{key}": local(value) for key, value in state.items() if torch.is_tensor(value)}
        scalars[name] = {key: value for key, value in state.items() if not torch.is_tensor(value)}
    return tensors, scalars


def _title(optimizer: torch.optim.Optimizer) -> str:
    """A title that optimizers share if they can go on from each other's states."""
    inner = f" of {optimizer.kind.__name__}" if isinstance(optimizer, MasterWeights) else ""
    return type(optimizer).__name__ + inner


def _pieces(name: str, p: Tensor) -> dict[str, Tensor]:
    """The plain tensors that hold a parameter, by their names in the file. Writing to them writes the parameter."""
    return {part_key(name, part): tensor for part, tensor in open_weight(p).tensors().items()}


def _settings(p: QuantizedWeight) -> dict[str, Any]:
    """The settings that build a quantized weight from its parts."""
    return {**describe_codec(p.codec), "dtype": str(p.dtype).removeprefix("torch.")}


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _to_host(files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Contiguous copies in host memory. Waits for the device once."""
    copies = {file: {key: _host_copy(tensor) for key, tensor in tensors.items()} for file, tensors in files.items()}
    for device in {tensor.device for tensors in files.values() for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return copies


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory. From a GPU, it is not complete before the device is synchronized."""
    if not tensor.is_cuda:
        return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    try:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # the system limits how much may be pinned
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
    return host.copy_(tensor.detach(), non_blocking=True)


@torch.no_grad()
def restore_model(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Fills the parameters of a model with those of a checkpoint, in place and one by one.

    Raises UserError if names, shapes, dtypes or the settings of INT8 weights differ, or if the file is damaged.
    """
    parameters = dict(model.named_parameters())
    targets = {key: (tensor, p) for name, p in parameters.items() for key, tensor in _pieces(name, p).items()}
    with checkpoint.tensors(MODEL) as file:
        saved = json.loads((file.metadata() or {}).get("quantized", "{}"))
        for name, p in parameters.items():
            weight = _quantized(p)
            here = None if weight is None else _settings(weight)
            entry = saved.get(name)
            _compare(checkpoint, name, saved=entry and upgrade_quantized(entry), here=here)
        _compare(checkpoint, "the parameters", saved=sorted(file.keys()), here=sorted(targets))
        for key, (target, p) in targets.items():
            tensor = rows_of(file.get_tensor(key), shard_of(p))
            _compare(checkpoint, key, saved=_kind(tensor), here=_kind(target))
            target.copy_(tensor)
    for p in parameters.values():
        torch.autograd.graph.increment_version(p)  # what was written may be the inside of a QuantizedWeight


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _compare(checkpoint: Checkpoint, what: str, *, saved: Any, here: Any) -> None:
    """Raises UserError if a checkpoint and what is to be restored are not of the same kind."""
    if saved == here:
        return
    if isinstance(saved, list):
        saved, here = ([n for n in a if n not in b][:3] or "no others" for a, b in ((saved, here), (here, saved)))
    raise _does_not_fit(checkpoint, f"{what} saved as {saved or 'unquantized'}, here {here or 'unquantized'}")


def _does_not_fit(checkpoint: Checkpoint, told: str) -> UserError:
    return UserError(
        f"{checkpoint.folder} does not fit: {told}. Resume with the flags that the checkpoint was made with."
    )


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, *, names: Mapping[Tensor, str]) -> None:
    """Gives an optimizer the state of a checkpoint.

    names: the name of each of its parameters.
    The optimizer must be built as the saved one was. Learning rates and other settings are not saved, and stay.
    Raises UserError if it is another optimizer or another model's, or if a file is damaged.
    """
    scalars = checkpoint.state.get("optimizer", {})
    parameters = {name: p for p, name in names.items()}
    with checkpoint.tensors(OPTIMIZER) as file:
        saved = (file.metadata() or {}).get("optimizer")
        _compare(checkpoint, "the optimizer", saved=saved, here=_title(optimizer))
        unknown = (scalars.keys() | {key.partition(":")[0] for key in file.keys()}) - parameters.keys()
        _compare(checkpoint, "state of other parameters", saved=sorted(unknown), here=[])
        states = _read_states(file, scalars, parameters, own=isinstance(optimizer, LowRankOptimizer))
        optimizer.state.update(states)
    if isinstance(optimizer, LowRankOptimizer):
        for p, update in optimizer.updates.items():
            if told := misfit(update):
                raise _does_not_fit(checkpoint, f"its state of {names[p]} has {told}")


def _read_states(
    file: Any, scalars: dict[str, dict[str, Any]], parameters: dict[str, Tensor], *, own: bool
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each parameter with its state, read when it is asked for.

    own: whether the optimizer is ours, whose states hold the rows of a sharded parameter; torch's hold DTensors.
    """
    keys: dict[str, list[str]] = defaultdict(list)
    for key in file.keys():
        keys[key.partition(":")[0]].append(key)
    for name, values in scalars.items():
        p, state = parameters[name], copy.deepcopy(values)  # the checkpoint may be read once more
        for key in keys[name]:
            kind = key.partition(":")[2]
            device = torch.device("cpu") if kind == "step" else p.device  # torch's optimizers count on the CPU
            tensor, shard = file.get_tensor(key), shard_of(p)
            by_rows = shard is not None and is_spread(kind, tensor)
            value = (rows_of(tensor, shard) if by_rows else tensor).to(device, copy=True)
            state[kind] = as_dtensor(value, like=p) if by_rows and not own else value
        yield p, upgrade_state(state)


def restore_rng(checkpoint: Checkpoint) -> None:
    """Sets torch's generators to where they were. Raises UserError if the file is damaged."""
    with checkpoint.tensors(RNG) as file:
        torch.set_rng_state(file.get_tensor("cpu").clone())
        if "cuda" in file.keys() and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("cuda").clone())
