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

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qgalore.grad_sync import GradSync
from qgalore.group_options import DEFAULTS, check_group
from qgalore.moments import count_update, create_moments, follow_basis, open_moments
from qgalore.outcome import Outcome
from qgalore.projectors import Projector, projection_sides
from qgalore.quantize import mix_seed, open_weight
from qgalore.subspace_schedule import RefreshSchedule, staggered_offset
from qgalore.update_rules import RULES
from qgalore.weight_update import Numbers, compiled_update, update_weight

COSTS = ("failed_refreshes", "refresh_seconds")


class LowRankOptimizer(torch.optim.Optimizer):
    """AdamW, Adafactor or Lion whose moments and directions live in a low-rank subspace of each matrix.

    params: parameters, or groups as for any torch optimizer. A group with a `rank` is projected; its matrices (m, n)
        may also set `update_proj_gap` (updates between refreshes), `scale` (of the update), `proj_type` (see
        projectors.projection_sides; random: bases are drawn, not computed), `subspace` (iterate | svd), `threshold`,
        `growth` and `queue_size` (of a lazy gap, see RefreshSchedule) and `moments_on_refresh`:
        project: the first moment is carried over by P_new^T P_old; keep: left as it is (the reference); reset: zeroed.
        A rank beyond a matrix's shorter side is clamped to it. `basis_bits` 4 or 8 packs the bases, in groups of at
        most `basis_group_size`. In any group, `rule` names how gradients become directions (see update_rules.RULES),
        `state_bits` 8 keeps its moments in 8 bits, and `clip` limits the norm of each parameter's projected gradient
        (0: no limit).
    lr: step size.  betas: decay rates, None for the rule's usual ones.  eps: Adam's.  weight_decay: decoupled, as in
        torch.optim.AdamW; in an unprojected group with `decoupled` False added to the gradient, as in torch.optim.Adam.
    seed: of the randomized bases and of the stochastic rounding.  sync: sums gradients over data-parallel ranks.
    compile: whether updates run compiled; refreshes never do.
    Raises ValueError for settings out of range.
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
    ) -> None:
        defaults = DEFAULTS | dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.seed = seed
        self.sync = sync or GradSync()
        self.compile = compile
        self._update = compiled_update() if compile else update_weight
        for group in self.param_groups:
            if group["betas"] is None and group["rule"] in RULES:
                group["betas"] = RULES[group["rule"]].betas
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
                method="random" if group["proj_type"] == "random" else group["subspace"],
                schedule=RefreshSchedule(
                    gap=gap,
                    offset=staggered_offset(index, count=len(projected), gap=gap),
                    threshold=None if group["proj_type"] == "random" else group["threshold"],
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
                state = self.state[p]
                self._projectors[p].allocate(state, like=p)
                create_moments(state, RULES[group["rule"]], like=self._like_projected(p), bits=group["state_bits"])

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
            self.refresh(p, group, p.grad)
            R = self.sync.sum(self.project(p, p.grad))
        self.apply(p, group, R)

    def needs_whole_gradient(self, p: Tensor) -> bool:
        """Whether this update of p needs more of its gradient than the projection: none is there, or a basis is due
        that is computed from it."""
        projector, state = self._projectors[p], self.state[p]
        return not projector.sides or (projector.sees_gradient and projector.due(state, step=state.get("step", 0) + 1))

    def awaits_first_basis(self, p: Tensor) -> bool:
        """Whether p is to be projected but has no basis yet, and none without a gradient."""
        return self._projectors[p].sees_gradient and "step" not in self.state[p]

    def refresh(self, p: Tensor, group: dict[str, Any], G: Tensor) -> None:
        """Brings the bases of p up to date with its whole gradient, where that is due; its moments follow. G (m, n).

        Random bases need no more of G than its shape and dtype: any micro-batch's will do.
        """
        state, projector, began = self.state[p], self._projectors[p], time.perf_counter()
        self._remember(p)
        if not projector.due(state, step=state.get("step", 0) + 1):
            return
        G = G.to(p.dtype)  # also where micro-batches were summed in float32: bases are kept in the weight's dtype
        change = projector.prepare(G, state, step=state.get("step", 0) + 1)
        if change is not None and "mass" in state:
            rule, policy = RULES[group["rule"]], group["moments_on_refresh"]
            seed = mix_seed(self.seed, state["step"], self._index[p], True)  # another one than in the update
            follow_basis(state, rule, change, like=self._like_projected(p), policy=policy, seed=seed)
        state["refresh_seconds"] = state.get("refresh_seconds", 0.0) + time.perf_counter() - began

    def _like_projected(self, p: Tensor) -> Tensor:
        """A tensor of R's shape and dtype. Its values do not matter."""
        shape, wide = self._projectors[p].projected_shape(p.shape), torch.promote_types(p.dtype, torch.float32)
        return torch.empty(shape, dtype=wide, device=p.device)

    def project(self, p: Tensor, G: Tensor) -> Tensor:
        """R = P^T G Q with the bases of p, in float32 or wider. (m, n) -> (r or m, r or n)"""
        return self._projectors[p].project(G.to(p.dtype) if self._projectors[p].sides else G, self.state[p])

    def apply(self, p: Tensor, group: dict[str, Any], R: Tensor) -> None:
        """Updates moments and weight of p from its projected gradient, summed over micro-batches and ranks."""
        state, projector, rule = self.state[p], self._projectors[p], RULES[group["rule"]]
        self._remember(p)
        if "mass" not in state:
            create_moments(state, rule, like=R, bits=group["state_bits"])
        count_update(state, rule, betas=group["betas"])
        numbers = self._numbers(p, group)
        moments = open_moments(
            state, rule, like=R, seed=mix_seed(self.seed, state["step"], self._index[p], False), compiled=self.compile
        )
        norm = self._update(
            R,
            open_weight(p),
            moments,
            bases=projector.bases(state),
            numbers=numbers.as_tensors(R.dtype) if self.compile else numbers,
            projector=projector,
            rule=rule,
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

    def _numbers(self, p: Tensor, group: dict[str, Any]) -> Numbers:
        """What is different in this update of p from others."""
        state, lr, weight_decay, rule = self.state[p], group["lr"], group["weight_decay"], RULES[group["rule"]]
        return Numbers(
            lr=lr,
            shrink=1 - lr * weight_decay * group["decoupled"],
            mass=state["mass"],
            mass_sq=state["mass_sq"],
            seed=mix_seed(self.seed, state["step"], self._index[p]),
            beta2=rule.decay(state["step"]) if rule.decay else None,
            coupled_decay=None if group["decoupled"] else weight_decay,
            clip=group["clip"] or None,
        )
