"""The gradient of a linear layer's weight as the product that it is, G = dY^T X, not multiplied out.

GaLore needs P^T G alone, and (dY P)^T X is that: for T tokens, a weight (m, n) and rank r, T r (m + n) multiplications
in place of T m n + r m n. At a quarter of the rank that halves one of the three products of a layer, and G, the largest
tensor of an update, is never made.

Whoever uses the gradient up inside backward gives the weight the attribute `takes_product` if this form will do. To
everyone else, a hook of the user's for example, it is a tensor of G's shape, dtype and values, multiplied out at the
first look.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
_in_graphs = False  # whether compiled layers may make products


class Product:
    """dY (T, m) and X (T, n) until they are multiplied, then dY^T X; shared by all views of one gradient."""

    def __init__(self, dY: Tensor, X: Tensor) -> None:
        self.factors: tuple[Tensor, Tensor] | None = (dY, X)
        self._values: Tensor | None = None

    def values(self) -> Tensor:
        """dY^T X, which takes the place of the factors. (m, n)"""
        if self.factors is not None:
            (dY, X), self.factors = self.factors, None
            self._values = dY.mT @ X
        if self._values is None:
            raise RuntimeError("this gradient was used up inside backward: to keep it, clone it in a hook")
        return self._values

    def free(self) -> None:
        """Lets go of all tensors. Autograd holds on to a gradient until its hooks have returned."""
        self.factors = self._values = None


class FactoredGradient(Tensor):
    """A gradient (m, n) that is a Product."""

    product: Product

    @staticmethod
    def __new__(cls, product: Product, *, like: Tensor | None = None) -> "FactoredGradient":
        """like: has the gradient's shape, dtype and device; None as long as the product has its factors."""
        if like is None:
            assert product.factors is not None
            dY, X = product.factors
            return Tensor._make_wrapper_subclass(cls, (dY.shape[1], X.shape[1]), dtype=dY.dtype, device=dY.device)
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    def __init__(self, product: Product, *, like: Tensor | None = None) -> None:
        self.product = product

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["dY", "X"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], settings: None, size: Any, stride: Any) -> Tensor:
        return cls(Product(parts["dY"], parts["X"]))

    def __getattr__(self, name: str) -> Tensor:
        """The factors, which torch.compile asks for by name."""
        if name in ("dY", "X") and self.product.factors is not None:
            return self.product.factors[name == "X"]
        raise AttributeError(name)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].product, like=args[0])
        args, kwargs = tree_map_only(FactoredGradient, dense, (args, kwargs or {}))
        return func(*args, **kwargs)


class Linear(torch.autograd.Function):
    """y = x W^T + b, with a FactoredGradient for an ordinary W, in eager code. x: (..., n), W: (m, n), b: (m)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factored = not torch.compiler.is_compiling() and takes_product(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])  # (tokens, m)
        dW = weight_gradient(rows, x.reshape(-1, x.shape[-1]), factored=ctx.factored) if needs_dw else None
        return dy @ weight if needs_dx else None, dW, rows.sum(0) if needs_db else None


def weight_gradient(dY: Tensor, X: Tensor, *, factored: bool) -> Tensor:
    """dY^T X, as a FactoredGradient if `factored` and nobody differentiates it. (T, m), (T, n) -> (m, n)"""
    if factored and (_in_graphs if torch.compiler.is_compiling() else not torch.is_grad_enabled()):
        return _product_of(dY, X)
    return dY.mT @ X


def _product_of(dY: Tensor, X: Tensor) -> Tensor:
    return FactoredGradient(Product(dY, X))


def takes_product(weight: Tensor) -> bool:
    """Whether the gradient of a weight may be a FactoredGradient: whoever uses it up inside backward takes products."""
    return getattr(weight, "takes_product", False)


def allow_in_graphs() -> None:
    """From now on the quantized weights of layers that are compiled may have FactoredGradients, too.

    torch.compile wraps what a graph returns into such a tensor if the graph takes one of its kind, a QuantizedWeight
    for example. Without this call they are multiplied out. It is no decorator because torch's compiler takes seconds to
    import.
    """
    global _in_graphs
    torch.compiler.allow_in_graph(_product_of)
    _in_graphs = True


def factors_of(G: Tensor) -> tuple[Tensor, Tensor] | None:
    """dY (T, m) and X (T, n) of a gradient (m, n) that is a product and not multiplied out yet; else None."""
    return G.product.factors if isinstance(G, FactoredGradient) else None


def dense(G: Tensor) -> Tensor:
    """A gradient as an ordinary tensor."""
    return G.product.values() if isinstance(G, FactoredGradient) else G


def free(G: Tensor) -> None:
    """Frees a FactoredGradient that has been used up; others end with their last reference."""
    if isinstance(G, FactoredGradient):
        G.product.free()
