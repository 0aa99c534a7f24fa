"""The optimizer of this package, as torch has them: groups, order, state. The road of an update is update.py's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qgalore.options import complete_group, learner_group
from qgalore.outcome import Outcome
from qgalore.rules.moments import create_moments
from qgalore.storage.rounding import mix_seed
from qgalore.subspace.probe import observers
from qgalore.subspace.projector import LEARNERS, Projector, projection_sides
from qgalore.subspace.schedule import RefreshSchedule, staggered_offset
from qgalore.sync import GradSync
from qgalore.update import BasisUpdate, Engine, ParameterUpdate


class LowRankOptimizer(torch.optim.Optimizer):
    """Adam, Adafactor, Lion and others whose moments and directions live in a low-rank subspace of each matrix.

    params: parameters, or groups as for any torch optimizer. What a group may set beside `params` and `lr` is declared
        in options.GroupOptions; a group with a `rank` is projected and holds matrices only. A rank beyond a matrix's
        shorter side is clamped to it.
    lr: step size.
    betas: decay rates of the moments; None for the rule's usual ones.
    eps: added to Adam's divisor.
    weight_decay: decoupled, as in torch.optim.AdamW; in a group that is not projected with `decoupled` False added to
        the gradient, as in torch.optim.Adam.
    seed: of what is drawn, and of the stochastic rounding.
    sync: sums gradients over data-parallel ranks; None sums nothing.
    compile: whether updates run compiled; refreshes never do.
    details: whether subspaces are measured, see `details`.
    Raises ValueError for unknown options, and for values out of range.
    """

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
        self.seed, self.compile, self.measures = seed, compile, details
        self.sync = sync or GradSync(at_rank_size=False)  # step() sends nothing unless it was given one
        self.updates: dict[Tensor, ParameterUpdate] = {}
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; options that the group does not set are filled in, and all are checked."""
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        self.param_groups.append(complete_group(group))
        self._build_updates()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("seed", "compile", "measures")}
        return {**super().__getstate__(), **own}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "sync" not in self.__dict__:  # unpickled: a process group does not travel
            self.sync = GradSync(at_rank_size=False)
        self._build_updates()

    def _build_updates(self) -> None:
        """One ParameterUpdate a parameter; refreshes are staggered over all the projected matrices."""
        self._engine = Engine(self.seed, self.sync, compiled=self.compile)
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        turns = {p: turn for turn, p in enumerate(p for p, group in pairs if group["rank"])}
        projectors = {
            p: _projector(p, group, seed=mix_seed(self.seed, index), turn=turns.get(p, 0), count=len(turns))
            for index, (p, group) in enumerate(pairs)
        }
        watching = observers(projectors, details=self.measures)
        self.updates = {}
        for index, (p, group) in enumerate(pairs):
            update = self.updates[p] = ParameterUpdate(
                p,
                group=group,
                states=self.state,
                index=index,
                projector=projectors[p],
                engine=self._engine,
                observer=watching[p],
            )
            if projectors[p].learns:
                learner = LEARNERS[group["proj_type"]]
                options = learner_group(rule=learner.rule, state_bits=learner.bits, eps=group["eps"])
                update.learner = BasisUpdate(update, group=options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but tensors keep the dtype that they were saved in: moments stay float32 where weights
        are bfloat16."""
        super().load_state_dict(state_dict)
        for index, p in enumerate(self.updates):
            saved = state_dict["state"].get(index, {})
            tensors = {key: value.to(p.device, copy=True) for key, value in saved.items() if torch.is_tensor(value)}
            self.state[p].update(tensors)

    @torch.no_grad()
    def allocate(self) -> None:
        """Puts the tensors that training will hold into the state of every parameter, filled with zeros.

        So their bytes can be counted before training, on the meta device, too. Do not train afterwards.
        """
        for p, update in self.updates.items():
            state, projector, wide = self.state[p], update.projector, update.projector.wide
            projector.allocate(state, device=p.device)
            for each in [update] if update.learner is None else [update, update.learner]:
                bits = each.group["state_bits"]
                create_moments(state, each.kinds, bits=bits, dtype=wide, device=p.device, prefix=each.prefix)
            if update.lift.remembers:
                state[update.lift.remembers] = torch.zeros((), dtype=wide, device=p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p, update in self.updates.items():
            if p.grad is not None:
                update.update(p.grad)
        return loss

    def end_update(self) -> Outcome:
        """What came of the gradients, as projected, since the last call. Waits for the device.

        A parameter whose gradient was not finite is as it was before the update: nothing was written, and what was
        counted is taken back here. Only failed refreshes stay on the bill.
        """
        outcome = Outcome.of(self._engine.norms)
        for p in outcome.bad:
            self.updates[p].undo()
        for update in self.updates.values():
            update.end()
        self._engine.norms.clear()
        return outcome

    def refreshes(self, p: Tensor) -> dict[str, Any] | None:
        """What became of the bases of p; None for a parameter that is not projected.

        refreshes: computed so far.
        failed: how many of them failed.
        seconds: spent in them since the start or resume, as the host saw it.
        gap: the present one, in updates; None where the basis learns instead.
        overlap: of the last two bases; None where no gap is lazy.
        """
        update, state = self.updates[p], self.state[p]
        if not update.projector.sides:
            return None
        return {
            "refreshes": state.get("refreshes", 0),
            "failed": state.get("failed_refreshes", 0),
            "seconds": update.observer.refresh_seconds,
            "gap": None if update.projector.learns else state.get("gap", update.projector.schedule.gap),
            "overlap": state.get("overlap"),
        }

    def details(self, p: Tensor) -> dict[str, Any] | None:
        """What was measured of p's subspace in this update, see Probe.figures; None where nothing was."""
        update = self.updates.get(p)
        return None if update is None else update.observer.figures(self.state[p], projector=update.projector)


def _projector(p: Tensor, group: dict[str, Any], *, seed: int, turn: int, count: int) -> Projector:
    """The projector of a parameter. turn: its number among the `count` projected ones, where it is one of them."""
    if not group["rank"]:
        return Projector(p.shape, p.dtype)
    gap, random = group["update_proj_gap"], group["proj_type"] == "random"
    return Projector(
        p.shape,
        p.dtype,
        sides=projection_sides(p.shape, proj_type=group["proj_type"]),
        rank=min(group["rank"], *p.shape),
        method="random" if random else group["subspace"],
        learns=group["proj_type"] in LEARNERS,
        schedule=RefreshSchedule(
            gap=gap,
            offset=staggered_offset(turn, count=count, gap=gap),
            threshold=None if random else group["cos_threshold"],
            growth=group["gamma_proj"],
            queue_size=group["queue_size"],
        ),
        seed=seed,
        bits=group["proj_bits"],
        group_size=group["proj_group_size"],
    )
