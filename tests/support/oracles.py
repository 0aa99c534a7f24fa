"""The rules as their papers write them, in float64, for tests to compare with."""

import math

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


ORACLES = {"adam": Adam, "lion": Lion, "adafactor": Adafactor, "sgd": Sgd}
