"""The road of one parameter through one update. Every optimizer of this package is this road with other plugs.

    G = the gradient                 (m, n)      p.grad, an ordinary tensor
    P refreshed from G, if due       (m, r) and/or (n, r); the moments follow
    R = P^T G Q                      projector   r numbers travel between the ranks where n did
    D = rule(R, moments)             rule        Adam, Lion, ...: moments read, updated in float32, written back
    U = lift(D, R, G)                lift        how the direction comes back: P D Q^T, or with the residual, ...
    w = w * (1 - lr * weight_decay) - lr * scale * U      in float32
    weight.write(w, seed)            the store decides how that is rounded
    P learns from G                  where it follows online PCA: the basis is a weight with an update of its own

Source: Zhao et al. 2024, GaLore, arXiv 2403.03507, algorithm 2. A parameter that is not projected takes the same road
with the identity for a projector.

`ParameterUpdate` walks the road as far as R; kernel.py has the rest, a function of tensors that may be compiled.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qgalore.clock import Clock
from qgalore.kernel import StepValues, UpdateConstants, compiled_update, write_update
from qgalore.rules.lifts import LIFTS, Lift
from qgalore.rules.moments import create_moments, follow_basis, open_moments
from qgalore.rules.rules import RULES, Rule
from qgalore.storage.quantized_weight import open_weight
from qgalore.storage.rounding import mix_seed
from qgalore.storage.stored import Stored
from qgalore.subspace.observer import Observer
from qgalore.subspace.online_pca import pca_gradient
from qgalore.subspace.projector import Projector, Turn
from qgalore.sync import GradSync


@dataclass
class Engine:
    """What the updates of all parameters share.

    seed: of the stochastic rounding.
    sync: sums gradients over data-parallel ranks.
    kernel: write_update, as it is or compiled.
    norms: of the gradients of this update, as projected, by parameter in the order of their updates.
    """

    seed: int
    sync: GradSync
    compiled: bool = False
    kernel: Callable[..., Tensor] = field(init=False)
    norms: dict[Tensor, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kernel = compiled_update() if self.compiled else write_update


class ParameterUpdate:
    """The updates of one parameter; or of its basis, where that learns.

    p: the parameter, whose state holds everything that is kept.
    group: its group of the optimizer: learning rate and other options, read in every update.
    states: the optimizer's state, by parameter.
    index: number of the parameter in the optimizer, which tells its noise from that of others; None for an only one.
    learner: the update of the basis, where it learns.
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
        self.p, self.group, self.index = p, group, index or 0
        self._identified = index is not None
        self.projector, self.engine, self.observer = projector, engine, observer
        self._states = states
        self.rule: Rule = RULES[group["rule"]]
        self.lift: Lift = LIFTS[group["lift"]]
        self.kinds = self.rule.moments(projector.projected_shape)
        self.seed, self.prefix = engine.seed, ""
        self.clock = Clock()
        self.learner: BasisUpdate | None = None
        self._due = False

    @property
    def state(self) -> dict[str, Any]:
        """What is kept of the parameter: tensors and plain numbers, by name."""
        return self._states[self.p]

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self.clock.steps(self.state)

    @property
    def always_whole(self) -> bool:
        """Whether R is never enough: p is not projected, its basis learns, or its lift needs G."""
        return not self.projector.sides or self.learner is not None or self.lift.needs_whole

    # An update, from a gradient in one piece

    def update(self, G: Tensor) -> None:
        """One update from this rank's gradient. G: (m, n). Raises RuntimeError for a sparse one."""
        if G.layout != torch.strided:
            raise RuntimeError("LowRankOptimizer does not support sparse gradients: use nn.Embedding(sparse=False)")
        if self.begin():
            self.update_whole(self.engine.sync.reduce(G))
        else:
            self.refresh_if_due(G)
            self.apply(self.engine.sync.reduce(self.project(G)))

    def begin(self) -> bool:
        """Begins an update; asked once. Returns whether it needs the whole gradient, over micro-batches and ranks:
        always, or because a basis is due that is computed from it."""
        self._identify()
        self.clock.begin(self.state)
        self._due = self.projector.due(self.state, step=self.steps + 1)
        return self.always_whole or (self._due and self.projector.sees_gradient)

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

    def begin_from(self, G: Tensor) -> bool:
        """`begin` where G (m, n) is the first of several micro-batches; a basis that needs no more is computed now.

        So is the first basis of all: every matrix is due then, and only one micro-batch's gradients need exist.
        """
        whole = self.begin()
        first = self.steps == 0 and not self.always_whole
        if whole and not (first and self._due):
            return True
        self.refresh_if_due(self.engine.sync.reduce(G.clone()) if first and whole else G)
        return False

    def update_whole(self, G: Tensor) -> None:
        """The update from the whole gradient, summed over micro-batches and ranks. G: (m, n)"""
        self.refresh_if_due(G)
        R = self.project(G)
        self.apply(R, G)
        if self.learner is not None and self.steps > 1:  # the first basis needs no step
            self.learner.learn(G, R)

    def refresh_if_due(self, G: Tensor) -> None:
        """Computes the bases from G (m, n), if `begin` found that they are due; the moments follow.

        Random bases need no more of G than its shape: any micro-batch's will do.
        """
        if not self._due:
            return
        self._due, state = False, self.state
        # The weight's dtype, also where micro-batches were summed in float32: bases are kept in it.
        with self.observer.refreshing(self.projector, state):
            turn = self.projector.refresh(G.to(self.p.dtype), state, step=self.steps + 1)
            if turn is not None and self.clock.counts_moments(state):
                self._follow(turn)

    def _follow(self, turn: Turn) -> None:
        policy, state = self.group["moments_on_refresh"], self.state
        seed = mix_seed(self.seed, self.steps, self.index, True)  # another one than in the update
        moments = open_moments(state, self.kinds, dtype=self.projector.wide, seed=seed)
        follow_basis(moments, self.kinds, turn, policy=policy)
        if policy == "reset":
            self.clock.reset_mass(state)

    def project(self, G: Tensor) -> Tensor:
        """R = P^T G Q, in float32 or wider. (m, n) -> (r or m, r or n)"""
        bases = self.projector.open(self.state)
        with self.observer.projecting(G, step=self.steps + 1):
            R = self.projector.project(G, bases)
        self.observer.projected(G, R, bases, projector=self.projector)
        return R

    def apply(self, R: Tensor, G: Tensor | None = None) -> None:
        """Updates moments and weight from the projected gradient R, summed over micro-batches and ranks.

        G: (m, n), the whole gradient, where the lift needs it.
        """
        self.engine.norms[self.p] = self._run(R, open_weight(self.p), G=G)
        torch.autograd.graph.increment_version(self.p)  # what was written may be the inside of a QuantizedWeight

    def _run(self, R: Tensor, weight: Stored, *, G: Tensor | None = None) -> Tensor:
        """Counts the update and calls the kernel on the stored tensors. Returns the norm of R. ()"""
        state, group, clock, compiled = self.state, self.group, self.clock, self.engine.compiled
        options = group["betas"], group["eps"], group["scale"]
        clock.begin(state)
        if not clock.counts_moments(state):
            bits = group["state_bits"]
            create_moments(state, self.kinds, bits=bits, dtype=R.dtype, device=R.device, prefix=self.prefix)
        clock.tick(state, betas=group["betas"], decay=self.rule.decay)
        noise = self.seed, clock.steps(state), self.index
        seed = mix_seed(*noise, False)
        step = StepValues.of(group, self.rule, clock, state, seed=mix_seed(*noise))
        needs_whole, name = self.lift.needs_whole, self.lift.remembers
        # Rewriting a quantized weight may round it another way: without a step it must stay as it is.
        still = None if group["lr"] else {part: tensor.clone() for part, tensor in weight.parts.items()}
        norm = self.engine.kernel(
            R,
            weight,
            open_moments(state, self.kinds, dtype=R.dtype, seed=seed, compiled=compiled, prefix=self.prefix),
            bases=self.projector.open(state),
            step=step.as_tensors(R.dtype) if compiled else step,
            constants=UpdateConstants(self.projector, self.rule, self.lift, *options),
            G=G.to(self.p.dtype) if G is not None and needs_whole else None,
            last=state.setdefault(name, R.new_zeros(())) if name else None,
            watch=None if compiled else self.observer.lifting(),
        )
        for part, tensor in (still or {}).items():
            weight.parts[part].copy_(tensor)
        return norm

    def undo(self) -> None:
        """Takes back what this update has counted, where its gradient was not finite: the kernel wrote nothing."""
        self.clock.undo(self.state)
        if self.learner is not None:
            self.learner.clock.undo(self.state)

    def end(self) -> None:
        """The update is over."""
        self.clock.end()
        if self.learner is not None:
            self.learner.clock.end()


