"""Rules: free functions from a gradient to a direction, and their table.

A rule does not know whether its gradient is a whole matrix or projected, nor in how many bits its moments are kept, and
it never touches a parameter. Moments are updated in place; the caller scales the direction by -lr.
Every rule takes the same keywords:

    beta1, beta2    decay rates of the first and the second moment
    eps             added to Adam's divisor
    mass, mass_sq   the sums of the weights that first and second moments hold after this update: 1 - beta**t at update
                    t, unless a reset has taken them away. Dividing by them is Adam's bias correction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from qgalore.rules.moments import Moment, MomentKind

Number = float | Tensor

ADAFACTOR_EPS = 1e-30  # added to squares, so that rows and columns of zeros divide nothing by zero


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    direction: Callable[..., Tensor]  # (gradient, *moments, **keywords) -> direction, see above
    moments: Callable[
        [torch.Size], tuple[MomentKind, ...]
    ]  # moments for a shape, in the order of direction's arguments
    betas: tuple[float, float] = (0.9, 0.999)  # usual decay rates
    decay: Callable[[int], float] | None = None  # decay rate of the second moment at update t, if it is not beta2
    finish: Callable[[Tensor], Tensor] | None = None  # last step, in the full space
    gain: Callable[[torch.Size], float] = lambda shape: 1.0  # factor on the update, by the shape of the whole gradient
    matrices_only: bool = False  # whether vectors are refused
    absorb: Callable[..., None] | None = None  # takes a rounding error of the weight into the first moment
    separable: Literal["elements", "rows"] | None = None  # what can be updated one after the other; None: the whole


def adam_direction(
    R: Tensor, M: Moment, V: Moment, *, beta1: float, beta2: float, eps: float, mass: Number, mass_sq: Number
) -> Tensor:
    """Adam's direction for a (low-rank) gradient.

    R: gradient, any shape, float32 or float64.
    M, V: its first and second moment, same shape, updated in place.
    Returns the direction, R's shape and dtype. Source: Kingma and Ba 2015, algorithm 1.
    """
    m = M.read().lerp_(R, 1 - beta1)
    v = V.read().mul_(beta2).addcmul_(R, R, value=1 - beta2)
    M.write(m)
    V.write(v)
    return (m / mass).div_((v / mass_sq).sqrt_().add_(eps))


def adam_absorb(
    e: Tensor, M: Moment, V: Moment, *, beta1: float, eps: float, mass: Number, mass_sq: Number, lr: Number
) -> None:
    """Takes the rounding error of a weight into Adam's first moment, which gives it to later updates.

        m <- m + (1 - 1 / beta1) (sqrt(v^) + eps) mass / lr * e          v^ = v / mass_sq

    e: what the weight should be, minus what it is, M's shape, float32 or float64.
    M, V: the moments after this update; M is updated in place.
    lr: the step size, above 0; with the factor on the update.
    An error adds (1 - beta1) e to the next update, beta1 times that to the one after, and e to all of them together.
    Source: Nikdan et al. 2026, "ECO", arXiv 2601.22101: the error of the last update is taken for that of this one, so
    that it need not be kept.
    """
    divisor = (V.read() / mass_sq).sqrt_().add_(eps)
    M.write(M.read().add_(e * divisor * (mass * (1 - 1 / beta1) / lr)))


def lion_direction(R: Tensor, M: Moment, *, beta1: float, beta2: float, **unused: Any) -> Tensor:
    """Lion's direction before its sign, which is taken in the full space: see RULES.

    R: gradient, any shape.
    M: its momentum, same shape, updated in place: interpolated with beta1, kept with beta2.
    Source: Chen et al. 2023, arXiv 2302.06675, algorithm 2; the sign as in Liang et al. 2024, arXiv 2408.12857.
    """
    m = M.read()
    D = torch.lerp(R, m, beta1)
    M.write(m.lerp_(R, 1 - beta2))
    return D


def adafactor_direction(R: Tensor, M: Moment, *V: Moment, beta1: float, beta2: Number, mass: Number, mass_sq: Number,
                        **unused: Any) -> Tensor:  # fmt: skip
    """Adafactor's direction, without its relative step size: the learning rate is given.

    R: gradient.
    M: the average of the directions, clipped to a root mean square of 1; same shape as R.
    V: the mean squares of its rows (m,) and of its columns (n,), where it is a matrix (m, n); else one second moment of
        its shape.
    Source: Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5. The paper has no first moment; GaLore averages
    the clipped directions with beta1, and so does this, corrected for its bias as Adam's is.
    """
    squares = (R * R).add_(ADAFACTOR_EPS)
    fresh = (squares.mean(-1), squares.mean(-2)) if len(V) == 2 else (squares,)
    v = [kept.read().mul_(beta2).add_(new * (1 - beta2)) for kept, new in zip(V, fresh, strict=True)]
    for kept, new in zip(V, v, strict=True):
        kept.write(new)
    if len(v) == 2:
        row, column = v
        D = R * (row / row.mean()).rsqrt_().unsqueeze(-1) * (column / mass_sq).rsqrt_()
    else:
        D = R * (v[0] / mass_sq).rsqrt_()
    D = D / D.square().mean().sqrt_().clamp_(min=1)
    m = M.read().lerp_(D, 1 - beta1)
    M.write(m)
    return m / mass


def sgd_direction(R: Tensor, M: Moment, *, beta1: float, **unused: Any) -> Tensor:
    """Gradient descent with momentum beta1, as torch.optim.SGD has it. M: of R's shape, updated in place."""
    m = M.read().mul_(beta1).add_(R)
    M.write(m)
    return m.clone()


