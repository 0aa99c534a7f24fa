"""Sums of gradients over data-parallel ranks, without a wrapper around the model.

The loss of every rank is divided by the target tokens of all of them, so gradients are summed, not averaged. Each rank
gets the same bits, and therefore the same weights.
"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


class GradSync:
    """Sums tensors over the ranks of a process group.

    at_rank_size: whether the optimizer sums each gradient itself, where it can in its subspace, so that r numbers
        travel instead of n; otherwise whole gradients are summed before the step, as clipping by their norm needs.
    group: the process group; None for the default one. With one process nothing is ever sent.
    """

    def __init__(self, *, at_rank_size: bool = True, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        self.at_rank_size = parallel and at_rank_size
        self._in_full = parallel and not at_rank_size

    def reduce_whole(self, gradients: Iterable[Tensor]) -> None:
        """Sums whole gradients in place over the ranks; does nothing where the optimizer does it at rank size."""
        if self._in_full:
            pending = [dist.all_reduce(gradient, group=self.group, async_op=True) for gradient in gradients]
            for work in pending:
                work.wait()

    def reduce(self, tensor: Tensor) -> Tensor:
        """What an optimizer is about to use, a gradient whole or in its subspace, summed over the ranks where the
        optimizer does that; elsewhere the tensor as it is. May write in place."""
        if self.at_rank_size:
            tensor = tensor.contiguous()
            dist.all_reduce(tensor, group=self.group)
        return tensor
