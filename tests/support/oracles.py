"""The rules as their papers write them, in float64, for tests to compare with."""

import math
from collections.abc import Callable, Container

import torch


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(self, *, beta1=0.9, beta2=0.999, eps=1e-8):
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, g):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m, v = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return m / (v.sqrt() + self.eps)

    def finish(self, U):
        return U


class Lion(Adam):
    """Chen et al. 2023, algorithm 2; the sign is taken by `finish`, after the way back (Liang et al. 2024)."""

    def step(self, g):
        direction = 0.9 * self.m + 0.1 * g
        self.m = 0.99 * self.m + 0.01 * g
        return direction

    def finish(self, U):
        return torch.sign(U)


class Adafactor(Adam):
    """Shazeer and Stern 2018, algorithm 4 for matrices and 5 for the rest, with a given step size instead of a relative
    one; the first moment averages the clipped updates, with Adam's bias correction."""

    rows = columns = 0.0

    def step(self, g):
        self.t += 1
        beta2, squares = 1 - self.t**-0.8, g**2 + 1e-30
        if g.ndim == 2:
            self.rows = beta2 * self.rows + (1 - beta2) * squares.sum(1)
            self.columns = beta2 * self.columns + (1 - beta2) * squares.sum(0)
            estimate = torch.outer(self.rows, self.columns) / self.rows.sum()
        else:
            estimate = self.v = beta2 * self.v + (1 - beta2) * squares
        u = g / estimate.sqrt()
        u = u / max(1.0, math.sqrt((u**2).mean()))
        self.m = self.beta1 * self.m + (1 - self.beta1) * u
        return self.m / (1 - self.beta1**self.t)


class Sgd(Adam):
    """With momentum, as torch.optim.SGD has it."""

    def step(self, g):
        self.m = 0.9 * self.m + g
        return self.m


class Descent(Adam):
    """The gradient itself."""

    def step(self, g):
        return g


ORACLES = {"descent": Descent, "adam": Adam, "lion": Lion, "adafactor": Adafactor, "sgd": Sgd}


