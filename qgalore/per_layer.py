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

    accumulation: micro-batches, so backward passes, to an update.
    dtype: of the sums over micro-batches; None for the parameter's.
    clip: maximum norm of each parameter's own projected gradient; 0 for no limit. The global norm is not known before
        the last gradient, when the first ones are long gone.
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
        self._seen = dict.fromkeys(optimizer.updates, 0)
        self._whole: dict[Tensor, bool] = {}  # of parameters that accumulate: whether in full
        self.sums: dict[Tensor, Tensor] = {}  # of parameters between their first and last micro-batch
        for group in optimizer.param_groups:
            group["clip"] = clip
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in optimizer.updates]

    def finish(self) -> Outcome:
        """Ends the update; call it after the last backward. The norm is that of all projected gradients."""
        late = [seen for seen in self._seen.values() if 0 < seen < self.accumulation]
        if late:
            raise RuntimeError(
                f"{len(late)} parameters have seen {late[0]} of {self.accumulation} micro-batches: finish() ends an "
                "update, after its last backward"
            )
        self._seen = dict.fromkeys(self._seen, 0)
        return self.optimizer.end_update()

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        self._seen[p] += 1
        if self._seen[p] > self.accumulation:
            raise RuntimeError(
                f"an update has {self.accumulation} backward passes here, and this is one more: after the last one, "
                "call finish() of the PerLayerUpdates in place of optimizer.step(), or remove() to do without them"
            )
        assert p.grad is not None
        if self.accumulation == 1:
            self.optimizer.updates[p].update(p.grad)
        else:
            self._accumulate(p, p.grad, first=self._seen[p] == 1, last=self._seen[p] == self.accumulation)
        p.grad = None

    def _accumulate(self, p: Tensor, G: Tensor, *, first: bool, last: bool) -> None:
        """Adds one micro-batch, projected where it can be; with the last one, updates the parameter."""
        update = self.optimizer.updates[p]
        if first:
            self._whole[p] = update.begin_from(G)
        whole = self._whole[p]
        part = (G if whole else update.project(G)).to(self.dtype or p.dtype)
        self.sums[p] = part if first else self.sums[p].add_(part)
        if last:
            total = self.optimizer.sync.reduce(self.sums.pop(p))
            if whole:
                update.update_whole(total)
            else:
                update.apply(total.to(torch.promote_types(total.dtype, torch.float32)))
