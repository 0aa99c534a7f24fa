"""Weights that live in 8 bits and look like any other parameter.

An Int8Weight appears as an (out, in) tensor of the model's dtype and holds one byte an element, with a scale and a zero
point for each group of a row (quantize.py). There is no copy of higher precision: what an update cannot write, it
writes with a probability (stochastic rounding), so that the expected weight is the exact one.
Source: Zhang et al. 2024, Q-GaLore, arXiv 2407.08296, section 3.

The three products of a linear layer, none of which keeps anything of the weight's size in floating point:

    y  = x W^T        forward, W dequantized for this one product
    dx = dy W         backward, W dequantized once more
    dW = dy^T x       an ordinary tensor of the weight's dtype: hooks, clipping and accumulation see nothing unusual

Writing is `store_` with a seed, which quantize.store_weight calls, or `copy_`, which rounds to nearest. Arithmetic in
place has no seed to round with, would lose small updates for ever, and is refused. All other operations see the
dequantized values.
"""

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from qgalore.storage import affine as quantize
from qgalore.storage.affine import Seed, check_finite, dequantize_groups, group_size_for, quantize_groups

aten = torch.ops.aten

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_NO_DATA = "the .data of 8-bit weights cannot be replaced. Convert models by model.to(dtype), not by model.float()."
_NO_SEED = (
    "{} would write into 8-bit weights without a seed to round with, and lose small updates. Compute the new values in "
    "float32 and store them with qgalore.quantize.store_weight(weight, values, seed=...)."
)