class GaLore:
    """GaLore for one matrix: Zhao et al. 2024, algorithm 2, with Lion and online PCA as Liang et al. 2024 have them.

    proj_type: the sides that are projected, on bases of `rank` columns.
    refreshes: the updates, from 1, at which the bases are computed: by SVD of that update's gradient, or by `drawn`,
        which gives the basis of an update where it is random.
    policy: what the rule's moments do then: "project" (the first one follows the basis), "keep" or "reset".
    share: how far a basis turns at a refresh; 1 is the paper's, less is ours for gaps under 10.
    learner: the rule by which the one basis learns instead, at the end of each update but the first, by steps of
        `step_size` down the gradient, by autograd, of what it misses and of `reg` times its distance from orthonormal.
    """

    def __init__(
        self,
        W: torch.Tensor,
        *,
        rank: int,
        scale: float,
        lr: float,
        weight_decay: float,
        refreshes: Container[int],
        proj_type: str = "std",
        rule: Callable[[], Adam] = Adam,
        policy: str = "project",
        share: float = 1.0,
        drawn: Callable[[], torch.Tensor] | None = None,
        learner: Adam | None = None,
        step_size: float = 0.0,
        reg: float = 0.0,
    ):
        m, n = W.shape
        self.W, self.rank, self.scale, self.lr, self.weight_decay = W.clone(), rank, scale, lr, weight_decay
        self.left = proj_type in ("left", "full") or proj_type == ("std" if m < n else "reverse_std")
        self.right = proj_type in ("right", "full") or proj_type == ("std" if m >= n else "reverse_std")
        assert self.left or self.right, proj_type
        self.refreshes, self.policy, self.share, self.drawn = refreshes, policy, share, drawn
        self.new_rule, self.rule = rule, rule()
        self.learner, self.step_size, self.reg = learner, step_size, reg
        self.t, self.P, self.Q = 0, None, None

    def update(self, G: torch.Tensor) -> None:
        """One update of W, given its gradient."""
        self.t += 1
        first = self.P is None
        if first or (self.learner is None and self.t in self.refreshes):
            self.refresh(G)
        N = self.rule.step(self.P.T @ G @ self.Q)
        U = self.rule.finish(self.scale * self.P @ N @ self.Q.T)
        self.W = self.W - self.lr * self.weight_decay * self.W - self.lr * U
        if self.learner is not None and not first:
            self.learn(G)

    def refresh(self, G: torch.Tensor) -> None:
        """Sets P and Q, the identity on a side that is not projected, and lets the moments follow."""
        P, Q = self.P, self.Q
        self.P = self.basis(P, G) if self.left else torch.eye(len(G), dtype=G.dtype)
        self.Q = self.basis(Q, G.T) if self.right else torch.eye(len(G.T), dtype=G.dtype)
        if P is not None and self.policy == "project":
            self.rule.m = (self.P.T @ P) @ self.rule.m @ (Q.T @ self.Q)
        elif self.policy == "reset":
            self.rule = self.new_rule()

    def basis(self, old: torch.Tensor | None, G: torch.Tensor) -> torch.Tensor:
        """That of G's columns."""
        if self.drawn is not None:
            return self.drawn()
        new = torch.linalg.svd(G, full_matrices=False).U[:, : self.rank]
        new = new * torch.stack([column[column.abs().argmax()] for column in new.unbind(1)]).sign()
        return new if old is None or self.share == 1 else self.turned(old, new)

    def turned(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """From old towards new, which is first rotated to match: the polar factor of new^T old, then Gram-Schmidt."""
        cross = new.T @ old
        values, vectors = torch.linalg.eigh(cross.T @ cross)
        new = new @ cross @ vectors @ torch.diag(values**-0.5) @ vectors.T
        columns = []
        for column in ((1 - self.share) * old + self.share * new).unbind(1):
            for earlier in columns:
                column = column - earlier * (earlier @ column)
            columns.append(column / column.norm())
        return torch.stack(columns, dim=1)

    def learn(self, G: torch.Tensor) -> None:
        """One step of the projected side's basis, as if that side were the right one."""
        G, old = (G.T, self.P) if self.left else (G, self.Q)
        Q = old.clone().requires_grad_()
        unit = G / G.norm()
        missed = (unit - unit @ Q @ Q.T).square().sum()
        missed = missed + self.reg * (Q.T @ Q - torch.eye(self.rank)).square().sum()
        (gradient,) = torch.autograd.grad(missed, Q)
        new = old - self.step_size * self.learner.finish(self.learner.step(gradient))
        self.P, self.Q = (new, self.Q) if self.left else (self.P, new)


class AveragedGaLore(GaLore):
    """The same with bases from S, the average of G G^T P with decay b = 1 - 1 / min(gap, 10), each term over its trace.

    The first basis is `drawn`; each later one is the Gram-Schmidt basis of S, or part of the way there at short gaps.
    """

    def __init__(self, W: torch.Tensor, *, gap: int, **options):
        super().__init__(W, **options)
        assert self.left != self.right
        self.S, self.b, self.share = 0.0, 1 - 1 / min(gap, 10), min(1.0, gap / 10)

    def update(self, G: torch.Tensor) -> None:
        super().update(G)
        G, P = (G, self.P) if self.left else (G.T, self.Q)
        term = G @ G.T @ P
        self.S = self.b * self.S + (1 - self.b) * term / (P.T @ term).trace()

    def basis(self, old: torch.Tensor | None, G: torch.Tensor) -> torch.Tensor:
        if old is None:
            return super().basis(old, G)
        new = gram_schmidt(self.S)
        return new if self.share == 1 else gram_schmidt((1 - self.share) * old + self.share * new)


def gram_schmidt(Y: torch.Tensor) -> torch.Tensor:
    """The columns of Y (m, r), each without the ones before it, of norm 1."""
    columns: list[torch.Tensor] = []
    for column in Y.unbind(1):
        for _ in range(2):  # once more, for the last bits
            for earlier in columns:
                column = column - earlier * (earlier @ column)
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)
