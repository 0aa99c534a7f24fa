"""The last part of an update, from the projected gradient to the written weight: a function of tensors.

The same code runs eager or compiled. A Python number becomes a constant of compiled code, and another value means
compiling again. So the numbers that change from update to update are `StepValues`: Python numbers in eager code, 0-d
tensors on the CPU in compiled code, which a kernel on a GPU takes as arguments. `UpdateConstants` are compiled in, so
there is one compilation for each distinct shape and set of constants.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore.clock import Clock
from qgalore.rules.lifts import Lift, Way
from qgalore.rules.moments import Moment
from qgalore.rules.rules import Rule
from qgalore.storage.rounding import Seed, seed_tensors
from qgalore.storage.stored import Stored
from qgalore.subspace.projector import Projector

MAX_COMPILES = 256  # shapes times constants. torch stops at 8, where it suspects a number that changes


class StepValues(NamedTuple):
    """The numbers of one update."""

    lr: float | Tensor  # step size
    shrink: float | Tensor  # factor on the weight, by decoupled weight decay
    mass: float | Tensor  # see rules
    mass_sq: float | Tensor
    seed: Seed  # 64 bits, for the rounding of the weight
    beta2: float | Tensor | None = None  # decay rate of the second moment, for a rule that changes it
    coupled_decay: float | Tensor | None = None  # L2 coefficient, added to the gradient as g + coupled_decay * w
    clip: float | Tensor | None = None  # maximum norm of the projected gradient; None disables clipping

    @classmethod
    def of(cls, group: dict[str, Any], rule: Rule, clock: Clock, state: dict[str, Any], *, seed: int) -> "StepValues":
        """The values for an update that the clock has counted."""
        lr, weight_decay = group["lr"], group["weight_decay"]
        mass, mass_sq = clock.masses(state)
        return cls(
            lr=lr,
            shrink=1 - lr * weight_decay * group["decoupled"],
            mass=mass,
            mass_sq=mass_sq,
            seed=seed,
            beta2=rule.decay(clock.steps(state)) if rule.decay else None,
            coupled_decay=None if group["decoupled"] else weight_decay,
            clip=group["clip"] or None,
        )

    def as_tensors(self, dtype: torch.dtype) -> "StepValues":
        """The same values as 0-d tensors of the gradient's dtype, for compiled code."""
        assert isinstance(self.seed, int)
        tensors = {
            name: torch.as_tensor(value, dtype=dtype)
            for name, value in self._asdict().items()
            if name != "seed" and value is not None
        }
        return self._replace(seed=seed_tensors(self.seed), **tensors)


class UpdateConstants(NamedTuple):
    """Everything that is the same in all updates of a weight."""

    projector: Projector
    rule: Rule
    lift: Lift
    betas: tuple[float, float]
    eps: float
    scale: float  # factor on the update


def write_update(
    R: Tensor,
    weight: Stored,
    moments: Sequence[Moment],
    *,
    bases: Mapping[str, Stored],
    step: StepValues,
    constants: UpdateConstants,
    G: Tensor | None = None,
    last: Tensor | None = None,
    watch: AbstractContextManager | None = None,
) -> Tensor:
    """Writes moments, weight and `last`, or nothing at all if the gradient is not finite.

    R: the projected gradient (r or m, r or n), float32 or float64.
    weight: the weight (m, n).
    moments: the moments that the rule keeps for the shape of R.
    bases: the bases, see Projector.open.
    G, last: arguments of the lift, see rules.lifts.
    watch: measures the time of the lift, in eager code.
    Returns the norm of R before clipping, ().
    """
    norm = torch.linalg.vector_norm(R)
    finite = norm.isfinite()
    extra: dict[str, Any] = dict(norm=norm, bases=bases, step=step, constants=constants, G=G, last=last, watch=watch)
    if norm.device.type == "cpu" and not torch.compiler.is_compiling():
        if finite:
            _write_finite(R, weight, moments, **extra)
        return norm
    # To look at a value on a GPU would mean to wait for it. In compiled code the copies take no memory.
    written = [tensor for kept in [*(m.stored for m in moments), weight] for tensor in kept.parts.values()]
    written += [last] if last is not None else []
    before = [tensor.clone() for tensor in written]
    _write_finite(R, weight, moments, **extra)
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))
    return norm


def _write_finite(
    R: Tensor,
    weight: Stored,
    moments: Sequence[Moment],
    *,
    norm: Tensor,
    bases: Mapping[str, Stored],
    step: StepValues,
    constants: UpdateConstants,
    G: Tensor | None,
    last: Tensor | None,
    watch: AbstractContextManager | None,
) -> None:
    projector, rule, lift, (beta1, beta2), eps, scale = constants
    w, raw = weight.read(R.dtype), R
    if step.coupled_decay is not None:
        R = _add_(R.clone(), w, factor=step.coupled_decay)
    if step.clip is not None:
        R = R * (step.clip / (norm + 1e-6)).clamp(max=1)
    decays = dict(beta1=beta1, beta2=beta2 if step.beta2 is None else step.beta2)
    D = rule.direction(R, *moments, **decays, eps=eps, mass=step.mass, mass_sq=step.mass_sq)
    with nullcontext() if watch is None else watch:
        # Clipping would scale G and R alike, so the lift gets both unclipped.
        U = lift.function(D, raw, G, Way(projector, bases, last))  # (m, n)
    if scale != 1:
        U = U.mul_(scale)
    if rule.finish is not None:  # after the scale, as in the reference: a sign does not depend on it
        U = rule.finish(U)
    w = _add_(w * step.shrink, U, factor=-step.lr)
    weight.write(w, seed=step.seed)


def _add_(x: Tensor, y: Tensor, *, factor: float | Tensor) -> Tensor:
    """x += factor * y; `alpha` takes Python numbers only."""
    return x.add_(y * factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


def compiled_update() -> Callable[..., Tensor]:
    """write_update, compiled at the first use of each shape and set of constants."""
    compiled = torch.compile(write_update, dynamic=False, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=MAX_COMPILES)(compiled)
