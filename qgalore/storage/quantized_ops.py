"""What autograd sees of a quantized weight: its values, a linear layer, the rows of an embedding.

The gradient of a weight is a tensor of its shape, in the dtype that it appears in; see also factored.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qgalore.factored import takes_product, weight_gradient
from qgalore.storage import int8_products
from qgalore.storage.stored import Stored


class Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight._decode(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype), None


class Linear(torch.autograd.Function):
    """The three products at the top of quantized_weight.py. Saves x and the weight as it is, in codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.factored = takes_product(weight)
        if not _in_int8(x, weight):
            return F.linear(x, weight._decode(weight.dtype), bias)
        y = int8_products.output(x.flatten(0, -2), **weight.stored().parts).unflatten(0, x.shape[:-1])
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_dx, _, needs_db = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])  # (tokens, out)
        columns = None if x is None else x.reshape(-1, x.shape[-1]).to(dy.dtype)  # (tokens, in)
        dx, dW = None, None
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # whether this is differentiated, too
        if weight.products == "all" and _in_int8(dy, weight) and not again:
            if needs_dx:
                dx = int8_products.input_gradient(rows, **weight.stored().parts).unflatten(0, dy.shape[:-1])
            if columns is not None:
                dW = int8_products.weight_gradient(rows, columns)
        else:
            if needs_dx:
                dx = dy @ (weight.dequantize(dy.dtype) if again else weight._decode(dy.dtype))
            if columns is not None:
                dW = weight_gradient(rows, columns, factored=ctx.factored)
        return dx, dW, rows.sum(0) if needs_db else None


class Embed(torch.autograd.Function):
    """The rows of a weight (vocabulary, n) for ids of any shape. Dequantizes these rows alone."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Any, padding_idx: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocabulary, ctx.padding_idx = weight.shape[0], padding_idx
        stored = weight.stored()
        parts = {name: part.index_select(0, ids.flatten()) for name, part in stored.parts.items()}
        rows = Stored(stored.codec, parts, torch.Size((ids.numel(), weight.shape[1]))).read(weight.dtype)
        return rows.view(*ids.shape, weight.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(dy, ids, ctx.vocabulary, ctx.padding_idx, False), None


def _in_int8(rows: Tensor, weight: Any) -> bool:
    """Whether the products with (..., in) or (..., out) `rows` are INT8 products."""
    tokens = rows.shape[:-1].numel()
    return weight.products is not None and rows.ndim > 1 and int8_products.fits(tokens, weight.shape)
