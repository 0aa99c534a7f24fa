"""QLoRA's own 4-bit form of frozen weights, NF4 with quantized scales, by the package bitsandbytes.

Source: Dettmers et al. 2023, arXiv 2305.14314, section 3. A checkpoint keeps the codes; the scales come again from the
model that the run begins with.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

NF4: dict[str, Any] = dict(quant_type="nf4", compress_statistics=True)


def to_nf4(model: Any, *, select: Callable[[str], bool]) -> None:
    """Replaces frozen linear layers of a model with peft's adapters, which is on its device, by 4-bit ones.

    select: whether a layer is one of them, by its name in the model without adapters.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    inside = model.get_base_model()
    for name, old in list(inside.named_modules()):
        if type(old) is not nn.Linear or not select(name.removesuffix(".base_layer")):
            continue
        weight, has_bias = old.weight.detach(), old.bias is not None
        new = Linear4bit(old.in_features, old.out_features, bias=has_bias, compute_dtype=weight.dtype, **NF4)
        new.weight = Params4bit(weight.cpu(), requires_grad=False, **NF4)
        new.bias = old.bias
        # Or an evaluation on a CPU would store the codes in another order, which suits only some shapes.
        new.support_avx512bf16_for_cpu = False
        inside.set_submodule(name, new.to(weight.device))  # which quantizes


def from_nf4(model: nn.Module) -> None:
    """Replaces 4-bit layers by ordinary ones with their values."""
    for name, old in list(model.named_modules()):
        if type(old).__name__ != "Linear4bit":
            continue
        from bitsandbytes.functional import dequantize_4bit

        weight: Any = old.weight
        values = dequantize_4bit(weight.data, weight.quant_state).to(old.compute_dtype)
        new = nn.Linear(values.shape[1], values.shape[0], bias=old.bias is not None, device="meta")
        new.weight, new.bias = nn.Parameter(values, requires_grad=False), old.bias
        model.set_submodule(name, new)
