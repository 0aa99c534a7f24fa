"""One update of one parameter. Every optimizer of this package takes these steps, with other parts plugged in.

    G = the gradient                 (m, n)      p.grad, an ordinary tensor
    P, Q refreshed from G if due     projector   (m, r) and/or (n, r); the moments are carried over
    R = P^T G Q                      projector   ranks exchange R instead of G
    D = rule(R, moments)             rule        Adam, Lion, ...: moments are read, updated in float32, written back
    U = lift(D, R, G)                lift        back to (m, n): P D Q^T, or with the residual, ...
    w = w * (1 - lr * weight_decay) - lr * scale * U      in float32, unless a coin says that w is skipped (skips)
    weight.write(w, seed)            codec       rounds
    P learns from G                  learner     online PCA: the basis is a weight with an update of its own

Source: Zhao et al. 2024, GaLore, arXiv 2403.03507, algorithm 2. For a parameter that is not projected, the projector is
the identity.

`ParameterUpdate` goes as far as R; kernel.py has the rest, a function of tensors that may be compiled.
"""

import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qgalore.clock import Clock
from qgalore.compiling import compiled_rows
from qgalore.factored import dense
from qgalore.kernel import StepValues, UpdateConstants, write_rows, write_update
from qgalore.rules.lifts import LIFTS, Lift
from qgalore.rules.moments import Moment, create_moments, follow_basis, open_moments
from qgalore.rules.rules import RULES, Rule
from qgalore.rules.skips import SKIPS, Skip
from qgalore.sharding import Shard, shard_of
from qgalore.storage.quantized_weight import open_weight
from qgalore.storage.rounding import mix_seed
from qgalore.storage.stored import Stored
from qgalore.subspace.observer import Observer
from qgalore.subspace.projector import Projector, Turn


@dataclass
class Engine:
    """Shared by the updates of all parameters."""

    seed: int  # decides the stochastic rounding
    compiled: bool = False  # whether the kernel is compiled
    kernel: Callable[..., None] = field(init=False)  # write_rows, compiled or not
    norms: dict[Tensor, Tensor] = field(default_factory=dict)  # norms of this update's projected gradients

    def __post_init__(self) -> None:
        self.kernel = compiled_rows() if self.compiled else write_rows


