"""The update after backward, when all gradients exist: summed over the ranks, clipped by their global norm, applied."""

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from qgalore.grad_sync import GradSync
from qgalore.low_rank_optimizer import LowRankOptimizer


class WholeModelUpdates:
    """One optimizer step an update. Gradients of micro-batches add up in p.grad, as autograd does.

    clip: largest global norm of the gradients, 0 for no limit; it needs whole gradients (GradSync.at_rank_size off).
    """

    norm_of = "all gradients"
    sums: dict[Tensor, Tensor] = {}  # none beside p.grad

    def __init__(self, optimizer: torch.optim.Optimizer, *, sync: GradSync, clip: float = 0.0) -> None:
        assert not (clip and sync.at_rank_size)
        self.optimizer, self.sync, self.clip = optimizer, sync, clip
        if sync.at_rank_size:
            self.norm_of = "all gradients as projected"

    def finish(self) -> Tensor:
        """Does the update and frees the gradients. Returns their norm before clipping. ()"""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        self.sync.sum_whole(gradients)
        if self.sync.at_rank_size:  # whole gradients differ from rank to rank: only the optimizer sees the sums
            assert isinstance(self.optimizer, LowRankOptimizer)
            self.optimizer.step()
            norm = self.optimizer.take_norm()
        else:
            norm = torch.stack([torch.linalg.vector_norm(G, dtype=torch.float32) for G in gradients]).norm()
            if self.clip:
                clip_grads_with_norm_(parameters, self.clip, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
