"""From a gradient to a direction: free functions on plain tensors.

A rule does not know whether its gradient is a whole matrix or lives in a subspace, and never touches a parameter.
Moments are updated in place; the caller scales the direction by -lr.
"""

from torch import Tensor


def adam_direction(
    R: Tensor, M: Tensor, V: Tensor, *, beta1: float, beta2: float, eps: float, mass: float, mass_sq: float
) -> Tensor:
    """Adam's direction for a (low-rank) gradient.

    R: gradient, any shape, float32 or float64.  M, V: its first and second moment, same shape, updated in place.
    mass, mass_sq: the sums of the weights that these two averages hold after this update; 1 - beta**t at update t,
        unless a refresh of the basis has taken something away.  Returns the direction, R's shape and dtype.
    Source: Kingma and Ba 2015, algorithm 1 (its bias correction is the division by the mass).
    """
    M.lerp_(R, 1 - beta1)
    V.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    denominator = (V / mass_sq).sqrt_().add_(eps)
    return (M / mass).div_(denominator)