class ParameterUpdate:
    """The updates of one parameter, or of a basis that learns (BasisUpdate).

    Everything that is kept between updates is in the optimizer's state of the parameter.
    """

    def __init__(
        self,
        p: Tensor,
        *,
        group: dict[str, Any],
        states: Mapping[Tensor, dict[str, Any]],
        index: int | None,
        projector: Projector,
        engine: Engine,
        observer: Observer,
    ) -> None:
        """
        p: the parameter.
        group: the parameter's group: learning rate and other options, read in every update.
        states: the optimizer's state.
        index: number of the parameter in the optimizer, which tells its noise from that of others; None for the only
            parameter of an optimizer.
        projector: the projection of its gradient.
        engine: shared with the other parameters.
        observer: measures refreshes and projections.
        """
        self.p, self.group, self.index = p, group, index or 0
        self._identified = index is not None
        self.projector, self.engine, self.observer = projector, engine, observer
        self._states = states
        self.rule: Rule = RULES[group["rule"]]
        self.lift: Lift = LIFTS[group["lift"]]
        self.skip: Skip = SKIPS[group["skip_updates"]]
        self.shard = shard_of(p)
        self.kinds = self.rule.moments(projector.projected_shape)
        self.seed, self.prefix = engine.seed, ""
        self.clock = Clock()
        self.learner: BasisUpdate | None = None
        self._due = False  # whether a refresh is
        self.whole = False  # whether this update needs the whole gradient

    @property
    def state(self) -> dict[str, Any]:
        """Tensors and plain numbers that are kept of the parameter, by name."""
        return self._states[self.p]

    @property
    def steps(self) -> int:
        """Number of updates so far."""
        return self.clock.steps(self.state)

    @property
    def always_whole(self) -> bool:
        """Whether every update needs G: p is not projected, its basis learns from all of them, or its lift uses G."""
        return not self.projector.sides or self.learner is not None or self.lift.needs_whole

    def prepare(self, G: Tensor) -> Tensor:
        """Begins an update. Returns this rank's part of it, to be summed over the ranks and given to `complete`.

        G: this rank's gradient, (m, n); of a sharded parameter, its rows. Raises RuntimeError if it is sparse.
        """
        if G.layout != torch.strided:
            raise RuntimeError("LowRankOptimizer does not support sparse gradients: use nn.Embedding(sparse=False)")
        if not self.begin():
            self.refresh_if_due(G)
        return self.part(G)

    def part(self, G: Tensor) -> Tensor:
        """What is summed of a gradient G (m, n): G if this update needs the whole gradient, else R."""
        return dense(G) if self.whole else self.project(G)

    def complete(self, total: Tensor) -> None:
        """The update from the sum of all parts, over micro-batches and ranks."""
        G = R = total
        if self.whole:
            self.refresh_if_due(G)
            R = self.project(G)
        R = R.to(torch.promote_types(R.dtype, torch.float32)) if self.projector.sides else R
        self.engine.norms[self.p] = self._run(R, open_weight(self.p), G=G if self.whole else None)
        torch.autograd.graph.increment_version(self.p)  # autograd does not see the writing of a QuantizedWeight's parts
        if self.learner is not None:
            self.learner.learn(G, R)

    def begin(self) -> bool:
        """Begins an update. Returns whether it needs the whole gradient, summed over micro-batches and ranks.

        It does if `always_whole`, and if a basis is due that is computed from the gradient.
        """
        self._identify()
        self.clock.begin(self.state)
        self._due = self.projector.due(self.state, step=self.steps + 1)
        self.whole = self.always_whole or (self._due and self.projector.sees_gradient)
        return self.whole

    def _identify(self) -> None:
        """Tells the noise of an optimizer's only parameter, whose index says nothing, by the values it began with.

        People who update layer by layer make an optimizer for each parameter; all would draw the same noise.
        """
        if not self._identified:
            self._identified = True
            self.index = self.state.setdefault("stream", _fingerprint(self.p))
            seed = mix_seed(self.engine.seed, self.index)
            self.projector = replace(self.projector, seed=seed)
            if self.learner is not None:
                self.learner.index, self.learner.seed = self.index, seed

    @property
    def starts_early(self) -> bool:
        """Whether this is the first update, and the first basis is computed from the gradient."""
        return self.projector.sees_gradient and not self.always_whole and self.steps == 0

    def begin_early(self) -> bool:
        """Begins an update of several micro-batches. Returns whether its basis comes from the first of them alone.

        The first basis does: every matrix is due in the first update, and sums of all their gradients would need the
        memory of a whole model. `start_from` takes the gradient.
        """
        return self.begin() and self.starts_early

    def start_from(self, G: Tensor) -> None:
        """Computes the first basis from the gradient G (m, n) of one micro-batch, summed over the ranks."""
        self.refresh_if_due(G)
        self.whole = False

    def refresh_if_due(self, G: Tensor) -> None:
        """Computes the bases from G (m, n) if `begin` found them due, and carries the moments over.

        Random bases use the shape of G only: the gradient of any micro-batch will do.
        """
        if not self._due:
            return
        self._due, state = False, self.state
        # Bases are kept in the dtype of the weight, although sums over micro-batches may be float32.
        with self.observer.refreshing(self.projector, state):
            average = None if self.learner is None else self.learner.average()
            turn = self.projector.refresh(
                dense(G).to(self.p.dtype), state, step=self.steps + 1, shard=self.shard, average=average
            )
            if turn is not None and self.clock.counts_moments(state):
                self._follow(turn)

    def _follow(self, turn: Turn) -> None:
        policy, state = self.group["moments_on_refresh"], self.state
        seed = mix_seed(self.seed, self.steps, self.index, True)  # not the seed of the update
        moments = self._moments(self.projector.wide, seed=seed)
        follow_basis(moments, self.kinds, turn, policy=policy)
        if policy == "reset":
            self.clock.reset_mass(state)

    def project(self, G: Tensor) -> Tensor:
        """R = P^T G Q, see Projector.project. (m, n) -> (r or m, r or n)"""
        bases = self.projector.open(self.state)
        with self.observer.projecting(G, step=self.steps + 1):
            R = self.projector.project(G, bases)
        self.observer.projected(G, R, bases, projector=self.projector)
        return R

    def _run(self, R: Tensor, weight: Stored, *, G: Tensor | None = None) -> Tensor:
        """Counts the update and calls the kernel on the stored tensors. Returns the norm of R. ()"""
        state, group, clock, compiled = self.state, self.group, self.clock, self.engine.compiled
        wide = torch.promote_types(R.dtype, torch.float32)
        options = group["betas"], group["eps"], group["scale"] * self.rule.gain(self.projector.shape)
        clock.begin(state)
        if not clock.counts_moments(state):
            self.create_moments(wide, device=R.device)
        clock.tick(state, betas=group["betas"], decay=self.rule.decay)
        noise = self.seed, clock.steps(state), self.index
        seed = mix_seed(*noise, False)
        lr = self.skip.lr(group["lr"], seed=mix_seed(*noise, 2))  # 0 and 1 are in the seeds of moments
        step = StepValues.of(group, self.rule, clock, state, lr=lr, seed=mix_seed(*noise))
        needs_whole = self.lift.needs_whole
        absorbs, skip = group["error_feedback"] != "none", self.skip
        spends = bool(self.projector.sides) and not (needs_whole or skip.remembers or self.learner)
        constants = UpdateConstants(
            self.projector, self.rule, self.lift, *options, aligned=bool(skip.remembers), absorbs=absorbs, spends=spends
        )
        return write_update(
            R,
            weight,
            self._moments(wide, seed=seed, compiled=compiled),
            kernel=self.engine.kernel,
            bases=self.projector.open(state),
            step=step.as_tensors(wide) if compiled else step,
            constants=constants,
            G=G.to(self.p.dtype) if G is not None and needs_whole else None,
            last=self.remembered(self.lift.remembers, wide, device=R.device),
            alignment=self.remembered(self.skip.remembers, wide, device=R.device),
            watch=nullcontext if compiled else self.observer.lifting,
            whole_norm=self.shard.norm if self.shard is not None and step.clip is not None else None,
        )

    def remembered(self, name: str | None, dtype: torch.dtype, *, device: torch.device) -> Tensor | None:
        """The number of that name that a lift or a skip keeps in the state, 0 at first; None without a name. (1,)

        In the state it is (). Compiled by torch 2.13, writing to such a float64 tensor on the CPU is lost, so it is
        given on as a vector of one.
        """
        return self.state.setdefault(name, torch.zeros((), dtype=dtype, device=device)).view(1) if name else None

    def create_moments(self, dtype: torch.dtype, *, device: torch.device) -> None:
        """Puts moments of zeros into the state. dtype: that of the gradients which they average."""
        whole = None if self.shard is None else self.rule.moments(self._whole_shape(self.shard))
        bits, prefix = self.group["state_bits"], self.prefix
        create_moments(self.state, self.kinds, bits=bits, dtype=dtype, device=device, prefix=prefix, whole=whole)

    def _whole_shape(self, shard: Shard) -> torch.Size:
        """The shape of R over all ranks."""
        return torch.Size((shard.whole[0], *self.projector.projected_shape[1:]))

    def _moments(self, dtype: torch.dtype, *, seed: int, compiled: bool = False) -> list[Moment]:
        start = 0 if self.shard is None else self.shard.start
        return open_moments(
            self.state, self.kinds, dtype=dtype, seed=seed, compiled=compiled, prefix=self.prefix, row_start=start
        )

    def allocate(self) -> None:
        """Puts zeros into the state for every tensor that training will hold."""
        device, wide = self.p.device, self.projector.wide
        self.projector.allocate(self.state, device=device)
        for each in [self] if self.learner is None else [self, self.learner]:
            each.create_moments(wide, device=device)
        for name in (self.lift.remembers, self.skip.remembers):
            self.remembered(name, wide, device=device)

    def undo(self) -> None:
        """Takes back the counts of this update, whose gradient was not finite: the kernel has written nothing."""
        self.clock.undo(self.state)
        if self.learner is not None:
            self.learner.clock.undo(self.state)

    def end(self) -> None:
        self.clock.end()
        if self.learner is not None:
            self.learner.clock.end()

    def refreshes(self) -> dict[str, Any] | None:
        """The history of the bases; None for a parameter that is not projected.

        refreshes: number of refreshes so far.
        failed: number of refreshes that failed.
        seconds: time spent in refreshes since the start or the last resume, as the host saw it.
        gap: updates from one refresh to the next; None for a basis that learns.
        overlap: overlap of the last two bases; None unless refreshes are lazy.
        """
        if not self.projector.sides:
            return None
        state, schedule = self.state, self.projector.schedule
        return {
            "refreshes": state.get("refreshes", 0),
            "failed": state.get("failed_refreshes", 0),
            "seconds": self.observer.refresh_seconds,
            "gap": None if self.projector.learns else state.get("gap", schedule.gap),
            "overlap": state.get("overlap"),
        }


