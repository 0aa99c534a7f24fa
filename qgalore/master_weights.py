"""Any torch optimizer in float32 for weights of lower precision.

In bfloat16 an EMA with decay 0.999 never decays, and an update below 1/256 of the weight is lost; torch's optimizers
work in the dtype of their parameters. So they get float32 copies, and the model gets the result, rounded.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class MasterWeights(torch.optim.Optimizer):
    """Steps `optimizer` on float32 copies of the parameters and copies the result back.

    optimizer: a torch.optim class.
    groups: its parameter groups, of lower-precision parameters.
    options: its keyword arguments.
    Learning rates and other settings are those of this object's param_groups.
    Memory: 4 bytes a parameter beside the moments, and the gradients of one update once more in float32.
    """

    def __init__(self, optimizer: type[torch.optim.Optimizer], groups: list[dict[str, Any]], **options: Any) -> None:
        copies = [group | {"params": [p.detach().float().clone() for p in group["params"]]} for group in groups]
        self.inner = optimizer(copies, **options)
        super().__init__(groups, dict(self.inner.defaults))

    @classmethod
    def around(
        cls, optimizer: type[torch.optim.Optimizer], groups: list[dict[str, Any]], **options: Any
    ) -> torch.optim.Optimizer:
        """The optimizer itself where every parameter is float32 or wider, else one on master weights."""
        if all(p.dtype in (torch.float32, torch.float64) for group in groups for p in group["params"]):
            return optimizer(groups, **options)  # type: ignore[call-arg]
        return cls(optimizer, groups, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Gradients are read from the model's parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})
            for p, master in zip(group["params"], inner["params"], strict=True):
                master.grad = None if p.grad is None else p.grad.float()
        self.inner.step()
        for p, master in self._pairs():
            p.copy_(master)
            master.grad = None
        return loss

    def states(self) -> dict[Tensor, dict[str, Any]]:
        """The state of each of the model's parameters: its float32 copy, `master`, and what the optimizer keeps."""
        return {p: {"master": master, **self.inner.state.get(master, {})} for p, master in self._pairs()}

    @torch.no_grad()
    def load_states(self, states: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
        """Takes back what `states` gave, one parameter after the other."""
        masters = dict(self._pairs())
        for p, state in states:
            masters[p].copy_(state["master"])
            self.inner.state[masters[p]] = {key: value for key, value in state.items() if key != "master"}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (p, master)
            for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True)
            for p, master in zip(group["params"], inner["params"], strict=True)
        ]
