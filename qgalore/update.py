"""The update of one weight from its projected gradient: a function of tensors, run as it is or compiled.

A number that compiled code meets becomes a constant of it, and another value means compiling again. So the numbers that
change from update to update are `Numbers`: Python's in eager code; in compiled code 0-d tensors, on the CPU, from where
a kernel on a GPU takes them as arguments. What stays the same (shapes, decay rates, the projection's side) is meant to
be compiled in: one compile for each distinct shape and setting.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore.rules.lifts import Residual, recover
from qgalore.rules.rules import Rule
from qgalore.storage.affine import Seed, read_weight, seed_tensors, store_weight, weight_tensors
from qgalore.storage.dynamic8 import Moment
from qgalore.subspace.projector import Projector

MOST_COMPILES = 256  # shapes times settings. torch stops at 8, where it suspects a number that changes


class Numbers(NamedTuple):
    """lr: step size.  shrink: of the weight, by decoupled decay.  mass, mass_sq: see update_rules.  beta2: the second
    moment's decay, where it changes.  seed: of the weight's rounding.  coupled_decay: share of the weight that its
    gradient gets.  clip: largest norm of the gradient.  None: none."""

    lr: float | Tensor
    shrink: float | Tensor
    mass: float | Tensor
    mass_sq: float | Tensor
    seed: Seed
    beta2: float | Tensor | None = None
    coupled_decay: float | Tensor | None = None
    clip: float | Tensor | None = None

    def as_tensors(self, dtype: torch.dtype) -> "Numbers":
        """The same as 0-d tensors of the gradient's dtype, for compiled code."""
        assert isinstance(self.seed, int)
        tensors = {
            name: torch.tensor(value, dtype=dtype)
            for name, value in self._asdict().items()
            if name != "seed" and value is not None
        }
        return self._replace(seed=seed_tensors(self.seed), **tensors)


class Plan(NamedTuple):
    """What all updates of a weight have in common. betas, eps: of the rule.  scale: of the update, where it is
    projected."""

    projector: Projector
    rule: Rule
    betas: tuple[float, float]
    eps: float
    scale: float


def update_weight(
    R: Tensor,
    weight: Any,
    moments: Sequence[Moment],
    *,
    bases: dict[str, Tensor],
    numbers: Numbers,
    plan: Plan,
    residual: Residual | None = None,
) -> Tensor:
    """Writes moments and weight, and nothing else; nothing at all from a gradient that is not finite.

    R: the projected gradient, float32 or float64, (r or m, r or n).  weight: (m, n), from quantize.open_weight.
    moments: those that the rule keeps for R's shape.  bases: see Projector.bases.  residual: what is needed to recover
    what the projection leaves out; None: it stays out.
    Returns the norm of R before clipping. ()
    """
    norm = torch.linalg.vector_norm(R)
    finite = norm.isfinite()
    if norm.device.type == "cpu" and not torch.compiler.is_compiling():
        if finite:
            _write(R, weight, moments, norm=norm, bases=bases, numbers=numbers, plan=plan, residual=residual)
        return norm
    # Asking a GPU would mean waiting for it. Compiled, the copies exist in name only.
    written = [*(tensor for moment in moments for tensor in moment.tensors()), *weight_tensors(weight)]
    written += [residual.norm] if residual is not None else []
    before = [tensor.clone() for tensor in written]
    _write(R, weight, moments, norm=norm, bases=bases, numbers=numbers, plan=plan, residual=residual)
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))
    return norm


def _write(
    R: Tensor,
    weight: Any,
    moments: Sequence[Moment],
    *,
    norm: Tensor,
    bases: dict[str, Tensor],
    numbers: Numbers,
    plan: Plan,
    residual: Residual | None,
) -> None:
    """update_weight of a gradient taken to be finite. norm: of R."""
    projector, rule, (beta1, beta2), eps, scale = plan
    w, raw = read_weight(weight, dtype=R.dtype), R
    if numbers.coupled_decay is not None:
        R = _add_(R.clone(), w, factor=numbers.coupled_decay)
    if numbers.clip is not None:
        R = R * (numbers.clip / (norm + 1e-6)).clamp(max=1)
    decays = dict(beta1=beta1, beta2=beta2 if numbers.beta2 is None else numbers.beta2)
    D = rule.direction(R, *moments, **decays, eps=eps, mass=numbers.mass, mass_sq=numbers.mass_sq)
    if residual is None:
        U = projector.back(D, bases, like=weight)  # (m, n)
    else:
        U = recover(D, raw, residual, projector=projector, bases=bases)  # clipping scales G and R alike
    if rule.finish is not None:
        U = rule.finish(U)
    if projector.sides:
        U = U.mul_(scale)
    w = _add_(w * numbers.shrink, U, factor=-numbers.lr)
    store_weight(weight, w, seed=numbers.seed)


def _add_(x: Tensor, y: Tensor, *, factor: float | Tensor) -> Tensor:
    """x += factor * y. `alpha` takes Python's numbers only."""
    return x.add_(y * factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


def compiled_update() -> Callable[..., Tensor]:
    """update_weight, compiled for each shape and setting when it first meets them."""
    compiled = torch.compile(update_weight, dynamic=False, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=MOST_COMPILES)(compiled)
