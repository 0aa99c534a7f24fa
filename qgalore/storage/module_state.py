"""How a module with quantized weights appears in a state dict: each weight as the plain tensors that hold it.

    mlp.up_proj.weight.codes   mlp.up_proj.weight.scale   mlp.up_proj.weight.zero

So whatever saves plain tensors saves such a module, as small as it is and without loss: torch.save, safetensors,
torch.distributed.checkpoint, accelerate, a Trainer. To load it, quantize a model in the same way first. A floating
`mlp.up_proj.weight` is understood as well, and rounded to nearest.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from qgalore.sharding import as_dtensor, local, shard_of
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.storage.stored import Stored, part_key


def save_as_parts(module: nn.Module) -> None:
    """Makes the module's state dicts hold the parts of its quantized weights. Once is enough."""
    if _split not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_split)
        module.register_load_state_dict_pre_hook(_join)


def _weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, QuantizedWeight, dict[str, str]]]:
    """The key, the parameter, the weight that it is or whose rows it holds, and the key of each part, of every
    quantized weight of the module itself."""
    for name, p in module.named_parameters(recurse=False):
        weight = local(p.detach())
        if isinstance(weight, QuantizedWeight):
            yield prefix + name, p, weight, {part: part_key(prefix + name, part) for part in weight.codec.PARTS}


def _split(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for key, p, weight, keys in _weights(module, prefix):
        state_dict.pop(key, None)
        sharded = shard_of(p) is not None
        for part, tensor in weight.stored().parts.items():
            state_dict[keys[part]] = held = as_dtensor(tensor, like=p) if sharded else tensor
            if sharded:
                setattr(p, part, held)  # torch.distributed.checkpoint follows each key from attribute to attribute


def _join(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    for key, p, weight, keys in _weights(module, prefix):
        if any(part not in state_dict for part in keys.values()):
            continue
        parts = {part: local(state_dict.pop(name)) for part, name in keys.items()}
        if problem := _misfit(weight, parts):
            error_msgs.append(f"{key}: {problem}")
        stored = Stored(weight.codec, weight.stored().parts if problem else parts, weight.shape)
        whole = QuantizedWeight(stored, dtype=weight.dtype, products=weight.products)
        state_dict[key] = whole if shard_of(p) is None else as_dtensor(whole, like=p)


def _misfit(weight: QuantizedWeight, parts: dict[str, Tensor]) -> str | None:
    for part, (shape, dtype) in weight.codec.spec(weight.shape).items():
        found = parts[part]
        if (found.shape, found.dtype) != (shape, dtype):
            return (
                f"{part} saved as {found.dtype} {tuple(found.shape)}, but {weight.codec.bits} bits in groups of "
                f"{weight.codec.group_size} need {dtype} {tuple(shape)}. Quantize the model as the saved one was"
            )
    return None
