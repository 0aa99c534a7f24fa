"""Sums of gradients over data-parallel ranks, without a wrapper around the model.

The loss of every rank is divided by the target tokens of all ranks, so gradients are summed, not averaged. Every rank
gets the same bits, and therefore the same weights.
"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


class GradSync:
    """Sums tensors over the ranks of a process group.

    With one process, nothing is sent.
    """

    def __init__(self, *, at_rank_size: bool = True, group: dist.ProcessGroup | None = None) -> None:
        """
        at_rank_size: whether the optimizer sums each gradient itself, in its subspace if it can, so that r numbers
            travel instead of n. Otherwise whole gradients are summed before the step, as clipping by their norm needs.
        group: the process group; None for the default one.
        """
        self.group = group
        parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        self.at_rank_size = parallel and at_rank_size
        self._in_full = parallel and not at_rank_size

    def reduce_whole(self, gradients: Iterable[Tensor]) -> None:
        """Sums whole gradients over the ranks, in place. Does nothing if the optimizer sums at rank size."""
        if self._in_full:
            pending = [dist.all_reduce(gradient, group=self.group, async_op=True) for gradient in gradients]
            for work in pending:
                work.wait()

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sums a gradient that an optimizer is about to use, whole or projected, over the ranks. May write in place.

        Returns the tensor as it is unless the optimizer sums at rank size.
        """
        if self.at_rank_size:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, group=self.group)
        return tensor
