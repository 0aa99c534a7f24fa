"""Which weights of a model live in 8 bits."""

import warnings
from collections.abc import Callable

from torch import nn

from qgalore.storage.affine import mix_seed
from qgalore.storage.int8_weight import Int8Weight, SimulatedInt8Weight


def quantize_module_weight(
    module: nn.Module,
    name: str = "weight",
    *,
    group_size: int = 256,
    stochastic: bool = True,
    seed: int | None = None,
    simulation: bool = False,
) -> None:
    """Replaces one matrix of `module` by its 8-bit form (its simulation, if so), which frees the floating one.

    The other arguments are those of Int8Weight.from_float. Call it before an optimizer holds the parameter.
    """
    old = getattr(module, name)
    kind = SimulatedInt8Weight if simulation else Int8Weight
    new = kind.from_float(old, group_size=group_size, stochastic=stochastic, seed=seed)
    if new.group_size < min(16, old.shape[1]):
        warnings.warn(
            f"a row of {old.shape[1]} weights falls into groups of {new.group_size} only, and their scales take "
            f"{5 / new.group_size:.1f} bytes a weight: --weight_group_size -1 makes each row one group",
            stacklevel=2,
        )
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def quantize_linear_layers(
    model: nn.Module,
    *,
    select: Callable[[str], bool] = lambda name: True,
    group_size: int = 256,
    stochastic: bool = True,
    seed: int | None = None,
    simulation: bool = False,
) -> list[str]:
    """Replaces the weights of linear layers by 8-bit ones, one after the other. Returns the names of their parameters.

    select: which, by the module's name.  The other arguments are those of Int8Weight.from_float.
    Raises ValueError for a weight that another module shares: only one of the two would be replaced.
    """
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    names: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not select(name):
            continue
        if owners.count(id(module.weight)) > 1:
            raise ValueError(f"the weight of {name} is shared with another module and cannot be quantized")
        own = None if seed is None else mix_seed(seed, len(names))
        quantize_module_weight(module, group_size=group_size, stochastic=stochastic, seed=own, simulation=simulation)
        names.append(f"{name}.weight")
    return names