class Int8Weight(Tensor):
    """A matrix in groups of 8-bit codes that behaves as a tensor of `dtype`. Build it with `from_float`.

    parts: codes (m, n/g, g) uint8, scale (m, n/g) float32, zero (m, n/g) uint8; `PARTS` names them.
    group_size: g.  dtype: what it appears as.  stochastic: how `store_` rounds.
    """

    PARTS: tuple[str, ...] = ("codes", "scale", "zero")
    group_size: int
    stochastic: bool

    @staticmethod
    def __new__(cls, *parts: Tensor, group_size: int, dtype: torch.dtype, stochastic: bool) -> "Int8Weight":
        shape = (parts[0].shape[0], parts[0].shape[1:].numel())
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device)
        for name, part in zip(cls.PARTS, parts, strict=True):
            setattr(weight, name, part)
        weight.group_size, weight.stochastic = group_size, stochastic
        return weight

    @classmethod
    def from_float(
        cls,
        values: Tensor,
        *,
        group_size: int = 256,
        dtype: torch.dtype | None = None,
        stochastic: bool = True,
        seed: int | None = None,
    ) -> "Int8Weight":
        """Quantizes a matrix.

        values: (m, n), any floating dtype.  group_size: the groups' largest size, see quantize.group_size_for.
        dtype: what the weight appears as, by default that of the values.  stochastic: how later writes round.
        seed: 64 bits to round stochastically now; None, to nearest, is more accurate, as nothing adds up yet.
        Raises ValueError for anything but a floating matrix, and for values that are not finite.
        """
        if values.ndim != 2 or not values.is_floating_point():
            raise ValueError(f"only a floating-point matrix can be quantized, not {values.dtype} {tuple(values.shape)}")
        group_size = group_size_for(values.shape[1], at_most=group_size)
        parts, scale = cls._encode(values.detach(), group_size=group_size, seed=seed)
        if not values.is_meta:
            check_finite(scale, name=cls.__name__)
        return cls(*parts, group_size=group_size, dtype=dtype or values.dtype, stochastic=stochastic)

    @classmethod
    def _encode(cls, values: Tensor, *, group_size: int, seed: Seed | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """The parts that hold `values`, and the groups' scales."""
        parts = quantize_groups(values, group_size=group_size, seed=seed)
        return parts, parts[1]

    @classmethod
    def _decode_parts(cls, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor with the values that the parts hold. (m, n) `dtype`"""
        codes, scale, zero = parts
        return dequantize_groups(codes, scale, zero, dtype=dtype)

    def _decode(self, dtype: torch.dtype) -> Tensor:
        return self._decode_parts(tuple(self.parts().values()), dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The values as an ordinary tensor: the weight's dtype or the one asked for, rounded once. Differentiable."""
        return _Dequantize.apply(self, dtype or self.dtype)

    def float(self) -> Tensor:  # type: ignore[override]
        """The values as an ordinary float32 tensor, while .to(torch.float32) is an 8-bit weight that appears as one."""
        return self.dequantize(torch.float32)

    @torch.no_grad()
    def store_(self, values: Tensor, *, seed: Seed) -> "Int8Weight":
        """Requantizes in place, with new scales and zero points: stochastically with `seed`, if this weight does that.

        values: (m, n), float32 for the sake of small updates.  seed: 64 bits, from mix_seed.
        Never waits for the device: NaN or infinity make their groups NaN or infinite rather than wrong, and
        `check_finite` finds them.
        """
        if values.shape != self.shape:
            raise ValueError(f"a weight of shape {tuple(self.shape)} cannot store {tuple(values.shape)}")
        self.unwrapped().store_(values, seed=seed)
        torch.autograd.graph.increment_version(self)  # a backward that still needs the old values shall say so
        return self

    def check_finite(self, *, name: str = "the weight") -> None:
        """Raises ValueError where the weight holds NaN or infinity. Waits for the device."""
        check_finite(self.parts()["scale"], name=name)

    def unwrapped(self) -> "UnwrappedWeight":
        """Its parts and settings, without the tensor that they appear as. After a write there, increment its version:
        a backward that still needs the old values shall say so."""
        parts = tuple(self.parts().values())
        return UnwrappedWeight(type(self), parts, self.shape, self.dtype, self.group_size, self.stochastic)

    def parts(self) -> dict[str, Tensor]:
        """The plain tensors that hold the weight, by name."""
        return {name: getattr(self, name) for name in self.PARTS}

    def stored_bytes(self) -> dict[str, int]:
        """The bytes of each part; they sum to about 1.02 a weight in groups of 256."""
        return {name: part.numel() * part.element_size() for name, part in self.parts().items()}

    def _like(self, parts: Iterable[Tensor], *, dtype: torch.dtype | None = None) -> "Int8Weight":
        """Another weight with these parts and the settings of this one."""
        return type(self)(*parts, group_size=self.group_size, dtype=dtype or self.dtype, stochastic=self.stochastic)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape, grad = tuple(self.shape), ", requires_grad=True" if self.requires_grad else ""
        rounding = "stochastic" if self.stochastic else "nearest"
        return f"{type(self).__name__}({shape}, {self.dtype}, groups of {self.group_size}, {rounding}{grad})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype, bool]]:
        return list(self.PARTS), (self.group_size, self.dtype, self.stochastic)

    @classmethod
    def __tensor_unflatten__(
        cls, parts: Mapping[str, Tensor], settings: tuple[int, torch.dtype, bool], size: Any, stride: Any
    ) -> "Int8Weight":
        group_size, dtype, stochastic = settings
        tensors = (parts[name] for name in cls.PARTS)
        return cls(*tensors, group_size=group_size, dtype=dtype, stochastic=stochastic)

    def _stable_hash_for_caching(self) -> str:
        """For torch.compile's cache on disk. The code counts: compiled kernels hold it, but the cache cannot see it."""
        parts = [(name, tuple(part.shape), part.dtype, part.stride()) for name, part in self.parts().items()]
        settings = self.__tensor_flatten__()[1]
        key = (type(self).__qualname__, tuple(self.shape), self.device, self.requires_grad, settings, parts, _code())
        return hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func == _SET_DATA:
            raise ValueError(_NO_DATA)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _HANDLERS.get(func, _on_values)(func, *args, **(kwargs or {}))


class SimulatedInt8Weight(Int8Weight):
    """An Int8Weight that holds, as float32, the values that its codes would decode to: the same numbers to the last
    bit, in four times the memory. parts: values (m, n) float32."""

    PARTS = ("values",)

    @classmethod
    def _encode(cls, values: Tensor, *, group_size: int, seed: Seed | None) -> tuple[tuple[Tensor, ...], Tensor]:
        parts, scale = super()._encode(values, group_size=group_size, seed=seed)
        return (dequantize_groups(*parts),), scale

    @classmethod
    def _decode_parts(cls, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype, copy=True)

    def check_finite(self, *, name: str = "the weight") -> None:
        check_finite(self.parts()["values"].unflatten(1, (-1, self.group_size)).abs().amax(-1), name=name)


@dataclass(frozen=True)
class UnwrappedWeight:
    """An Int8Weight as plain tensors. Compiled code reads and writes these; wrapper and parts as two inputs of the same
    memory would confuse it. kind: how parts and values are made of each other; the others as in Int8Weight."""

    kind: type[Int8Weight]
    parts: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype
    group_size: int
    stochastic: bool

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values. (m, n) `dtype`"""
        return self.kind._decode_parts(self.parts, dtype)

    def store_(self, values: Tensor, *, seed: Seed) -> None:
        """As Int8Weight.store_."""
        new, _ = self.kind._encode(values, group_size=self.group_size, seed=seed if self.stochastic else None)
        _overwrite(self.parts, new)


@functools.cache
def _code() -> str:
    """What the compiled kernels are made of."""
    return "".join(inspect.getsource(module) for module in (quantize, sys.modules[__name__]))


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight._decode(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype), None


class _Linear(torch.autograd.Function):
    """The three products at the top of this file. Saves x and the weight as it is, in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x, weight._decode(weight.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_dx, needs_dW, needs_db = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])  # (tokens, out)
        dx = dy @ weight._decode(dy.dtype) if needs_dx else None
        dW = rows.mT @ x.reshape(-1, x.shape[-1]).to(dy.dtype) if needs_dW else None
        return dx, dW, rows.sum(0) if needs_db else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Int8Weight):
        return _Linear.apply(input, weight, bias)
    with torch._C.DisableTorchFunctionSubclass():
        return F.linear(input, weight, bias)


