"""Checkpoints of format 1, read as those of format 2.

Format 1 named the class of a quantized weight where format 2 describes its codec; it packed the 4-bit codes of a basis
without regard to rows; it kept the seconds that refreshes had taken; and its runs of galore_lion multiplied the sign by
--galore_scale. Up to November 2026, 8-bit moments had other codes, in both formats.
"""

from typing import Any

import torch
from torch import Tensor

from qgalore.storage.affine import pack_nibbles
from qgalore.storage.dynamic8 import upgrade_moments

LIONS = ("galore_lion", "galore_lion_per_layer")
CODECS = {"Int8Weight": "affine", "SimulatedInt8Weight": "simulated"}
SIDES = ("left", "right")


def upgrade_progress(state: dict[str, Any]) -> dict[str, Any]:
    """state.json in format 2. --galore_scale multiplied Lion's sign then; now --matrix_lr_ratio alone does."""
    args = state.get("args", {})
    if args.get("optimizer") in LIONS:
        args = args | {"matrix_lr_ratio": args["matrix_lr_ratio"] * args["galore_scale"]}
        return state | {"args": args}
    return state


def upgrade_quantized(entry: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of a quantized weight, in format 2. Raises KeyError for an unknown class."""
    if "kind" not in entry:
        return entry
    rest = {key: value for key, value in entry.items() if key != "kind"}
    return {"codec": CODECS[entry["kind"]], "bits": 8, **rest}


def upgrade_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter in format 2."""
    state = {key: value for key, value in upgrade_moments(state).items() if key != "refresh_seconds"}
    for side in SIDES:
        codes = state.get(f"{side}.codes")
        if codes is not None and codes.ndim == 1:
            state[f"{side}.codes"] = _pack_rows(codes, rows=state[f"{side}.scale"].shape[0])
    return state


def _pack_rows(flat: Tensor, *, rows: int) -> Tensor:
    """4-bit codes of a matrix, packed from end to end, packed row by row. (ceil(m r / 2),) -> (m, ceil(r / 2))"""
    codes = torch.stack((flat & 15, flat >> 4), dim=-1).flatten()  # an odd last one is followed by a 0
    width = codes.numel() // rows
    return pack_nibbles(codes[: rows * width].view(rows, width))