def descent_direction(R: Tensor, **unused: Any) -> Tensor:
    """Gradient descent: the gradient itself."""
    return R.clone()


def muon_direction(R: Tensor, M: Moment, *, beta1: float, **unused: Any) -> Tensor:
    """Muon's direction: the momentum with its singular values made one, as far as five Newton-Schulz steps go.

    R: gradient (m, n). M: its momentum, updated in place; Nesterov's look-ahead goes in.
    Of a projected gradient it is Muon in the subspace: P O has the singular values of O.
    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
    """
    m = M.read().mul_(beta1).add_(R)
    M.write(m)
    return orthogonalize(R + beta1 * m)


def muon_gain(shape: torch.Size) -> float:
    """0.2 sqrt(max(m, n)): the elements of a full-rank update then have the size that Adam's have.

    Source: Liu et al. 2025, arXiv 2502.16982, section 2.2.
    """
    return 0.2 * max(shape) ** 0.5


def orthogonalize(X: Tensor, *, steps: int = 5) -> Tensor:
    """Nearly U V^T of X = U S V^T, by the quintic iteration of Jordan et al. 2024. (m, n) -> (m, n)"""
    if X.shape[0] > X.shape[1]:
        return orthogonalize(X.mT, steps=steps).mT
    X = X / (torch.linalg.matrix_norm(X) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def normalized_direction(R: Tensor, *M: Moment, beta1: float, dim: int = 1, **unused: Any) -> Tensor:
    """The gradient (m, n), or its momentum if M is given, with the root mean square of each output made one.

    dim: the dimension of the inputs, 0 for an embedding (vocabulary, hidden), 1 for a linear layer (out, in).
    Source: Glentis et al. 2025, "SCALE", arXiv 2506.16659, algorithm 1, whose matrices are (in, out).
    """
    for moment in M:
        R = moment.read().lerp_(R, 1 - beta1)
        moment.write(R)
    return R / R.square().mean(dim, keepdim=True).sqrt_().clamp_min_(1e-8)


def foam_direction(
    R: Tensor, M: Moment, V: Moment, *, beta1: float, beta2: float, eps: float, mass: Number, mass_sq: Number
) -> Tensor:
    """FOAM's direction: Adam's moments of block means, and what the means leave out put back.

        (m^ E + R) / (sqrt(v^ E + R^2) + eps)      R = G - g E, g the block means of G, v of G^2; E repeats

    R: the gradient G above, (m, n), float32 or float64.
    M, V: moments (m, n / f) of its blocks of f along the rows, updated in place; see _blocks.
    Source: "FOAM", arXiv 2512.07112, algorithm 1.
    """
    f = R.shape[1] // M.stored.shape[1]
    blocks = R.unflatten(1, (-1, f))  # (m, n / f, f)
    mean = blocks.mean(-1)
    m = M.read().lerp_(mean, 1 - beta1)
    v = V.read().mul_(beta2).add_(blocks.square().mean(-1), alpha=1 - beta2)
    M.write(m)
    V.write(v)
    rest = blocks - mean.unsqueeze(-1)
    spread = ((v / mass_sq).unsqueeze(-1) + rest.square()).sqrt_().add_(eps)
    return ((m / mass).unsqueeze(-1) + rest).div_(spread).flatten(1)


def _blocks(shape: torch.Size, *, level: int) -> tuple[MomentKind, ...]:
    """Moments of blocks of 2**level elements, or of fewer where a row has no more factors of two."""
    return _first_and_second(torch.Size((shape[0], shape[1] // math.gcd(shape[1], 2**level))))


def _first(shape: torch.Size) -> tuple[MomentKind, ...]:
    return (MomentKind("exp_avg", True, shape),)


def _first_and_second(shape: torch.Size) -> tuple[MomentKind, ...]:
    return (*_first(shape), MomentKind("exp_avg_sq", False, shape))


def _first_and_factors(shape: torch.Size) -> tuple[MomentKind, ...]:
    if len(shape) != 2:
        return _first_and_second(shape)
    factors = (
        MomentKind("exp_avg_sq_row", False, torch.Size(shape[:1])),
        MomentKind("exp_avg_sq_col", False, torch.Size(shape[1:])),
    )
    return (*_first(shape), *factors)


RULES = {
    "adam": Rule(adam_direction, _first_and_second, absorb=adam_absorb, separable="elements"),
    "lion": Rule(lion_direction, _first, betas=(0.9, 0.99), finish=torch.sign, separable="elements"),
    "adafactor": Rule(adafactor_direction, _first_and_factors, decay=lambda t: 1 - t**-0.8),
    "muon": Rule(muon_direction, _first, betas=(0.95, 0.0), gain=muon_gain, matrices_only=True),
    "scale": Rule(normalized_direction, lambda shape: (), matrices_only=True, separable="rows"),
    "scale_embedding": Rule(partial(normalized_direction, dim=0), lambda shape: (), matrices_only=True),
    "scale_head": Rule(normalized_direction, _first, matrices_only=True, separable="rows"),
    "foam": Rule(foam_direction, partial(_blocks, level=2), betas=(0.9, 0.95), matrices_only=True, separable="rows"),
    "foam3": Rule(foam_direction, partial(_blocks, level=3), betas=(0.9, 0.95), matrices_only=True, separable="rows"),
    "sgd": Rule(sgd_direction, _first, separable="elements"),
    "descent": Rule(descent_direction, lambda shape: (), separable="elements"),
}
