"""Updates inside backward: each parameter as soon as its gradient is complete, and the gradient is freed at once.

So only one layer's gradients exist at a time. With several micro-batches to an update the gradient is not complete
before the last one; until then its projection is accumulated, at rank size. The exceptions accumulate in full: those
that are not projected, and a matrix whose refresh is due, for that one update. Refreshes are staggered, so they are
few. At the first update every matrix is due; its first basis comes from the first micro-batch alone. Random bases are
drawn before the first micro-batch, so nothing projected by them ever accumulates in full. Bases that learn by online
PCA, and residuals that are recovered, need the whole gradient of every update: then every matrix accumulates in full.

The clock is the update: schedules, refreshes and bias corrections count updates, never micro-batches.
"""

import torch
from torch import Tensor

from qgalore.optimizer import LowRankOptimizer
from qgalore.outcome import Outcome


class PerLayerUpdates:
    """Drives a LowRankOptimizer from post-accumulate-grad hooks, which it registers on all of its parameters.

    accumulation: micro-batches, so backward passes, to an update.  dtype: of the sums over micro-batches, None for the
    parameter's.  clip: largest norm of each parameter's own projected gradient, 0 for no limit: the global norm is not
    known before the last gradient, when the first ones are long gone.
    """

    norm_of = "all gradients as projected"

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        *,
        accumulation: int = 1,
        dtype: torch.dtype | None = None,
        clip: float = 0.0,
    ) -> None:
        self.optimizer, self.accumulation, self.dtype = optimizer, accumulation, dtype
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._seen = dict.fromkeys(self._groups, 0)
        self.sums: dict[Tensor, Tensor] = {}  # of parameters between their first and last micro-batch
        for group in optimizer.param_groups:
            group["clip"] = clip
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in self._groups]

    def finish(self) -> Outcome:
        """Ends the update; call it after the last backward. The norm is that of all projected gradients."""
        late = sum(0 < seen < self.accumulation for seen in self._seen.values())
        assert not late, f"{late} parameters are still waiting for a micro-batch"
        self._seen = dict.fromkeys(self._seen, 0)
        return self.optimizer.end_update()

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        self._seen[p] += 1
        assert self._seen[p] <= self.accumulation, "more backward passes than micro-batches to an update"
        if self.accumulation == 1:
            self.optimizer.update_parameter(p, self._groups[p])
        else:
            self._accumulate(p, first=self._seen[p] == 1, last=self._seen[p] == self.accumulation)
        p.grad = None

    def _accumulate(self, p: Tensor, *, first: bool, last: bool) -> None:
        """Adds one micro-batch, projected where it can be; with the last one, updates the parameter."""
        optimizer, group, G = self.optimizer, self._groups[p], p.grad
        assert G is not None
        if first and optimizer.awaits_first_basis(p):
            optimizer.refresh(p, group, optimizer.sync.sum(G.clone()))
        whole = optimizer.needs_whole_gradient(p)
        if first and not whole:
            optimizer.refresh(p, group, G)  # a random basis, if one is due
        part = (G if whole else optimizer.project(p, G)).to(self.dtype or p.dtype)
        self.sums[p] = part if first else self.sums[p].add_(part)
        if last:
            total = optimizer.sync.sum(self.sums.pop(p))
            if whole:
                optimizer.update_from_whole(p, group, total)
            else:
                optimizer.apply(p, group, total.to(torch.promote_types(total.dtype, torch.float32)))
