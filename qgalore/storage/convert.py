"""Which weights of a model live in 8 or 4 bits; and all of them back to floating point."""

import warnings
from collections import Counter
from collections.abc import Callable

from torch import nn

from qgalore.storage.module_state import save_as_parts
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.storage.rounding import mix_seed


def quantize_module_weight(
    module: nn.Module,
    name: str = "weight",
    *,
    bits: int = 8,
    group_size: int = 256,
    stochastic: bool = True,
    seed: int | None = None,
    simulation: bool = False,
    products: str | None = None,
) -> None:
    """Replaces one matrix of `module` by its quantized form, which frees the floating one.

    The other arguments are those of QuantizedWeight.from_float. Call it before an optimizer holds the parameter.
    """
    old = getattr(module, name)
    new = QuantizedWeight.from_float(
        old, bits=bits, group_size=group_size, stochastic=stochastic, seed=seed, simulation=simulation,
        products=products,
    )  # fmt: skip
    fits = new.codec.group_size
    if fits < min(16, old.shape[1]):
        warnings.warn(
            f"a row of {old.shape[1]} weights falls into groups of {fits} only, and their scales take "
            f"{5 / fits:.1f} bytes a weight: a group size of -1 makes each row one group",
            stacklevel=2,
        )
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    save_as_parts(module)


def quantize_linear_layers(
    model: nn.Module,
    *,
    select: Callable[[str], bool] = lambda name: True,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
    bits: int = 8,
    group_size: int = 256,
    stochastic: bool = True,
    seed: int | None = None,
    simulation: bool = False,
    products: str | None = None,
) -> list[str]:
    """Replaces the weights of linear layers by quantized ones, one after the other. Returns their parameters' names.

    select: whether a layer is one of them, by the module's name.
    kinds: classes of modules that count as linear layers; each has a matrix `weight`.
    The other arguments are those of QuantizedWeight.from_float.
    Raises ValueError for a weight that another module shares: only one of the two would be replaced.
    """
    names: list[str] = []
    shared = shared_parameters(model)
    for name, module in model.named_modules():
        if not isinstance(module, kinds) or not select(name):
            continue
        assert isinstance(module.weight, nn.Parameter)
        if id(module.weight) in shared:
            raise ValueError(f"the weight of {name} is shared with another module and cannot be quantized")
        own = None if seed is None else mix_seed(seed, len(names))
        quantize_module_weight(
            module, bits=bits, group_size=group_size, stochastic=stochastic, seed=own, simulation=simulation,
            products=products,
        )  # fmt: skip
        names.append(f"{name}.weight")
    return names


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that two modules of a model hold."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {owner for owner, count in owners.items() if count > 1}


def dequantize_linear_layers(model: nn.Module) -> list[str]:
    """Replaces every quantized weight by its values, in the dtype that it appears in. Returns the parameters' names.

    What others save of the model, `save_pretrained` for example, is then a model as any other. Call it when no
    optimizer holds the parameters any longer.
    """
    names = [name for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)]
    for name in names:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = getattr(module, own)
        setattr(module, own, nn.Parameter(weight.detach().dequantize(), requires_grad=weight.requires_grad))
    return names
