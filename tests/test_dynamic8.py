"""States with the 8-bit moments of earlier versions are read."""

import pytest
import torch
from support.gradients import relative_error

from qgalore.optimizer import LowRankOptimizer
from qgalore.storage.blockwise import Log, Power
from qgalore.storage.dynamic8 import upgrade_moments
from qgalore.storage.stored import find


def value_of(code: int, *, bits: int) -> float:
    """A code read bit by bit: leading zeros are the decimal exponent, what follows the first 1 a linear fraction."""
    zeros, _, fraction = f"{code:0{bits}b}".partition("1")
    if not code:
        return 0.0
    steps = (int(fraction, 2) if fraction else 0) + 1
    return 10.0 ** -len(zeros) * (0.1 + 0.9 * steps / 2 ** len(fraction))


@pytest.mark.parametrize("side", ["", "right."])
def test_old_codes_are_read_bit_by_bit(side):
    """All 256 codes of a first and of a second moment, at the maxima of two blocks; a short block follows."""
    codes = torch.arange(256, dtype=torch.uint8)
    old = {"codes": torch.cat([codes, codes, codes[:7]]), "absmax": torch.tensor([1.0, 3e-4, 2.0])}
    state = {f"{side}{name}.{part}": tensor for name in ("exp_avg", "exp_avg_sq") for part, tensor in old.items()}
    new = upgrade_moments(state | {"step": 7})
    assert new["step"] == 7 and not any("absmax" in key for key in new)
    maxima = torch.tensor([1.0] * 256 + [3e-4] * 256 + [2.0] * 7)
    signed = [value_of(code, bits=7) for code in range(128)]
    first = torch.tensor([*signed, *(-value for value in signed)])[old["codes"].long()] * maxima
    second = torch.tensor([value_of(code, bits=8) ** 2 for code in range(256)])[old["codes"].long()] * maxima
    for name, codec, expected in (("exp_avg", Power(), first), ("exp_avg_sq", Log(), second)):
        found = find(new, side + name, codec=codec, shape=expected.shape).read(torch.float32)
        assert relative_error(found, expected) < (0.02 if name == "exp_avg" else 0.06), "14 decades, 5 codes an octave"
        assert ((found > 0) == (expected > 0)).float().mean() > 0.98, "all but the smallest first moments"


def test_an_optimizer_loads_them():
    p = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = LowRankOptimizer([{"params": [p], "state_bits": 8}], lr=0.01)
    p.grad = torch.randn(64, 64)
    optimizer.step()
    saved = optimizer.state_dict()
    (state,) = saved["state"].values()
    for name in ("exp_avg", "exp_avg_sq"):
        for part in ("scale", "steps"):
            state.pop(f"{name}.{part}", None)
        state[f"{name}.codes"] = torch.full((4096,), 255 if name == "exp_avg_sq" else 127, dtype=torch.uint8)
        state[f"{name}.absmax"] = torch.full((16,), 0.5)
    optimizer.load_state_dict(saved)
    (moment,) = (find(optimizer.state[p], "exp_avg", codec=Power(), shape=p.shape),)
    assert moment.read(torch.float32).flatten().tolist() == pytest.approx([0.5] * 4096)
    optimizer.step()
    assert p.isfinite().all()
