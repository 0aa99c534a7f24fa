"""Updates after backward, when all gradients exist: they are summed over the ranks, clipped and applied."""

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from qgalore.optimizer import LowRankOptimizer
from qgalore.outcome import Outcome
from qgalore.sync import GradSync


class WholeModelUpdates:
    """One optimizer step for each update. The gradients of micro-batches add up in p.grad."""

    norm_of = "all gradients"
    sums: dict[Tensor, Tensor] = {}  # sums beside p.grad: none

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        sync: GradSync,
        clip: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        sync: sums gradients over the ranks.
        clip: maximum norm of all gradients together; 0 for no limit. It needs whole gradients, see GradSync.
        dtype: dtype of the sums over micro-batches; None for the dtype of the parameter.
        """
        assert not (clip and sync.at_rank_size)
        self.optimizer, self.sync, self.clip = optimizer, sync, clip
        if sync.at_rank_size:
            self.norm_of = "all gradients as projected"
        if dtype is not None:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad_dtype = dtype

    def finish(self) -> Outcome:
        """Does the update and frees the gradients. Skips the update if a gradient of any rank is not finite."""
        gradients = {p: p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None}
        self.sync.reduce_whole(gradients.values())
        norms = {
            p: torch.linalg.vector_norm(G, dtype=torch.promote_types(G.dtype, torch.float32))
            for p, G in gradients.items()
        }
        if self.sync.at_rank_size:  # whole gradients differ from rank to rank: only the optimizer sees the sums
            outcome = self._step_at_rank_size(norms)
        else:
            outcome = self._step(norms)
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _step(self, norms: dict[Tensor, Tensor]) -> Outcome:
        outcome = Outcome.of(norms)
        if not outcome.bad:
            if self.clip:
                clip_grads_with_norm_(norms, self.clip, torch.tensor(outcome.norm))
            self.optimizer.step()
        return outcome

    def _step_at_rank_size(self, norms: dict[Tensor, Tensor]) -> Outcome:
        """norms: of this rank's own gradients."""
        assert isinstance(self.optimizer, LowRankOptimizer)
        stacked = torch.stack(list(norms.values()))
        summed = Outcome.of(dict(zip(norms, self.sync.reduce(stacked), strict=True)))
        if summed.bad:
            return summed
        self.optimizer.step()
        return self.optimizer.end_update()
