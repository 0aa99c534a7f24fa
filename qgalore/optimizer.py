"""The optimizer of this package: groups, order and state. What happens to one parameter is in update.py."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from qgalore.basis_updates import create_learner
from qgalore.options import complete_group
from qgalore.outcome import Outcome
from qgalore.projections import make_projectors
from qgalore.resumable import ResumableOptimizer
from qgalore.rules.lifts import LIFTS
from qgalore.rules.skips import SKIPS
from qgalore.sharding import as_dtensor, local
from qgalore.storage.dynamic8 import upgrade_moments
from qgalore.subspace.probe import observers
from qgalore.subspace.projector import is_spread
from qgalore.sync import GradSync
from qgalore.update import Engine, ParameterUpdate

# Numbers that are kept as tensors.
REMEMBERED = {lift.remembers for lift in LIFTS.values()} | {skip.remembers for skip in SKIPS.values()}


class LowRankOptimizer(ResumableOptimizer):
    """Adam, Adafactor, Lion and others whose moments and directions live in a low-rank subspace of each matrix.

    A group with a `rank` is projected; it holds matrices only, and a rank above a matrix's shorter side is clamped to
    that side. The other options of a group are declared in options.GroupOptions and options.ProjectionOptions.
    """

    CONFIGURATION: ClassVar[tuple[str, ...]] = ("seed", "compile", "measures")
    flush: Callable[[], None] | None = None  # completes updates that were begun inside backward, see PerLayerUpdates
    driven: Collection[Tensor] = ()  # the parameters of these updates

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        sync: GradSync | None = None,
        compile: bool = False,
        details: bool = False,
    ) -> None:
        """
        params: parameters or groups, as for any torch optimizer.
        lr: step size.
        betas: decay rates of the moments; None for the usual ones of the rule.
        eps: added to Adam's divisor.
        weight_decay: decoupled as in torch.optim.AdamW; in a group with `decoupled` False, which is not projected, it
            is added to the gradient as in torch.optim.Adam.
        seed: decides what is drawn, and the stochastic rounding.
        sync: sums gradients over data-parallel ranks; None sends nothing.
        compile: whether updates run compiled. Refreshes are never compiled.
        details: whether subspaces are measured, see `details`.
        Raises ValueError for unknown options and for values out of range.
        """
        self.seed, self.compile, self.measures = seed, compile, details
        self.sync = sync or GradSync(at_rank_size=False)
        self.updates: dict[Tensor, ParameterUpdate] = {}
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. Options that the group does not set get their defaults, and all are checked."""
        super().add_param_group(param_group)
        self.param_groups.append(complete_group(self.param_groups.pop()))
        self._build_updates()

    def check_group(self, group: dict[str, Any], *, params: list[Tensor]) -> dict[str, Any]:
        if "rule" not in group:
            others = ", ".join(sorted(group.keys() - {"params"}))
            raise ValueError(f"this is not the state of a LowRankOptimizer: its groups name no rule, only {others}")
        return {**complete_group({**group, "params": params}), "params": group["params"]}

    def upgrade_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return upgrade_moments(state)

    def load_value(self, value: Any, *, key: str, p: Tensor) -> Any:
        if torch.is_tensor(value) and value.ndim == 0 and key not in REMEMBERED:
            return value.item()  # some savers make tensors of numbers
        return super().load_value(value, key=key, p=p)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim. Of a sharded parameter, tensors with rows are DTensors, which torch.distributed.checkpoint
        saves and shares out anew."""
        packed = super().state_dict()
        indices = [index for group in packed["param_groups"] for index in group["params"]]
        for index, (p, update) in zip(indices, self.updates.items(), strict=True):
            if update.shard is not None and index in packed["state"]:
                state = packed["state"][index]
                packed["state"][index] = {
                    key: as_dtensor(value, like=p) if is_spread(key, value) else value for key, value in state.items()
                }
        return packed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "sync" not in self.__dict__:  # a copy or a pickle: the process group does not travel
            self.sync = GradSync(at_rank_size=False)
        self._build_updates()

    def _build_updates(self) -> None:
        """Makes one ParameterUpdate for each parameter."""
        self._engine = Engine(self.seed, compiled=self.compile)
        self._outcome = Outcome(0.0)
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        projectors = make_projectors(pairs, seed=self.seed)
        watching = observers(projectors, details=self.measures)
        self.updates = {}
        for index, (p, group) in enumerate(pairs):
            update = self.updates[p] = ParameterUpdate(
                p,
                group=group,
                states=self.state,
                index=index if len(pairs) > 1 else None,
                projector=projectors[p],
                engine=self._engine,
                observer=watching[p],
            )
            update.learner = create_learner(update)

    @torch.no_grad()
    def allocate(self) -> None:
        """Fills the state with zeros of every tensor that training will hold, to count their bytes in advance.

        It works on the meta device, too. Do not train afterwards.
        """
        for update in self.updates.values():
            update.allocate()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Waits for the device at the end, see end_update.

        Where PerLayerUpdates has updated the parameters inside backward, it ends that update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        exchange = self.sync.exchange((p for p in self.updates if p not in self.driven), inside=True)
        for p, update in self.updates.items():
            if p.grad is not None:
                self.complete(exchange.send(p, update.prepare(local(p.grad))))
        self.complete(exchange.finish(self.missing))
        if self.flush is not None:
            self.flush()
        self._settle()
        return loss

    def complete(self, arrived: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Completes the updates of parameters whose sums have arrived, see Exchange."""
        for p, total in arrived:
            self.updates[p].complete(total)

    def missing(self, p: Tensor) -> Tensor:
        """The part of a parameter that this rank has no gradient of, though others may have one."""
        return self.updates[p].prepare(torch.zeros(p.shape, dtype=p.dtype, device=p.device))

    def end_update(self) -> Outcome:
        """Ends an update whose parameters were updated one by one, and returns its outcome. Waits for the device.

        After `step`, which has ended the update itself, it returns the outcome of that step.
        A parameter whose gradient was not finite is as it was before the update: nothing was written, and the update
        is not counted. Failed refreshes stay counted.
        """
        if self._engine.norms:
            self._settle()
        outcome, self._outcome = self._outcome, Outcome(0.0)
        return outcome

    def _settle(self) -> None:
        shards = (update.shard for update in self.updates.values())
        shard = next((shard for shard in shards if shard is not None), None)
        self._outcome = Outcome.of(self._engine.norms, shard=shard)
        for p in self._outcome.bad:
            self.updates[p].undo()
        for update in self.updates.values():
            update.end()
        self._engine.norms.clear()

    def refreshes(self, p: Tensor) -> dict[str, Any] | None:
        """The history of the bases of p, see ParameterUpdate.refreshes; None for a parameter that is not projected."""
        return self.updates[p].refreshes()

    def details(self, p: Tensor) -> dict[str, Any] | None:
        """The figures measured of p's subspace in this update, see Probe.figures; None if it was not measured."""
        update = self.updates.get(p)
        return None if update is None else update.observer.figures(self.state[p], projector=update.projector)
