"""A reader of the 8-bit moments of earlier versions, whose codes were a tree of decimal exponents.

Code c >= 1 whose highest bit is bit k (n = 2**k codes share it) stood for 10**(k - 7) * (0.1 + 0.9 * (c - n + 1) / n),
of the largest value of a block of 256; code 0 for zero. First moments gave a bit to the sign and had a tree of 7 bits;
second moments were squares of the tree. Now they have the codes of blockwise.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qgalore.storage.blockwise import BLOCK, Log, Power
from qgalore.storage.stored import Stored, part_key, put

_MAXIMA = ".absmax"
_SECOND = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")


def upgrade_moments(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state with its 8-bit moments in today's codes, rounded to nearest. Other states are unchanged."""
    new = dict(state)
    for name in [key.removesuffix(_MAXIMA) for key in state if key.endswith(_MAXIMA)]:
        codes, maxima = (new.pop(part_key(name, part)) for part in ("codes", "absmax"))
        signed = name.rpartition(".")[2] not in _SECOND
        stored = Stored.zeros(Power() if signed else Log(), codes.shape, device=codes.device)
        stored.write(_decode(codes, maxima, signed=signed))
        put(new, name, stored)
    return new


def _decode(codes: Tensor, maxima: Tensor, *, signed: bool) -> Tensor:
    """The values, (count,) float32."""
    tree = torch.tensor(_tree(7 if signed else 8), dtype=torch.float64)
    points = torch.cat([tree, 0.0 - tree]) if signed else tree.square()
    relative = points.float().to(codes.device)[codes.long()]
    return relative * maxima.repeat_interleave(BLOCK)[: codes.numel()]


def _tree(bits: int) -> list[float]:
    """The values of the 2**bits codes, ascending from 0 to 1."""
    places = [(code, code.bit_length() - 1) for code in range(1, 1 << bits)]
    return [0.0] + [10.0 ** (k + 1 - bits) * (0.1 + 0.9 * ((code + 1) / 2**k - 1)) for code, k in places]
