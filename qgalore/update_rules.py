"""From a gradient to a direction: free functions on moments.

A rule does not know whether its gradient is a whole matrix or lives in a subspace, nor in how many bits its moments are
kept, and never touches a parameter. Moments are updated in place; the caller scales the direction by -lr.
"""

from torch import Tensor

from qgalore.blockwise_state import Moment


def adam_direction(
    R: Tensor,
    M: Moment,
    V: Moment,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    mass: float | Tensor,
    mass_sq: float | Tensor,
) -> Tensor:
    """Adam's direction for a (low-rank) gradient.

    R: gradient, any shape, float32 or float64.  M, V: its first and second moment, same shape, updated in place.
    mass, mass_sq: the sums of the weights that these two averages hold after this update; 1 - beta**t at update t,
        unless a reset has taken them away.  Returns the direction, R's shape and dtype.
    Source: Kingma and Ba 2015, algorithm 1 (its bias correction is the division by the mass).
    """
    m = M.dequantize().lerp_(R, 1 - beta1)
    v = V.dequantize().mul_(beta2).addcmul_(R, R, value=1 - beta2)
    M.copy_(m)
    V.copy_(v)
    return (m / mass).div_((v / mass_sq).sqrt_().add_(eps))
