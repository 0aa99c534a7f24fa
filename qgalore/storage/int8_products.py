"""The products of a linear layer as INT8 products: stored codes go to the tensor cores, or to VNNI, as they are.

    y  = x W^T      x quantized per token, W per row as it is stored
    dx = dy W       W's scales belong to the summed index: dy takes them before it is quantized per token
    dW = dy^T x     the sum runs over tokens: dy and x are quantized per column

Symmetric codes -127 ... 127, rounded to nearest, with the largest magnitude of a row as its scale (Dettmers et al.
2022, LLM.int8(), arXiv 2208.07339, section 2). A weight has codes with a zero point: W = (c - z) s, so a product with c
is corrected by z times the row sums of the other factor, which is exact.

The sums are int32. What comes of rounding x and dy: docs/results.md, "INT8 products".
"""

from functools import reduce

import torch
from torch import Tensor

from qgalore.storage.chunks import GPU_ELEMENTS, row_chunks

PRODUCTS = ("forward", "all")  # which products: y alone, or all three
_MIN_ROWS = 17  # what torch._int_mm asks for on a GPU, on every device so that results do not depend on it
_MULTIPLE = 8
_MAX_TOKENS = 1 << 17  # in an int32 sum: 127 * 127 * 2**17 is just below 2**31


def check_device(device: torch.device) -> None:
    """Raises ValueError where INT8 products have no hardware: a CPU without VNNI, a GPU before Ampere."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"INT8 products need a GPU of compute capability 8.0, and {torch.cuda.get_device_name()} has less"
        )
    if device.type == "cpu" and not torch.cpu._is_vnni_supported():
        raise ValueError("INT8 products need a CPU with VNNI instructions, and this one has none")


def fits(tokens: int, shape: torch.Size) -> bool:
    """Whether the hardware takes these sizes. shape: of the weight. Otherwise the products are floating ones."""
    return min(tokens, shape[0]) >= _MIN_ROWS and not any(size % _MULTIPLE for size in (tokens, *shape))


def output(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """y = x W^T in x's dtype. x: (tokens, in) -> (tokens, out)

    codes: (out, in), uint8, or with a dimension of one group; scale, zero: (out, 1).
    """
    signed, zero = _signed(codes, zero)
    xq, step = quantize_rows(x)
    y = x.new_empty(len(x), len(signed))
    for rows in _chunks(y):
        part = torch._int_mm(xq[rows], signed.mT).to(scale.dtype)
        part.addr_(xq[rows].sum(1, dtype=torch.int32).to(scale.dtype), zero, alpha=-1)
        y[rows] = part.mul_(step[rows]).mul_(scale.mT)
    return y


def input_gradient(dy: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """dx = dy W in dy's dtype. dy: (tokens, out) -> (tokens, in). The others as in `output`."""
    signed, zero = _signed(codes, zero)
    dyq, step = quantize_rows(dy * scale.mT)
    dx = dy.new_empty(len(dy), signed.shape[1])
    for rows in _chunks(dx):
        part = torch._int_mm(dyq[rows], signed).to(scale.dtype)
        part.sub_((dyq[rows].to(scale.dtype) @ zero).unsqueeze(1))
        dx[rows] = part.mul_(step[rows])
    return dx


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dW = dy^T x in dy's dtype. dy: (tokens, out), x: (tokens, in) -> (out, in)"""
    dyq, dy_step = quantize_rows(dy.mT)
    xq, x_step = quantize_rows(x.mT)
    dW = dy.new_empty(len(dyq), len(xq))
    for rows in _chunks(dW):
        factors = zip(dyq[rows].split(_MAX_TOKENS, dim=1), xq.mT.split(_MAX_TOKENS), strict=True)
        total = reduce(Tensor.add_, (torch._int_mm(a, b).to(dy_step.dtype) for a, b in factors))
        dW[rows] = total.mul_(dy_step[rows]).mul_(x_step.mT)
    return dW


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Signed codes, int8, and the step of each row, float32. (m, n) -> (m, n), (m, 1)

    A row that holds NaN or infinity gets a step that is not finite.
    """
    x = x.to(torch.float32)
    step = x.abs().amax(1, keepdim=True) / 127
    codes = (x / step.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), step


def _signed(codes: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as int8, moved by 128 as their zero points are. (out, in) int8, (out,) float32"""
    return codes.flatten(1).view(torch.int8).bitwise_xor(-128), zero.squeeze(1).to(torch.float32) - 128


def _chunks(product: Tensor) -> list[slice]:
    """Ranges of rows in which a product's sums, twice the size of its bfloat16 result, are made. None is too short."""
    chunks = list(row_chunks(*product.shape, device=product.device, multiple=_MIN_ROWS - 1, elements=GPU_ELEMENTS))
    if len(chunks) > 1 and chunks[-1].stop - chunks[-1].start < _MIN_ROWS:
        last = chunks.pop()
        chunks[-1] = slice(chunks[-1].start, last.stop)
    return chunks
