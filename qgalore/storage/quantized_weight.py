"""Weights that live in 8 or 4 bits and look like any other parameter.

A QuantizedWeight appears as an (out, in) tensor of the model's dtype and holds a byte or half a byte an element, with a
scale and a zero point for each group of a row (affine.py). There is no copy of higher precision: what an update cannot
write, it writes with a probability (stochastic rounding), so that the expected weight is the exact one.
Source: Zhang et al. 2024, Q-GaLore, arXiv 2407.08296, section 3.

The three products of a linear layer, none of which keeps anything of the weight's size in floating point:

    y  = x W^T        forward, W dequantized for this one product
    dx = dy W         backward, W dequantized once more
    dW = dy^T x       an ordinary tensor of the weight's dtype: hooks, clipping and accumulation see nothing unusual

Or, if the weight asks for it, as products of INT8 codes, without dequantizing (int8_products.py). Of an embedding, only
the rows that are looked up are dequantized. What autograd sees of all that is in quantized_ops.py.

Writing is `write` with a seed, or `copy_`, which rounds to nearest. Arithmetic in place has no seed to round with. On a
weight that is trained it would lose small updates for ever, and is refused; on a frozen one, as when an adapter is
merged into it, it rounds to nearest. All other operations see the dequantized values.
"""

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from qgalore import factored
from qgalore.sharding import local, shard_of
from qgalore.storage import affine, int8_products, quantized_ops, rounding, stored, weight_views
from qgalore.storage.affine import Affine, Simulated, check_finite
from qgalore.storage.quantized_ops import Dequantize, Embed, Linear
from qgalore.storage.rounding import Seed
from qgalore.storage.stored import Stored
from qgalore.storage.weight_writes import NO_SEED, set_data, set_item

aten = torch.ops.aten

