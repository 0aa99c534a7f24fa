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

from qgalore.options import DEFAULTS, check_group
from qgalore.outcome import Outcome
from qgalore.rules.lifts import Residual
from qgalore.rules.moments import count_update, create_moments, follow_basis, open_moments
from qgalore.rules.rules import RULES
from qgalore.storage.affine import mix_seed, open_weight, read_weight
from qgalore.subspace.online_pca import pca_gradient
from qgalore.subspace.probe import MeasuredProjector, measured
from qgalore.subspace.projector import LEARNERS, Projector, projection_sides
from qgalore.subspace.schedule import RefreshSchedule, staggered_offset
from qgalore.sync import GradSync
from qgalore.update import Numbers, Plan, compiled_update, update_weight

COSTS = ("failed_refreshes", "refresh_seconds")


class LowRankOptimizer(torch.optim.Optimizer):
    """AdamW, Adafactor or Lion whose moments and directions live in a low-rank subspace of each matrix.

    params: parameters, or groups as for any torch optimizer. A group with a `rank` is projected; its matrices (m, n)
        may also set `update_proj_gap` (updates between refreshes), `scale` (of the update), `proj_type` (see
        projectors.projection_sides; random: bases are drawn, not computed), `subspace` (iterate | svd), `threshold`,
        `growth` and `queue_size` (of a lazy gap, see RefreshSchedule) and `moments_on_refresh`:
        project: the first moment is carried over by P_new^T P_old; keep: left as it is (the reference); reset: zeroed.
        With `proj_type` continuous, continuous_lion and so on (projectors.LEARNERS) the first basis learns from then on
        by online PCA, in steps of `proj_lr` (None: 1 / update_proj_gap) times lr over the lr given here, with
        `proj_reg` on its distance from orthonormal. `residual` fira brings back what the projection leaves out (see
        residual.recover), for Adam's rule and one projected side. Both need the whole gradient in every update.
        A rank beyond a matrix's shorter side is clamped to it. `basis_bits` 4 or 8 packs the bases, in groups of at
        most `basis_group_size`. In any group, `rule` names how gradients become directions (see update_rules.RULES),
        `state_bits` 8 keeps its moments in 8 bits, and `clip` limits the norm of each parameter's projected gradient
        (0: no limit).
    lr: step size.  betas: decay rates, None for the rule's usual ones.  eps: Adam's.  weight_decay: decoupled, as in
        torch.optim.AdamW; in an unprojected group with `decoupled` False added to the gradient, as in torch.optim.Adam.
    seed: of the randomized bases and of the stochastic rounding.  sync: sums gradients over data-parallel ranks.
    compile: whether updates run compiled; refreshes never do.  details: whether subspaces are measured, see `details`.
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
        details: bool = False,
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
            group.setdefault("initial_lr", group["lr"])  # as torch's schedulers name it
        self._index = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        projectors = self._build_projectors()
        self._projectors = measured(projectors) if details else projectors
        recovered = [group for group in self.param_groups if group["rank"] and group["residual"] != "none"]
        self._recovered = {p for group in recovered for p in group["params"]}
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
                learner=LEARNERS.get(group["proj_type"]),
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
                state, projector = self.state[p], self._projectors[p]
                projector.allocate(state, like=p)
                like = self._like_projected(p)
                create_moments(state, RULES[group["rule"]], like=like, bits=group["state_bits"])
                if p in self._recovered:
                    state["residual_norm"] = like.new_zeros(())
                if projector.learner is not None:
                    (side,), (rule, bits, _) = projector.sides, projector.learner
                    basis = like.new_empty(projector.basis_shape(p.shape, side))
                    create_moments(state, RULES[rule], like=basis, bits=bits, prefix=f"{side}.")

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
            self.update_from_whole(p, group, self.sync.sum(p.grad))
        else:
            self.refresh(p, group, p.grad)
            self.apply(p, group, self.sync.sum(self.project(p, p.grad)))

    def update_from_whole(self, p: Tensor, group: dict[str, Any], G: Tensor) -> None:
        """One update of p from its whole gradient, summed over micro-batches and ranks. G (m, n)."""
        self.refresh(p, group, G)
        R = self.project(p, G)
        self.apply(p, group, R, G)
        if self._projectors[p].learner is not None and self.state[p]["step"] > 1:  # the first basis needs no step
            self._learn(p, group, G, R)

    def always_needs_whole_gradient(self, p: Tensor) -> bool:
        """Whether R is never enough for p: it is not projected, its basis learns or its residual is recovered."""
        return not self._projectors[p].sides or self._projectors[p].learner is not None or p in self._recovered

    def needs_whole_gradient(self, p: Tensor) -> bool:
        """Whether this update of p does: always, or because a basis is due that is computed from it."""
        projector, state = self._projectors[p], self.state[p]
        due = projector.sees_gradient and projector.due(state, step=state.get("step", 0) + 1)
        return due or self.always_needs_whole_gradient(p)

    def awaits_first_basis(self, p: Tensor) -> bool:
        """Whether p has no basis yet, but could do with its projected gradient as soon as it has one."""
        first = self._projectors[p].sees_gradient and "step" not in self.state[p]
        return first and not self.always_needs_whole_gradient(p)

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

    def apply(self, p: Tensor, group: dict[str, Any], R: Tensor, G: Tensor | None = None) -> None:
        """Updates moments and weight of p from its projected gradient, summed over micro-batches and ranks.

        G: the whole of it, where the residual is recovered.
        """
        self._remember(p)
        residual = None
        if p in self._recovered:
            assert G is not None
            residual = Residual(G.to(p.dtype), self.state[p].setdefault("residual_norm", R.new_zeros(())))
        self._norms[p] = self._move(
            p, group, open_weight(p), R, projector=self._projectors[p], seed=self.seed, residual=residual
        )
        torch.autograd.graph.increment_version(p)  # what was written may be the inside of an Int8Weight

    def _learn(self, p: Tensor, group: dict[str, Any], G: Tensor, R: Tensor) -> None:
        """One step of online PCA for the basis of p, after its use: the basis is a weight of its own. R: from project.

        Its step size follows the schedule of the learning rate.
        """
        projector, (side,) = self._projectors[p], self._projectors[p].sides
        assert projector.learner is not None
        rule, bits, _ = projector.learner
        basis, G = projector.open_basis(self.state[p], side, shape=p.shape), G.to(p.dtype)
        G, R = (G, R) if side == "right" else (G.mT, R.mT)
        gradient = pca_gradient(G, R, read_weight(basis, dtype=R.dtype), reg=group["proj_reg"])
        peak = 1 / group["update_proj_gap"] if group["proj_lr"] is None else group["proj_lr"]
        lr = peak * (group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0)
        own = dict(rule=rule, betas=RULES[rule].betas, eps=group["eps"], state_bits=bits, lr=lr, weight_decay=0.0)
        self._move(p, DEFAULTS | own, basis, gradient, projector=Projector(), seed=projector.seed, prefix=f"{side}.")

    def _move(
        self,
        p: Tensor,
        group: dict[str, Any],
        weight: Any,
        R: Tensor,
        *,
        projector: Projector,
        seed: int,
        prefix: str = "",
        residual: Residual | None = None,
    ) -> Tensor:
        """Updates a weight of p, or its basis, and the moments, which the state has under their names after `prefix`.

        weight: from open_weight or open_basis.  R: its projected gradient.  Returns the norm of R. ()
        """
        state, rule = self.state[p], RULES[group["rule"]]
        if prefix + "mass" not in state:
            create_moments(state, rule, like=R, bits=group["state_bits"], prefix=prefix)
        count_update(state, rule, betas=group["betas"], prefix=prefix)
        noise = seed, state[prefix + "step"], self._index[p]
        numbers = self._numbers(group, state, prefix=prefix, seed=mix_seed(*noise))
        moments = open_moments(state, rule, like=R, seed=mix_seed(*noise, False), compiled=self.compile, prefix=prefix)
        return self._update(
            R,
            weight,
            moments,
            bases=projector.bases(state) if projector.sides else {},
            numbers=numbers.as_tensors(R.dtype) if self.compile else numbers,
            plan=Plan(projector, rule, group["betas"], group["eps"], group["scale"]),
            residual=residual,
        )

    def refreshes(self, p: Tensor) -> dict[str, Any] | None:
        """What became of the bases of p; None for a parameter that is not projected.

        `refreshes` (computed so far), `failed`, `seconds` (spent, as the host saw it), `gap` (the present one, in
        updates; None where the basis learns instead), `overlap` (of the last two bases; None where no gap is lazy).
        """
        projector, state = self._projectors[p], self.state[p]
        if not projector.sides:
            return None
        return {
            "refreshes": state.get("refreshes", 0),
            "failed": state.get("failed_refreshes", 0),
            "seconds": state.get("refresh_seconds", 0.0),
            "gap": None if projector.learner else state.get("gap", projector.schedule.gap),
            "overlap": state.get("overlap"),
        }

    def details(self, p: Tensor) -> dict[str, Any] | None:
        """What was measured of p's subspace in this update, see MeasuredProjector.figures; None where nothing was."""
        projector = self._projectors.get(p)
        return projector.figures(self.state[p], like=p) if isinstance(projector, MeasuredProjector) else None

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

    def _numbers(self, group: dict[str, Any], state: dict[str, Any], *, prefix: str, seed: int) -> Numbers:
        """What is different in this update from others."""
        lr, weight_decay, decay = group["lr"], group["weight_decay"], RULES[group["rule"]].decay
        return Numbers(
            lr=lr,
            shrink=1 - lr * weight_decay * group["decoupled"],
            mass=state[prefix + "mass"],
            mass_sq=state[prefix + "mass_sq"],
            seed=seed,
            beta2=decay(state[prefix + "step"]) if decay else None,
            coupled_decay=None if group["decoupled"] else weight_decay,
            clip=group["clip"] or None,
        )
