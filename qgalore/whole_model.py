"""Updates after backward, when all gradients exist: they are summed over the ranks, clipped and applied."""

from collections.abc import Iterable

import torch
from torch import Tensor

from qgalore.optimizer import LowRankOptimizer
from qgalore.outcome import Outcome
from qgalore.sharding import local, shard_of
from qgalore.sync import GradSync


class WholeModelUpdates:
    """One optimizer step for each update. The gradients of micro-batches add up in p.grad.

    With several ranks, hooks send each gradient as soon as the last micro-batch has completed it, while backward goes
    on: projected, if the optimizer sums at rank size, and p.grad is then freed.
    """

    norm_of = "all gradients"
    sums: dict[Tensor, Tensor] = {}  # sums beside p.grad: none

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        sync: GradSync,
        accumulation: int = 1,
        clip: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        sync: sums gradients over the ranks.
        accumulation: number of micro-batches, each a backward pass, in an update.
        clip: maximum norm of all gradients together; 0 for no limit. It needs whole gradients, see GradSync.
        dtype: dtype of the sums over micro-batches; None for the dtype of the parameter.
        """
        assert not (clip and sync.at_rank_size)
        self.optimizer, self.sync, self.accumulation, self.clip = optimizer, sync, accumulation, clip
        if sync.at_rank_size:
            self.norm_of = "all gradients as projected"
        self._seen = {p: 0 for group in optimizer.param_groups for p in group["params"]}
        self._totals: dict[Tensor, Tensor] = {}  # sums over the ranks that have arrived
        self._shard = next((shard for shard in map(shard_of, self._seen) if shard is not None), None)
        self._exchange = sync.exchange(self._seen, inside=False)
        for p in self._seen:
            if dtype is not None:
                p.grad_dtype = dtype
            if sync.parallel:
                p.register_post_accumulate_grad_hook(self._on_gradient)

    @torch.no_grad()
    def finish(self) -> Outcome:
        """Does the update and frees the gradients. Skips the update if the sum of a gradient is not finite."""
        if self.sync.parallel:
            self._finish_exchange()
        outcome = self._complete() if self.sync.at_rank_size else self._step()
        self.optimizer.zero_grad(set_to_none=True)
        self._totals.clear()
        return outcome

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        self._seen[p] += 1
        if self._seen[p] > self.accumulation:
            raise RuntimeError(
                f"an update has {self.accumulation} backward passes here, and this is one more: raise the "
                "accumulation, or call finish() after the last one"
            )
        if self._seen[p] == self.accumulation:
            self._send(p)

    def _send(self, p: Tensor) -> None:
        self._totals.update(self._exchange.send(p, self._part(p)))

    def _part(self, p: Tensor) -> Tensor:
        """What this rank gives to the sum; zeros if it has no gradient."""
        G = torch.zeros(p.shape, dtype=p.grad_dtype or p.dtype, device=p.device) if p.grad is None else p.grad
        if not self.sync.at_rank_size:
            return G
        p.grad = None
        assert isinstance(self.optimizer, LowRankOptimizer)
        return self.optimizer.updates[p].prepare(G)

    def _finish_exchange(self) -> None:
        for p, seen in self._seen.items():
            if p.grad is not None and seen < self.accumulation:  # an update of fewer micro-batches, or without hooks
                self._send(p)
        self._totals.update(self._exchange.finish(self._part))
        self._seen = dict.fromkeys(self._seen, 0)
        if not self.sync.at_rank_size:
            for p, total in self._totals.items():
                p.grad = total

    def _step(self) -> Outcome:
        gradients = {p: local(p.grad) for p in self._seen if p.grad is not None}
        outcome = Outcome.of(_norms(gradients.items()), shard=self._shard)
        if not outcome.bad:
            if self.clip:
                factor = (self.clip / (torch.tensor(outcome.norm) + 1e-6)).clamp(max=1)
                for G in gradients.values():
                    G.mul_(factor)
            self.optimizer.step()
        return outcome

    def _complete(self) -> Outcome:
        """The step at rank size, from the sums over the ranks."""
        assert isinstance(self.optimizer, LowRankOptimizer)
        outcome = Outcome.of(_norms(self._totals.items()))
        if outcome.bad:
            for p in self._totals:
                self.optimizer.updates[p].undo()
            return outcome
        self.optimizer.complete((p, self._totals[p]) for p in self._seen if p in self._totals)
        return self.optimizer.end_update()


def _norms(gradients: Iterable[tuple[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
    return {p: torch.linalg.vector_norm(G, dtype=torch.promote_types(G.dtype, torch.float32)) for p, G in gradients}
