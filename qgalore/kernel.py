"""The last part of an update, from the projected gradient to the written weight: a function of tensors.

It runs as it is or compiled, the same code. A number that compiled code meets becomes a constant of it, and another
value means compiling again. So the numbers that change from update to update are `StepValues`: Python's in eager code;
in compiled code 0-d tensors, on the CPU, from where a kernel on a GPU takes them as arguments. What stays the same is a
`Plan`, meant to be compiled in: one compile for each distinct shape and set of constants.
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
    """The numbers of one update; None where there is nothing to do.

    lr: step size.
    shrink: factor on the weight, by decoupled decay.
    mass, mass_sq: see rules.
    seed: 64 bits, of the weight's rounding.
    beta2: the second moment's decay rate, where the rule's changes.
    coupled_decay: L2 coefficient, added to the gradient as g + coupled_decay * w.
    clip: maximum norm of the projected gradient.
    """

    lr: float | Tensor
    shrink: float | Tensor
    mass: float | Tensor
    mass_sq: float | Tensor
    seed: Seed
    beta2: float | Tensor | None = None
    coupled_decay: float | Tensor | None = None
    clip: float | Tensor | None = None

    @classmethod
    def of(cls, group: dict[str, Any], rule: Rule, clock: Clock, state: dict[str, Any], *, seed: int) -> "StepValues":
        """Those of an update that the clock has counted."""
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
        """The same as 0-d tensors of the gradient's dtype, for compiled code."""
        assert isinstance(self.seed, int)
        tensors = {
            name: torch.as_tensor(value, dtype=dtype)
            for name, value in self._asdict().items()
            if name != "seed" and value is not None
        }
        return self._replace(seed=seed_tensors(self.seed), **tensors)


class UpdateConstants(NamedTuple):
    """What all updates of a weight have in common.

    betas, eps: constants of the rule.
    scale: factor on the update.
    """

    projector: Projector
    rule: Rule
    lift: Lift
    betas: tuple[float, float]
    eps: float
    scale: float


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
    """Writes moments, weight and `last`, and nothing else; nothing at all from a gradient that is not finite.

    R: the projected gradient, float32 or float64, (r or m, r or n).
    weight: (m, n).
    moments: those that the rule keeps for R's shape.
    bases: see Projector.open.
    G, last: for the lift, see rules.lifts.
    watch: times the way back, in eager code.
    Returns the norm of R before clipping. ()
    """
    norm = torch.linalg.vector_norm(R)
    finite = norm.isfinite()
    extra: dict[str, Any] = dict(norm=norm, bases=bases, step=step, constants=constants, G=G, last=last, watch=watch)
    if norm.device.type == "cpu" and not torch.compiler.is_compiling():
        if finite:
            _write_finite(R, weight, moments, **extra)
        return norm
    # Asking a GPU would mean waiting for it. Compiled, the copies exist in name only.
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
    """write_update of a gradient taken to be finite. norm: of R."""
    projector, rule, lift, (beta1, beta2), eps, scale = constants
    w, raw = weight.read(R.dtype), R
    if step.coupled_decay is not None:
        R = _add_(R.clone(), w, factor=step.coupled_decay)
    if step.clip is not None:
        R = R * (step.clip / (norm + 1e-6)).clamp(max=1)
    decays = dict(beta1=beta1, beta2=beta2 if step.beta2 is None else step.beta2)
    D = rule.direction(R, *moments, **decays, eps=eps, mass=step.mass, mass_sq=step.mass_sq)
    with nullcontext() if watch is None else watch:
        # Clipping scales G and R alike: the lift sees both as they were.
        U = lift.function(D, raw, G, Way(projector, bases, last))  # (m, n)
    if rule.finish is not None:
        U = rule.finish(U)
    if scale != 1:
        U = U.mul_(scale)
    w = _add_(w * step.shrink, U, factor=-step.lr)
    weight.write(w, seed=step.seed)


def _add_(x: Tensor, y: Tensor, *, factor: float | Tensor) -> Tensor:
    """x += factor * y. `alpha` takes Python's numbers only."""
    return x.add_(y * factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


def compiled_update() -> Callable[..., Tensor]:
    """write_update, compiled for each shape and set of constants when it first meets them."""
    compiled = torch.compile(write_update, dynamic=False, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=MAX_COMPILES)(compiled)