_Settings = tuple[Affine, torch.dtype, str | None, bool]  # codec, dtype, products, takes_product

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class QuantizedWeight(Tensor):
    """A matrix in groups of 8-bit or 4-bit codes that behaves as a tensor of `dtype`. Build it with `from_float`.

    stored: the codes with their codec, Affine or Simulated.
    dtype: what it appears as.
    products: which products of a linear layer are INT8 products, of int8_products.PRODUCTS; None for none.
    """

    codec: Affine
    products: str | None
    trained = False  # of an alias: whether the weight behind it is trained
    takes_product = False  # whether its gradient may be a factored.FactoredGradient

    @staticmethod
    def __new__(cls, stored: Stored, *, dtype: torch.dtype, products: str | None = None) -> "QuantizedWeight":
        weight = Tensor._make_wrapper_subclass(cls, stored.shape, dtype=dtype, device=stored.device)
        for name, part in stored.parts.items():
            setattr(weight, name, part)
        assert isinstance(stored.codec, Affine)
        weight.codec, weight.products = stored.codec, products
        return weight

    @classmethod
    def from_float(
        cls,
        values: Tensor,
        *,
        bits: int = 8,
        group_size: int = 256,
        dtype: torch.dtype | None = None,
        stochastic: bool = True,
        seed: int | None = None,
        simulation: bool = False,
        products: str | None = None,
    ) -> "QuantizedWeight":
        """Quantizes a matrix.

        values: (m, n), any floating dtype.
        bits: 8 or 4.
        group_size: the groups' largest size, see affine.group_size_for.
        dtype: what the weight appears as; by default that of the values.
        stochastic: whether later writes round stochastically.
        seed: 64 bits to round stochastically now; None, to nearest, is more accurate, as nothing adds up yet.
        simulation: whether to hold, as float32, the values that the codes would decode to: the same numbers to the last
            bit, in four times the memory of 8 bits.
        products: `forward` for INT8 products in the forward pass, `all` for those of the backward pass as well. They
            need 8 bits, one group a row and no simulation.
        Raises ValueError for anything but a floating matrix, for values that are not finite, and for `products` that
        cannot be had.
        """
        if values.ndim != 2 or not values.is_floating_point():
            raise ValueError(f"only a floating-point matrix can be quantized, not {values.dtype} {tuple(values.shape)}")
        kind = Simulated if simulation else Affine
        if products is not None:
            _check_products(products, bits=bits, whole_rows=group_size in (-1, values.shape[1]), simulation=simulation)
        codec = kind.fitting(values.shape[1], bits=bits, at_most=group_size)
        parts = codec.encode(values.detach(), seed=seed)
        if not values.is_meta:
            check_finite(codec.magnitudes(parts), name=cls.__name__)
        codec = kind(codec.bits, codec.group_size, stochastic)
        return cls(Stored(codec, parts, values.shape), dtype=dtype or values.dtype, products=products)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedWeight":
        """A copy whose gradient nobody uses up inside backward: hooks are not copied."""
        copied = super().__deepcopy__(memo)
        copied.takes_product = False
        return copied

    def stored(self) -> Stored:
        """Its plain tensors with their codec. After a write there, increment the version of this tensor: a backward
        that still needs the old values must notice."""
        return Stored(self.codec, {name: getattr(self, name) for name in self.codec.PARTS}, self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The values as an ordinary tensor: the weight's dtype or the one asked for, rounded once. Differentiable."""
        return Dequantize.apply(self, dtype or self.dtype)

    def float(self) -> Tensor:  # type: ignore[override]
        """The values as an ordinary float32 tensor; .to(torch.float32) is a quantized weight that appears as one."""
        return self.dequantize(torch.float32)

    @torch.no_grad()
    def write(self, values: Tensor, *, seed: Seed) -> "QuantizedWeight":
        """Requantizes in place, with new scales and zero points: stochastically with `seed`, if this weight does that.

        values: (m, n), float32 for the sake of small updates.
        seed: 64 bits, from mix_seed.
        Never waits for the device: NaN or infinity make their groups NaN or infinite rather than wrong, and
        `check_finite` finds them.
        """
        if values.shape != self.shape:
            raise ValueError(f"a weight of shape {tuple(self.shape)} cannot store {tuple(values.shape)}")
        self.stored().write(values, seed=seed)
        torch.autograd.graph.increment_version(self)
        return self

    def check_finite(self, *, name: str = "the weight") -> None:
        """Raises ValueError if the weight holds NaN or infinity. Waits for the device."""
        check_finite(self.codec.magnitudes(self.stored().parts), name=name)

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """What FSDP2 gathers of the rows of each rank: codes, scales and zero points, not values."""
        return tuple(self.stored().parts.values()), None

    def fsdp_post_all_gather(
        self, parts: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple["QuantizedWeight", tuple[Tensor, ...]] | None:
        """The whole weight, whose parts are in the memory that FSDP2 has gathered them in and will free.

        out: the weight that was returned the first time; its memory has been filled again.
        """
        if out is not None:
            return None
        named = dict(zip(self.codec.PARTS, parts, strict=True))
        return self._like(named, shape=self.codec.shape_of(named)), parts

    def _decode(self, dtype: torch.dtype) -> Tensor:
        parts = self.stored().parts
        return Stored(self.codec, parts, self.codec.shape_of(parts)).read(dtype).view(self.shape)

    def _like(
        self, parts: dict[str, Tensor], *, dtype: torch.dtype | None = None, shape: torch.Size | None = None
    ) -> "QuantizedWeight":
        """Another weight with these parts and the settings of this one."""
        stored = Stored(self.codec, parts, self.shape if shape is None else shape)
        return type(self)(stored, dtype=dtype or self.dtype, products=self.products)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape, grad, codec = tuple(self.shape), ", requires_grad=True" if self.requires_grad else "", self.codec
        rounding = "stochastic" if codec.stochastic else "nearest"
        kind = "simulated " if isinstance(codec, Simulated) else ""
        settings = f"{kind}{codec.bits} bits, groups of {codec.group_size}, {rounding}"
        return f"{type(self).__name__}({shape}, {self.dtype}, {settings}{grad})"

    def __tensor_flatten__(self) -> tuple[list[str], _Settings]:
        return list(self.codec.PARTS), (self.codec, self.dtype, self.products, self.takes_product)

    @classmethod
    def __tensor_unflatten__(
        cls, parts: Mapping[str, Tensor], settings: _Settings, size: Any, stride: Any
    ) -> "QuantizedWeight":
        codec, dtype, products, takes_product = settings
        weight = cls(Stored(codec, dict(parts), codec.shape_of(parts)), dtype=dtype, products=products)
        weight.takes_product = takes_product
        return weight

    def _stable_hash_for_caching(self) -> str:
        """For torch.compile's cache on disk. The code counts: compiled kernels hold it, but the cache cannot see it."""
        parts = [(name, tuple(p.shape), p.dtype, p.stride()) for name, p in self.stored().parts.items()]
        settings = self.__tensor_flatten__()[1]
        key = (type(self).__qualname__, tuple(self.shape), self.device, self.requires_grad, settings, parts, _code())
        return hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        if func == _SET_DATA:
            return set_data(*args)
        if func is Tensor.__setitem__ and isinstance(args[0], QuantizedWeight):
            return set_item(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        result = _HANDLERS.get(func, _on_values)(func, *args, **kwargs)
        return _on_values(func, *args, **kwargs) if result is NotImplemented else result


def values_of(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a weight (m, n) stands for, to be multiplied. dtype: of a quantized one's values; None for its own."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight


def open_weight(p: Tensor) -> Stored:
    """A parameter as a stored tensor; of a sharded one, the rows of this rank.

    After a write, increment the version of the parameter.
    """
    shard, held = shard_of(p), local(p.detach())
    stored = held.stored() if isinstance(held, QuantizedWeight) else Stored.of(held)
    return stored if shard is None else replace(stored, row_start=shard.start)


@functools.cache
def _code() -> str:
    """What the compiled kernels are made of."""
    modules = rounding, affine, stored, int8_products, quantized_ops, weight_views, factored, sys.modules[__name__]
    return "".join(map(inspect.getsource, modules))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        return Linear.apply(input, weight, bias)
    with torch._C.DisableTorchFunctionSubclass():
        return F.linear(input, weight, bias)


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, **others: Any) -> Tensor:
    """Others of its arguments, which transformers leaves alone, see the dequantized values."""
    usual = others.get("max_norm") is None and not any(others.get(name) for name in ("scale_grad_by_freq", "sparse"))
    if isinstance(weight, QuantizedWeight) and usual:
        return Embed.apply(input, weight, -1 if padding_idx is None else padding_idx % weight.shape[0])
    with torch._C.DisableTorchFunctionSubclass():
        return F.embedding(input, weight, padding_idx, **others)


def _check_products(products: str, *, bits: int, whole_rows: bool, simulation: bool) -> None:
    if products not in int8_products.PRODUCTS:
        raise ValueError(f"INT8 products are for {' or '.join(int8_products.PRODUCTS)}, not for {products}")
    if bits != 8 or not whole_rows or simulation:
        raise ValueError("INT8 products need 8-bit weights with one group a row (a group size of -1), not simulated")


def _clone(func: Any, weight: QuantizedWeight, **kwargs: Any) -> QuantizedWeight:
    return weight._like({name: part.clone() for name, part in weight.stored().parts.items()})


def _to(func: Any, weight: QuantizedWeight, *, dtype: torch.dtype | None = None, **kwargs: Any) -> QuantizedWeight:
    """Another device moves the parts; another dtype changes what the weight appears as, and nothing else."""
    options = {name: kwargs[name] for name in ("device", "non_blocking") if name in kwargs}
    parts = {name: part.to(**options, copy=True) for name, part in weight.stored().parts.items()}
    return weight._like(parts, dtype=dtype)


def _copy_(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Codes go to codes as they are; other values are rounded to nearest, for there is no seed."""
    if not isinstance(target, QuantizedWeight):
        return target.copy_(source._decode(torch.float32), non_blocking)  # type: ignore[attr-defined]
    parts, own = target.stored().parts, source if isinstance(source, QuantizedWeight) else None
    if own is not None and _grid_of(own) == _grid_of(target) and own.shape == target.shape:
        new = own.stored().parts
    else:
        values = source.to(target.device) if own is None else own._decode(torch.float32)
        new = target.codec.encode(values.expand(target.shape).reshape(target.codec.shape_of(parts)))
        if not values.is_meta:
            check_finite(target.codec.magnitudes(new), name="copy_")
    for name, part in parts.items():
        part.copy_(new[name])
    return target


def _grid_of(weight: QuantizedWeight) -> tuple[type[Affine], int, int]:
    """What two weights must share for the parts of one to be parts of the other."""
    return type(weight.codec), weight.codec.bits, weight.codec.group_size


def _new(func: Any, weight: QuantizedWeight, *args: Any, **kwargs: Any) -> Tensor:
    """zeros_like and its kind give ordinary tensors: an optimizer's moments are not weights."""
    shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return func(shape, *args, **kwargs | {"device": kwargs.get("device") or weight.device})


def _new_zeros(func: Any, weight: QuantizedWeight, *args: Any, **kwargs: Any) -> Tensor:
    found = weight_views.new_zeros(func, weight, *args, **kwargs)
    return _new(func, weight, *args, **kwargs) if found is NotImplemented else found


def _on_values(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other operation: on the dequantized values, if it only reads the weight."""
    declared = func._schema.arguments
    given = dict(zip((argument.name for argument in declared), args, strict=False)) | kwargs
    written = [given.get(a.name) for a in declared if a.alias_info is not None and a.alias_info.is_write]
    targets = [tensor for tensor in tree_leaves(written) if isinstance(tensor, QuantizedWeight)]
    if any(target.requires_grad or target.trained for target in targets):
        raise ValueError(NO_SEED.format(func))
    if targets:
        target, *others = args
        if target is not targets[0] or len(targets) > 1:
            raise ValueError(NO_SEED.format(func))
        return target.copy_(func(target._decode(torch.float32), *others, **kwargs))
    args, kwargs = tree_map_only(QuantizedWeight, lambda weight: weight._decode(weight.dtype), (args, kwargs))
    return func(*args, **kwargs)


_NEW = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty")
_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: weight_views.share,
    aten.alias.default: weight_views.share,
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.copy_.default: _copy_,
    aten.slice.Tensor: weight_views.slice_of,
    aten.split.Tensor: weight_views.split,
    aten.view.default: weight_views.view,
    aten.as_strided.default: weight_views.as_strided,
    aten.new_zeros.default: _new_zeros,
    **{getattr(aten, name).default: _new for name in _NEW},
}