class BasisUpdate(ParameterUpdate):
    """The updates of what a basis learns from every gradient, see basis_updates.py: a tensor of the basis' shape.

    Its moments and counts are in the state of the parameter, with the side before their names: `right.exp_avg`.
    """

    def __init__(self, of: ParameterUpdate, *, group: dict[str, Any]) -> None:
        (side,) = of.projector.sides
        identity = Projector(of.projector.basis_shape(side), of.projector.dtype)
        super().__init__(of.p, group=group, states=of._states, index=of.index, projector=identity, engine=of.engine,
                         observer=Observer())  # fmt: skip
        self.of, self.side, self.prefix, self.seed = of, side, f"{side}.", of.projector.seed
        self.clock = Clock(self.prefix)

    def learn(self, G: Tensor, R: Tensor) -> None:
        """Learns from a gradient after the basis has been used.

        G: the whole gradient, (m, n).
        R: its projection, float32 or wider.
        """
        raise NotImplementedError

    def average(self) -> Tensor | None:
        """What a refresh computes the next basis from, see BasisMethod; None if that is the gradient."""
        return None

    def facing(self, G: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """G and R with the basis on the right: G in the parameter's dtype, (k, l), and R, (k, r)."""
        G = G.to(self.p.dtype)
        return (G, R) if self.side == "right" else (G.mT, R.mT)


def _fingerprint(p: Tensor) -> int:
    """A number that depends on the shape and the first elements of a parameter. Waits for the device."""
    first = next(iter(open_weight(p).parts.values())).flatten()[:64]
    values = [] if p.is_meta else first.tolist()
    return zlib.crc32(repr((tuple(p.shape), values)).encode())
