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

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from qgalore.factored import free
from qgalore.optimizer import LowRankOptimizer
from qgalore.outcome import Outcome
from qgalore.sharding import local
from qgalore.sums import HostSums, Sums
from qgalore.sync import Exchange


class PerLayerUpdates:
    """Drives a LowRankOptimizer from post-accumulate-grad hooks, which it registers on all of its parameters.

    An update ends with `finish`, or with the optimizer's `step`, so that it runs in loops that know torch.optim only:
    a Trainer, accelerate, Lightning. `step` may come before the last micro-batch, as at the end of an epoch: what has
    been summed until then is applied. Whatever drove one of the parameters before is removed.
    """

    norm_of = "all gradients as projected"
    takes_products = True  # gradients may come as FactoredGradient

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
        self._begun = self._flushed = False  # whether the update has begun; whether it has been applied
        self.sums = HostSums() if on_host else Sums()
        self._exchange = optimizer.sync.exchange(optimizer.updates, inside=True)
        self._early: Exchange | None = None  # of gradients that first bases are made of, in the first micro-batch
        self._waiting: dict[Tensor, Tensor] = {}  # gradients of the first micro-batch that wait for their bases
        release(optimizer.updates)
        optimizer.flush, optimizer.driven = self._flush, set(optimizer.updates)
        self.clip = clip
        self._set_clip(optimizer)
        self._hooks = [p.register_post_accumulate_grad_hook(_Hook(self)) for p in optimizer.updates]
        self._hooks.append(optimizer.register_load_state_dict_post_hook(self._set_clip))
        for p in optimizer.updates:
            p.takes_product = self.takes_products  # type: ignore[attr-defined]  # see factored.py

    def finish(self) -> Outcome:
        """Ends the update; call it after the last backward. The outcome's norm is that of all projected gradients."""
        late = [seen for seen in self._seen.values() if 0 < seen < self.accumulation]
        if late:
            raise RuntimeError(
                f"{len(late)} parameters have seen {late[0]} of {self.accumulation} micro-batches: finish() ends an "
                "update, after its last backward"
            )
        unseen = sum(p.grad is not None and not seen for p, seen in self._seen.items())
        if unseen:
            raise RuntimeError(
                f"{unseen} parameters have gradients that no hook has seen. model.to() replaces quantized weights, and "
                "their hooks are lost: move and convert the model first, then make the optimizer"
            )
        if not self._flushed:
            self._flush()
        self._flushed = False
        return self.optimizer.end_update()

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        self.optimizer.flush, self.optimizer.driven = None, ()
        for hook in self._hooks:
            hook.remove()
        for p in self.optimizer.updates:
            p.takes_product = False  # type: ignore[attr-defined]
        self.clip = 0.0
        self._set_clip(self.optimizer)

    def _set_clip(self, optimizer: torch.optim.Optimizer) -> None:
        """Also after a state was loaded, whose groups have the limit of another run."""
        for group in optimizer.param_groups:
            group["clip"] = self.clip

    def _flush(self) -> None:
        """Applies what has been summed, and counts micro-batches from the beginning."""
        if not self._begun:
            self._begin()
        self._finish_early()
        for p in list(self.sums):
            self.optimizer.complete(self._exchange.send(p, self.sums.take(p)))
        self.optimizer.complete(self._exchange.finish(self._missing))
        self._seen = dict.fromkeys(self._seen, 0)
        self._flushed, self._begun = True, False

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        self._flushed = False
        if not self._begun:
            self._begin()
        self._seen[p] += 1
        if self._seen[p] > self.accumulation:
            raise RuntimeError(
                f"an update has {self.accumulation} backward passes here, and this is one more: raise the "
                "accumulation, or call finish() of the PerLayerUpdates or optimizer.step() after the last one"
            )
        assert p.grad is not None
        G = local(p.grad)
        part = self.optimizer.updates[p].prepare(G) if self.accumulation == 1 else self._accumulate(p, G)
        if p not in self._waiting:
            free(G)
        if part is not None:
            self.optimizer.complete(self._exchange.send(p, part))
        p.grad = None

    def _accumulate(self, p: Tensor, G: Tensor) -> Tensor | None:
        """Adds the gradient of one micro-batch, projected if possible. Returns the sum if it was the last one."""
        update, first = self.optimizer.updates[p], self._seen[p] == 1
        if not first:
            self._finish_early()
        elif update.begin_early() and self._early is not None:
            self._waiting[p] = G
            self._start(self._early.send(p, G.clone() if self._early.active else G))
            return None
        elif not update.whole:
            update.refresh_if_due(G)
        part = self._part(p, G)
        if self._seen[p] == self.accumulation:
            return self.sums.take(p).add_(part)
        self.sums.add(p, part)
        return None

    def _part(self, p: Tensor, G: Tensor) -> Tensor:
        return self.optimizer.updates[p].part(G).to(self.dtype or p.dtype)

    def _begin(self) -> None:
        """Begins an update, with its first gradient or, on a rank that has none, at its end."""
        self._begun, updates = True, self.optimizer.updates
        if self.accumulation > 1 and not any(update.steps for update in updates.values()):
            starting = (p for p, update in updates.items() if update.starts_early)
            self._early = self.optimizer.sync.exchange(starting, inside=True)

    def _finish_early(self) -> None:
        """Ends the first micro-batch, on every rank before anything else is sent."""
        if self._early is not None:
            early, self._early = self._early, None
            self._start(early.finish(self._missing_early))

    def _start(self, arrived: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Makes first bases of gradients that are summed over the ranks, and adds this rank's own ones."""
        for p, total in arrived:
            self.optimizer.updates[p].start_from(total)
            if p in self._waiting:
                self.sums.add(p, self._part(p, self._waiting.pop(p)))

    def _missing_early(self, p: Tensor) -> Tensor:
        self.optimizer.updates[p].begin_early()
        return torch.zeros(p.shape, dtype=p.dtype, device=p.device)

    def _missing(self, p: Tensor) -> Tensor:
        part = self.optimizer.missing(p)
        return part if self.accumulation == 1 else part.to(self.dtype or p.dtype)


class _Hook:
    """Calls the PerLayerUpdates, which its optimizer keeps alive. A parameter must not: no garbage collector would see
    that a parameter, its hook and the optimizer's state keep each other."""

    def __init__(self, owner: PerLayerUpdates) -> None:
        self.owner = weakref.ref(owner)

    def __call__(self, p: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner._on_gradient(p)


def release(parameters: Iterable[Tensor]) -> None:
    """Removes every PerLayerUpdates that drives one of the parameters, of an earlier optimizer for example."""
    for updates in {owner for p in parameters for owner in _drivers(p)}:
        updates.remove()


def uses_up_gradient(p: Tensor) -> bool:
    """Whether the gradient of p is used up inside every backward pass, so that nobody else will see it."""
    return any(updates.accumulation == 1 for updates in _drivers(p))


def _drivers(p: Tensor) -> list[PerLayerUpdates]:
    hooks = (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
    owners = [hook.owner() for hook in hooks if isinstance(hook, _Hook)]
    return [owner for owner in owners if owner is not None]
