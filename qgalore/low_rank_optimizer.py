"""The one optimizer: gradients enter a subspace, a rule makes them directions, directions come back to the weights.

One parameter, one update (Zhao et al. 2024, GaLore, algorithm 2):

    G = the gradient                 (m, n)      summed over the ranks where the whole of it is needed
    P refreshed from G, if due       (m, r) and/or (n, r)
    R = P^T G Q                      in the subspace; summed over the ranks there: r numbers travel instead of n
    D = rule(R, moments)             the moments, too, have R's shape
    U = scale * P D Q^T              (m, n)
    w = w * (1 - lr * weight_decay) - lr * U, in float32; bfloat16 weights are rounded stochastically

A parameter of a group without `rank` takes the same road with the identity for a projector.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qgalore.blockwise_state import Moment, create_moment, open_moment
from qgalore.grad_sync import GradSync
from qgalore.outcome import Outcome
from qgalore.projectors import PROJ_TYPES, SUBSPACE_METHODS, Projector, Refresh, projection_sides
from qgalore.quantize import mix_seed, open_weight
from qgalore.subspace_schedule import RefreshSchedule, staggered_offset
from qgalore.weight_update import Numbers, compiled_update, update_weight

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name: signed
COSTS = ("failed_refreshes", "refresh_seconds")
MOMENT_POLICIES = ("project", "keep", "reset")


class LowRankOptimizer(torch.optim.Optimizer):
    """AdamW whose moments and directions live in a low-rank subspace of each matrix.

    params: parameters, or groups as for any torch optimizer. A group with a `rank` is projected; its matrices (m, n)
        may also set `update_proj_gap` (updates between refreshes), `scale` (of the update), `proj_type` (see
        projectors.projection_sides), `subspace` (iterate | svd), `threshold`, `growth` and `queue_size` (of a lazy gap,
        see RefreshSchedule) and `moments_on_refresh`:
        project: the first moment is carried over by P_new^T P_old; keep: left as it is (the reference); reset: zeroed.
        A rank beyond a matrix's shorter side is clamped to it. `basis_bits` 4 or 8 packs the bases, in groups of at
        most `basis_group_size`. In any group, `state_bits` 8 keeps the moments in 8 bits, and `clip` limits the norm of
        each parameter's projected gradient (0: no limit).
    lr: step size.  betas, eps: Adam's.  weight_decay: decoupled, as in torch.optim.AdamW; in an unprojected group with
        `decoupled` False added to the gradient, as in torch.optim.Adam.
    seed: of the randomized bases and of the stochastic rounding.  sync: sums gradients over data-parallel ranks.
    compile: whether updates run compiled; refreshes never do.
    Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        sync: GradSync | None = None,
        compile: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=None,
            update_proj_gap=200,
            scale=1.0,
            proj_type="std",
            subspace="iterate",
            threshold=None,
            growth=2.0,
            queue_size=5,
            moments_on_refresh="project",
            decoupled=True,
            state_bits=32,
            basis_bits=None,
            basis_group_size=256,
            clip=0.0,
        )
        super().__init__(params, defaults)
        self.seed = seed
        self.sync = sync or GradSync()
        self.compile = compile
        self._update = compiled_update() if compile else update_weight
        for group in self.param_groups:
            check_group(group)
        self._index = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        self._projectors = self._build_projectors()
        # By parameter, so that they stay small where nobody ends an update.
        self._norms: dict[Tensor, Tensor] = {}
        self._before: dict[Tensor, dict[str, Any]] = {}  # the numbers in its state before this update

    def _build_projectors(self) -> dict[Tensor, Projector]:
        """One projector a parameter; refreshes are staggered over all the projected matrices."""
        projected = [(p, group) for group in self.param_groups if group["rank"] for p in group["params"]]
        projectors = {p: Projector() for p in self._index}
        for index, (p, group) in enumerate(projected):
            gap = group["update_proj_gap"]
            projectors[p] = Projector(
                sides=projection_sides((p.shape[0], p.shape[1]), proj_type=group["proj_type"]),
                rank=min(group["rank"], *p.shape),
                method=group["subspace"],
                schedule=RefreshSchedule(
                    gap=gap,
                    offset=staggered_offset(index, count=len(projected), gap=gap),
                    threshold=group["threshold"],
                    growth=group["growth"],
                    queue_size=group["queue_size"],
                ),
                seed=mix_seed(self.seed, self._index[p]),
                bits=group["basis_bits"],
                group_size=group["basis_group_size"],
            )
        return projectors

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but tensors keep the dtype that they were saved in: moments stay float32 where weights
        are bfloat16."""
        super().load_state_dict(state_dict)
        for index, p in enumerate(self._index):
            saved = state_dict["state"].get(index, {})
            tensors = {key: value.to(p.device, copy=True) for key, value in saved.items() if torch.is_tensor(value)}
            self.state[p].update(tensors)

    @torch.no_grad()
    def allocate(self) -> None:
        """Puts the tensors that training will hold into the state of every parameter, filled with zeros.

        So their bytes can be counted before training, on the meta device, too. Do not train afterwards.
        """
        for group in self.param_groups:
            for p in group["params"]:
                projector, state = self._projectors[p], self.state[p]
                projector.allocate(state, like=p)
                shape = projector.projected_shape(p.shape)
                wide = torch.promote_types(p.dtype, torch.float32)
                self._create_moments(p, group, like=torch.empty(shape, dtype=wide, device=p.device))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update_parameter(p, group)
        return loss

    @torch.no_grad()
    def update_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        """One update of one parameter from p.grad: the road drawn at the top of this file."""
        assert p.grad is not None
        if self.needs_whole_gradient(p):
            G = self.sync.sum(p.grad)
            self.refresh(p, group, G)
            R = self.project(p, G)
        else:
            R = self.sync.sum(self.project(p, p.grad))
        self.apply(p, group, R)

    def needs_whole_gradient(self, p: Tensor) -> bool:
        """Whether this update of p needs more of its gradient than the projection: none is there, or it is due."""
        projector, state = self._projectors[p], self.state[p]
        return not projector.sides or projector.due(state, step=state.get("step", 0) + 1)

    def awaits_first_basis(self, p: Tensor) -> bool:
        """Whether p is to be projected but has no basis yet."""
        return bool(self._projectors[p].sides) and "step" not in self.state[p]

    def refresh(self, p: Tensor, group: dict[str, Any], G: Tensor) -> None:
        """Brings the bases of p up to date with its whole gradient, where that is due; its moments follow. G (m, n)."""
        state, projector, began = self.state[p], self._projectors[p], time.perf_counter()
        self._remember(p)
        if not projector.due(state, step=state.get("step", 0) + 1):
            return
        G = G.to(p.dtype)  # also where micro-batches were summed in float32: bases are kept in the weight's dtype
        change = projector.prepare(G, state, step=state.get("step", 0) + 1)
        if change is not None and "mass" in state:
            self._follow_basis(p, change, like=self.project(p, G), policy=group["moments_on_refresh"])
        state["refresh_seconds"] = state.get("refresh_seconds", 0.0) + time.perf_counter() - began

    def project(self, p: Tensor, G: Tensor) -> Tensor:
        """R = P^T G Q with the bases of p, in float32 or wider. (m, n) -> (r or m, r or n)"""
        return self._projectors[p].project(G.to(p.dtype) if self._projectors[p].sides else G, self.state[p])

    def apply(self, p: Tensor, group: dict[str, Any], R: Tensor) -> None:
        """Updates moments and weight of p from its projected gradient, summed over micro-batches and ranks."""
        state, projector = self.state[p], self._projectors[p]
        self._remember(p)
        state["step"] = state.get("step", 0) + 1
        self._weigh(p, group, like=R)
        M, V = self._moments(p, like=R)
        norm = self._update(
            R,
            open_weight(p),
            M,
            V,
            bases=projector.bases(state),
            numbers=self._numbers(p, group, like=R),
            projector=projector,
            betas=group["betas"],
            eps=group["eps"],
            scale=group["scale"],
        )
        torch.autograd.graph.increment_version(p)  # what was written may be the inside of an Int8Weight
        self._norms[p] = norm

    def refreshes(self, p: Tensor) -> dict[str, Any] | None:
        """What became of the bases of p; None for a parameter that is not projected.

        `refreshes` (computed so far), `failed`, `seconds` (spent, as the host saw it), `gap` (the present one, in
        updates), `overlap` (of the last two bases; None where the gap is not lazy).
        """
        projector, state = self._projectors[p], self.state[p]
        if not projector.sides:
            return None
        return {
            "refreshes": state.get("refreshes", 0),
            "failed": state.get("failed_refreshes", 0),
            "seconds": state.get("refresh_seconds", 0.0),
            "gap": state.get("gap", projector.schedule.gap),
            "overlap": state.get("overlap"),
        }

    def end_update(self) -> Outcome:
        """What came of the gradients, as projected, since the last call. Waits for the device.

        A parameter whose gradient was not finite is as it was before the update: update_weight wrote nothing, and its
        steps, masses and times of refreshes are taken back here. Only what it cost stays on the bill.
        """
        outcome = Outcome.of(self._norms)
        for p in outcome.bad:
            state = self.state[p]
            for key in [key for key, value in state.items() if not (torch.is_tensor(value) or key in COSTS)]:
                del state[key]
            state.update({key: value for key, value in self._before[p].items() if key not in COSTS})
        self._norms.clear()
        self._before.clear()
        return outcome

    def _remember(self, p: Tensor) -> None:
        """Keeps the numbers in the state of p, once an update."""
        state = self.state[p]
        if p not in self._before or self._before[p].get("step") != state.get("step"):
            self._before[p] = {key: value for key, value in state.items() if not torch.is_tensor(value)}

    def _weigh(self, p: Tensor, group: dict[str, Any], *, like: Tensor) -> None:
        """Advances the sums of the weights that the moments of p hold, which are zeros before the first update."""
        state = self.state[p]
        if "mass" not in state:
            self._create_moments(p, group, like=like)
        beta1, beta2 = group["betas"]
        state["mass"] = beta1 * state["mass"] + 1 - beta1
        state["mass_sq"] = beta2 * state["mass_sq"] + 1 - beta2

    def _numbers(self, p: Tensor, group: dict[str, Any], *, like: Tensor) -> Numbers:
        """What is different in this update of p from others. like: R."""
        state, lr, weight_decay = self.state[p], group["lr"], group["weight_decay"]
        numbers = Numbers(
            lr=lr,
            shrink=1 - lr * weight_decay * group["decoupled"],
            coupled_decay=None if group["decoupled"] else weight_decay,
            clip=group["clip"] or None,
            mass=state["mass"],
            mass_sq=state["mass_sq"],
            seed=mix_seed(self.seed, state["step"], self._index[p]),
        )
        return numbers.as_tensors(like.dtype) if self.compile else numbers

    def _create_moments(self, p: Tensor, group: dict[str, Any], *, like: Tensor) -> None:
        """Moments of zeros, and the sums of their weights. like: R."""
        for name in MOMENTS:
            create_moment(self.state[p], name, like=like, bits=group["state_bits"])
        self.state[p].update(mass=0.0, mass_sq=0.0)

    def _moments(self, p: Tensor, *, like: Tensor, refresh: bool = False) -> list[Moment]:
        """The first and the second moment of p, in whatever precision they are kept. like: R.

        refresh: whether they are about to follow the basis; rounding then needs another noise than in the update.
        """
        seed = mix_seed(self.seed, self.state[p]["step"], self._index[p], refresh)
        compiled = self.compile and not refresh
        return [
            open_moment(self.state[p], name, like=like, signed=signed, seed=seed, compiled=compiled)
            for name, signed in MOMENTS.items()
        ]

    def _follow_basis(self, p: Tensor, change: Refresh, *, like: Tensor, policy: str) -> None:
        """What becomes of the moments of p when its basis changes: project | keep | reset, see the class. like: R."""
        M, V = self._moments(p, like=like, refresh=True)
        if policy == "project":
            M.copy_(change.carry(M.dequantize()))
        elif policy == "reset":
            for moment in (M, V):
                moment.copy_(torch.zeros_like(like))
            self.state[p]["mass"] = self.state[p]["mass_sq"] = 0.0


def check_group(group: dict[str, Any]) -> None:
    """Refuses settings out of range, and warns of a rank that some matrices are too small for."""
    rules = {
        "lr": group["lr"] >= 0,
        "weight_decay": group["weight_decay"] >= 0,
        "eps": group["eps"] >= 0,
        "betas": all(0 <= beta < 1 for beta in group["betas"]),
        "rank": group["rank"] is None or group["rank"] >= 1,
        "update_proj_gap": group["update_proj_gap"] >= 1,
        "scale": math.isfinite(group["scale"]),
        "clip": group["clip"] >= 0,
        "state_bits": group["state_bits"] in (8, 32),
        "decoupled": group["decoupled"] or group["rank"] is None,
        "basis_bits": group["basis_bits"] in (None, 4, 8),
        "proj_type": group["proj_type"] in PROJ_TYPES,
        "subspace": group["subspace"] in SUBSPACE_METHODS,
        "moments_on_refresh": group["moments_on_refresh"] in MOMENT_POLICIES,
    }
    for name, fits in rules.items():
        if not fits:
            raise ValueError(f"{name} = {group[name]} is out of range")
    if group["rank"] is None:
        return
    if any(p.ndim != 2 for p in group["params"]):
        raise ValueError("a group with a rank may hold matrices only")
    small = [p for p in group["params"] if min(p.shape) < group["rank"]]
    if small:
        shortest = min(min(p.shape) for p in small)
        warnings.warn(
            f"rank {group['rank']} is larger than the shorter side of {len(small)} of {len(group['params'])} matrices "
            f"(the shortest: {shortest}): it is clamped there",
            stacklevel=3,
        )
