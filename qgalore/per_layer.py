"""Updates inside backward: each parameter is updated, and its gradient freed, as soon as the gradient is complete.

So only one layer's gradients exist at a time. With several micro-batches to an update, a gradient is complete with the
last one; until then its projection is summed, at rank size. Some gradients are summed in full:

- those of parameters that are not projected,
- that of a matrix whose refresh is due in this update; refreshes are staggered, so there are few of them,
- those of all matrices, if bases learn by online PCA or the lift needs the whole gradient.

In the first update every matrix is due: its first basis comes from the first micro-batch alone. Random bases are drawn
before the first micro-batch, so they need no sums in full.

Schedules, refreshes and bias corrections count updates, never micro-batches.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from qgalore.optimizer import LowRankOptimizer
from qgalore.outcome import Outcome
from qgalore.sums import HostSums, Sums


class PerLayerUpdates:
    """Drives a LowRankOptimizer from post-accumulate-grad hooks, which it registers on all of its parameters.

    An update ends with `finish`, or with the optimizer's `step`, so that it runs in loops that know torch.optim only:
    a Trainer, accelerate, Lightning. `step` may come before the last micro-batch, as at the end of an epoch: what has
    been summed until then is applied. Whatever drove one of the parameters before is removed.
    """

    norm_of = "all gradients as projected"

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        *,
        accumulation: int = 1,
        dtype: torch.dtype | None = None,
        clip: float = 0.0,
        on_host: bool = False,
    ) -> None:
        """
        accumulation: number of micro-batches, each a backward pass, in an update.
        dtype: dtype of the sums over micro-batches; None for the dtype of the parameter.
        clip: maximum norm of each parameter's own projected gradient; 0 for no limit. The norm of all gradients is not
            known before the last one, when the first ones are freed.
        on_host: whether the sums over micro-batches are kept in host memory.
        """
        self.optimizer, self.accumulation, self.dtype = optimizer, accumulation, dtype
        self._seen = dict.fromkeys(optimizer.updates, 0)
        self._whole: dict[Tensor, bool] = {}  # whether the gradient of a parameter is summed in full
        self.sums = HostSums() if on_host else Sums()
        for group in optimizer.param_groups:
            group["clip"] = clip
        release(optimizer.updates)
        optimizer.flush = self._flush
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in optimizer.updates]

    def finish(self) -> Outcome:
        """Ends the update; call it after the last backward. The outcome's norm is that of all projected gradients."""
        late = [seen for seen in self._seen.values() if 0 < seen < self.accumulation]
        if late:
            raise RuntimeError(
                f"{len(late)} parameters have seen {late[0]} of {self.accumulation} micro-batches: finish() ends an "
                "update, after its last backward"
            )
        self._flush()
        return self.optimizer.end_update()

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        self.optimizer.flush = None
        for hook in self._hooks:
            hook.remove()

    def _flush(self) -> None:
        """Applies what has been summed, and counts micro-batches from the beginning."""
        for p in list(self.sums):
            self._apply(p)
        self._seen = dict.fromkeys(self._seen, 0)

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        self._seen[p] += 1
        if self._seen[p] > self.accumulation:
            raise RuntimeError(
                f"an update has {self.accumulation} backward passes here, and this is one more: raise the "
                "accumulation, or call finish() of the PerLayerUpdates or optimizer.step() after the last one"
            )
        assert p.grad is not None
        if self.accumulation == 1:
            self.optimizer.updates[p].update(p.grad)
        else:
            self._accumulate(p, p.grad, first=self._seen[p] == 1, last=self._seen[p] == self.accumulation)
        p.grad = None

    def _accumulate(self, p: Tensor, G: Tensor, *, first: bool, last: bool) -> None:
        """Adds the gradient of one micro-batch, projected if possible. The last one updates the parameter."""
        update = self.optimizer.updates[p]
        if first:
            self._whole[p] = update.begin_from(G)
        whole = self._whole[p]
        part = (G if whole else update.project(G)).to(self.dtype or p.dtype)
        if last:
            self._apply(p, part)
        else:
            self.sums.add(p, part)

    def _apply(self, p: Tensor, last: Tensor | None = None) -> None:
        """Updates the parameter from its sum. last: what has not been added to it yet."""
        total = self.sums.take(p)
        update, total = (
            self.optimizer.updates[p],
            self.optimizer.sync.reduce(total if last is None else total.add_(last)),
        )
        if self._whole[p]:
            update.update_whole(total)
        else:
            update.apply(total.to(torch.promote_types(total.dtype, torch.float32)))


def release(parameters: Iterable[Tensor]) -> None:
    """Removes every PerLayerUpdates that drives one of the parameters, of an earlier optimizer for example."""
    hooks = [hook for p in parameters for hook in (p._post_accumulate_grad_hooks or {}).values()]  # type: ignore[attr-defined]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    for updates in {owner for owner in owners if isinstance(owner, PerLayerUpdates)}:
        updates.remove()