class BasisUpdate(ParameterUpdate):
    """The updates of a basis that learns: a weight of its own, which is not projected, with moments of its own.

    of: the update of the parameter, in whose state all that is kept has the basis' side before its name.
    """

    def __init__(self, of: ParameterUpdate, *, group: dict[str, Any]) -> None:
        (side,) = of.projector.sides
        identity = Projector(of.projector.basis_shape(side), of.projector.dtype)
        super().__init__(of.p, group=group, states=of._states, index=of.index, projector=identity, engine=of.engine,
                         observer=Observer())  # fmt: skip
        self.of, self.side, self.prefix, self.seed = of, side, f"{side}.", of.projector.seed
        self.clock = Clock(self.prefix)

    def learn(self, G: Tensor, R: Tensor) -> None:
        """One step of online PCA, after the basis has been used. Its step size follows the learning rate's schedule.

        G: (m, n), the whole gradient.
        R: what project made of it.
        """
        options, projector = self.of.group, self.of.projector
        basis, G = projector.open(self.state)[self.side], G.to(self.p.dtype)
        G, R = (G, R) if self.side == "right" else (G.mT, R.mT)
        gradient = pca_gradient(G, R, basis.read(R.dtype), reg=options["proj_reg"])
        peak = 1 / options["update_proj_gap"] if options["proj_lr"] is None else options["proj_lr"]
        self.group["lr"] = peak * (options["lr"] / options["peak_lr"] if options["peak_lr"] else 1.0)
        self._run(gradient, basis)


def _fingerprint(p: Tensor) -> int:
    """A number that depends on the shape and the first elements of a parameter. Waits for the device."""
    first = next(iter(open_weight(p).parts.values())).flatten()[:64]
    values = [] if p.is_meta else first.tolist()
    return zlib.crc32(repr((tuple(p.shape), values)).encode())
