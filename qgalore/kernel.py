"""The last part of an update, from the projected gradient to the written weight: a function of tensors.

The same code runs eager or compiled; eager code works through chunks of rows that fit into a CPU's cache.

A Python number becomes a constant of compiled code, and another value means compiling again. So the numbers that change
from update to update are `StepValues`: Python numbers in eager code, 0-d tensors on the CPU in compiled code, which a
kernel on a GPU takes as arguments. `UpdateConstants` are compiled in, so there is one compilation for each distinct
shape and set of constants.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore.clock import Clock
from qgalore.rules.lifts import Lift, Way
from qgalore.rules.moments import Moment
from qgalore.rules.rules import Rule
from qgalore.rules.skips import align
from qgalore.storage.chunks import COMPILED_ELEMENTS, PRODUCT_ROWS, on_cpu, row_chunks
from qgalore.storage.rounding import Seed, seed_tensors
from qgalore.storage.stored import Stored
from qgalore.subspace.projector import Projector


class StepValues(NamedTuple):
    """The numbers of one update."""

    lr: float | Tensor | None  # step size; None where the weight stays as it is
    shrink: float | Tensor  # factor on the weight, by decoupled weight decay
    mass: float | Tensor  # see rules
    mass_sq: float | Tensor
    seed: Seed  # 64 bits, for the rounding of the weight
    beta2: float | Tensor | None = None  # decay rate of the second moment, for a rule that changes it
    coupled_decay: float | Tensor | None = None  # L2 coefficient, added to the gradient as g + coupled_decay * w
    clip: float | Tensor | None = None  # maximum norm of the projected gradient; None disables clipping

    @classmethod
    def of(
        cls,
        group: dict[str, Any],
        rule: Rule,
        clock: Clock,
        state: dict[str, Any],
        *,
        lr: float | None,
        seed: int,
    ) -> "StepValues":
        """The values for an update that the clock has counted. lr: see above."""
        weight_decay = group["weight_decay"]
        mass, mass_sq = clock.masses(state) if group["correct_bias"] else (1.0, 1.0)
        return cls(
            lr=lr,
            shrink=1 - (lr or 0) * weight_decay * group["decoupled"],
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
    aligned: bool = False  # whether the step size is multiplied by the alignment, see rules.skips
    absorbs: bool = False  # whether the first moment takes the rounding error of the weight in
    spends: bool = False  # whether nobody needs R once the direction is known


def write_update(
    R: Tensor,
    weight: Stored,
    moments: Sequence[Moment],
    *,
    step: StepValues,
    constants: UpdateConstants,
    kernel: Callable[..., None],
    whole_norm: Callable[[Tensor], Tensor] | None = None,
    **others: Any,
) -> Tensor:
    """Writes moments, weight, `last` and `alignment`, or nothing at all if the gradient is not finite.

    R: the projected gradient (r or m, r or n); all arithmetic is float32 or wider.
    weight: the weight (m, n).
    moments: the moments that the rule keeps for the shape of R.
    kernel: write_rows, compiled or not.
    whole_norm: makes the norm over all ranks of that of the rows here, if it is needed to clip.
    others: further arguments of write_rows.
    Returns the norm of R before clipping, (); of a shard, that of its own rows.

    A weight that is not projected is written a few rows at a time if its rule allows it: embedding and head are the
    largest tensors of a model, and their temporaries would be the peak of its memory. An alignment is one of all rows.
    """
    own_norm = torch.linalg.vector_norm(R, dtype=torch.promote_types(R.dtype, torch.float32))
    norm = own_norm if whole_norm is None else whole_norm(own_norm)
    finite = norm.isfinite()
    if on_cpu(norm.device):
        if not finite:
            return own_norm
        finite = None
    shared: dict[str, Any] = dict(norm=norm, finite=finite, constants=constants, **others)
    projected, separable = bool(constants.projector.sides), constants.rule.separable
    if separable == "elements":
        R, weight, moments = _in_blocks(R, weight, moments, projected=projected)
    if projected or separable is None or R.ndim != 2 or constants.aligned:
        kernel(R, weight, moments, step=step, **shared)
        return own_norm
    compiled = isinstance(step.mass, Tensor)
    for rows in _chunks(R, moments, elements=COMPILED_ELEMENTS if compiled else None):
        part, own, seed = weight.rows(rows), [moment.rows(rows) for moment in moments], step.seed
        if compiled:
            part, seed = part.at_start(seed)
            own = [moment.at_start() for moment in own]
        kernel(R[rows], part, own, step=step._replace(seed=seed), **shared)
    return own_norm


def _in_blocks(
    R: Tensor, weight: Stored, moments: Sequence[Moment], *, projected: bool
) -> tuple[Tensor, Stored, Sequence[Moment]]:
    """R, weight and moments as rows of blocks, see Stored.in_blocks; of a projected weight the moments only."""
    blocks = [moment.in_blocks() for moment in moments]
    own = [moment for moment in blocks if moment is not None]
    if len(own) < len(blocks):
        return R, weight, moments
    if projected:
        return R, weight, own
    rows = weight.in_blocks()
    return (R, weight, moments) if rows is None else (R.reshape(rows.shape), rows, own)


def _chunks(R: Tensor, moments: Sequence[Moment], *, elements: int | None = None) -> Iterator[slice]:
    """Ranges of rows at which R and the moments of its rows can be cut."""
    multiple = math.lcm(*(moment.row_multiple for moment in moments))
    return row_chunks(*R.shape, device=R.device, multiple=multiple, elements=elements)


def write_rows(
    R: Tensor,
    weight: Stored,
    moments: Sequence[Moment],
    *,
    finite: Tensor | None,
    last: Tensor | None = None,
    alignment: Tensor | None = None,
    **others: Any,
) -> None:
    """Writes moments, weight, `last` and `alignment` from R.

    finite: () bool, whether to leave them as they are after all; None if that is known already. On a GPU a value cannot
        be looked at without waiting for it. In compiled code the copies take no memory.
    last, alignment, others: see _write.
    """
    written = [tensor for moment in moments for tensor in moment.stored.parts.values()]
    written += [scalar for scalar in (last, alignment) if scalar is not None]
    with _unless_bad(written, finite):
        _write(R, weight, moments, last=last, alignment=alignment, finite=finite, **others)


@contextmanager
def _unless_bad(written: Sequence[Tensor], finite: Tensor | None) -> Iterator[None]:
    """Gives the tensors that are written inside their old values back, unless `finite`; None means that it is."""
    if finite is None:
        yield
        return
    before = [tensor.clone() for tensor in written]
    yield
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))


def _write(
    R: Tensor,
    weight: Stored,
    moments: Sequence[Moment],
    *,
    norm: Tensor,
    finite: Tensor | None,
    bases: Mapping[str, Stored],
    step: StepValues,
    constants: UpdateConstants,
    G: Tensor | None = None,
    last: Tensor | None = None,
    alignment: Tensor | None = None,
    watch: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """
    norm: norm of the whole of R, ().
    finite: see write_rows; of the weight, a few rows at a time are kept for it.
    bases: the bases, see Projector.open.
    G, last: arguments of the lift, see rules.lifts.
    alignment: (1,), see rules.skips; None unless the step size is multiplied by it.
    watch: makes a context that measures the time of the way back, in eager code.
    """
    projector, rule, lift, scale = constants.projector, constants.rule, constants.lift, constants.scale
    raw = R = R.to(torch.promote_types(R.dtype, torch.float32))
    if step.coupled_decay is not None:
        R = _add_(R.clone(), weight.read(R.dtype), factor=step.coupled_decay)
    if step.clip is not None:
        R = R * (step.clip / (norm + 1e-6)).clamp(max=1)
    D = _direction(R, moments, step=step, constants=constants)
    with watch():
        way = Way(projector, projector.read(bases), last)
        # Clipping would scale G and R alike, so the lift gets both unclipped.
        lifted = lift.function(D, raw, G, way)
    lr, shrink = _step_size(R, moments, step=step, alignment=alignment)
    if lr is None:
        return
    direction, phi = (factor if factor is None or scale == 1 else factor * scale for factor in lifted)
    for rows in _product_chunks(weight) if projector.sides else [slice(None)]:
        with watch():
            U = _update_of(rows, direction, phi, G, way)
        if rule.finish is not None:  # after the scale, as in the reference: a sign does not depend on it
            U = rule.finish(U)
        part = weight.rows(rows)
        with _unless_bad(list(part.parts.values()), finite):
            values = _add_(part.read(R.dtype) * shrink, U, factor=-lr)
            part.write(values, seed=step.seed)
            if constants.absorbs:
                _absorb(values - part.read(R.dtype), moments, lr=lr, step=step, constants=constants)


def _step_size(
    R: Tensor, moments: Sequence[Moment], *, step: StepValues, alignment: Tensor | None
) -> tuple[float | Tensor | None, float | Tensor]:
    """The step size and the factor on the weight, multiplied by the alignment if there is one, which is updated."""
    lr, shrink = step.lr, step.shrink
    if alignment is not None:
        f = align(R, moments[0], alignment)
        lr, shrink = None if lr is None else lr * f, 1 - (1 - shrink) * f
    return lr, shrink


def _absorb(
    error: Tensor, moments: Sequence[Moment], *, lr: float | Tensor, step: StepValues, constants: UpdateConstants
) -> None:
    """The rule takes the rounding error of the weight, of which the moments are, into the first moment."""
    assert constants.rule.absorb is not None
    constants.rule.absorb(
        error.reshape(moments[0].stored.shape), *moments, beta1=constants.betas[0], eps=constants.eps, mass=step.mass,
        mass_sq=step.mass_sq, lr=lr * constants.scale,
    )  # fmt: skip


def _product_chunks(weight: Stored) -> Iterator[slice]:
    """Ranges of rows of a weight for which the product with the basis is made at once."""
    multiple = PRODUCT_ROWS if on_cpu(weight.device) else 1
    return row_chunks(*weight.shape, device=weight.device, multiple=multiple)


def _direction(R: Tensor, moments: Sequence[Moment], *, step: StepValues, constants: UpdateConstants) -> Tensor:
    """The rule's direction for R, made a few rows at a time where the rule allows it."""
    rule, (beta1, beta2) = constants.rule, constants.betas
    keywords: dict[str, Any] = dict(
        beta1=beta1, beta2=beta2 if step.beta2 is None else step.beta2, eps=constants.eps, mass=step.mass,
        mass_sq=step.mass_sq,
    )  # fmt: skip
    shape = R.shape
    if rule.separable == "elements" and moments:
        R = R.reshape(moments[0].stored.shape)
    chunks = list(_chunks(R, moments)) if rule.separable and R.ndim == 2 else []
    if len(chunks) < 2:
        return rule.direction(R, *moments, **keywords).view(shape)
    D = R if constants.spends else torch.empty_like(R)
    for rows in chunks:
        D[rows] = rule.direction(R[rows], *(moment.rows(rows) for moment in moments), **keywords)
    return D.view(shape)


def _update_of(rows: slice, D: Tensor | None, phi: Tensor | None, G: Tensor | None, way: Way) -> Tensor:
    """Some rows of U = back(D) + phi * G, see rules.lifts."""
    back = None if D is None else way.back(D, rows)
    if phi is None:
        assert back is not None
        return back
    assert G is not None
    G, phi = G[rows].to(phi.dtype), phi[rows] if phi.ndim == 2 and phi.shape[0] > 1 else phi
    return G * phi if back is None else back.addcmul_(G, phi)


def _add_(x: Tensor, y: Tensor, *, factor: float | Tensor) -> Tensor:
    """x += factor * y; `alpha` takes Python numbers only."""
    return x.add_(y * factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)