def _overwrite(parts: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for part, value in zip(parts, values, strict=True):
        part.copy_(value)


def _share(func: Any, weight: Int8Weight) -> Int8Weight:
    return weight._like(func(part) for part in weight.parts().values())


def _clone(func: Any, weight: Int8Weight, **kwargs: Any) -> Int8Weight:
    return weight._like(part.clone() for part in weight.parts().values())


def _to(func: Any, weight: Int8Weight, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Int8Weight:
    """Another device moves the parts; another dtype changes what the weight appears as, and nothing else."""
    options = {name: kwargs[name] for name in ("device", "non_blocking") if name in kwargs}
    parts = (part.to(**options, copy=True) for part in weight.parts().values())
    return weight._like(parts, dtype=dtype)


def _copy_(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Codes go to codes as they are; other values are rounded to nearest, for there is no seed."""
    if not isinstance(target, Int8Weight):
        return target.copy_(source._decode(torch.float32), non_blocking)  # type: ignore[attr-defined]
    if type(source) is type(target) and source.group_size == target.group_size and source.shape == target.shape:
        _overwrite(target.parts().values(), source.parts().values())
        return target
    values = source._decode(torch.float32) if isinstance(source, Int8Weight) else source.to(target.device)
    parts, scale = target._encode(values.expand(target.shape), group_size=target.group_size, seed=None)
    if not scale.is_meta:
        check_finite(scale, name="copy_")
    _overwrite(target.parts().values(), parts)
    return target


def _new(func: Any, weight: Int8Weight, *args: Any, **kwargs: Any) -> Tensor:
    """zeros_like and its kind give ordinary tensors: an optimizer's moments are not weights."""
    shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return func(shape, *args, **kwargs | {"device": kwargs.get("device") or weight.device})


def _on_values(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other operation: on the dequantized values, if it only reads the weight."""
    declared = func._schema.arguments
    given = dict(zip((argument.name for argument in declared), args, strict=False)) | kwargs
    written = [given.get(a.name) for a in declared if a.alias_info is not None and a.alias_info.is_write]
    if any(isinstance(tensor, Int8Weight) for tensor in tree_leaves(written)):
        raise ValueError(_NO_SEED.format(func))
    args, kwargs = tree_map_only(Int8Weight, lambda weight: weight._decode(weight.dtype), (args, kwargs))
    return func(*args, **kwargs)


_NEW = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros")
_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _share,
    aten.alias.default: _share,
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.copy_.default: _copy_,
    **{getattr(aten, name).default: _new for name in _NEW},
}
