"""Any torch optimizer in float32 for weights of lower precision.

In bfloat16 an average with decay 0.999 never decays, and an update below 1/256 of the weight is lost; torch's
optimizers work in the dtype of their parameters. So they get float32 copies, and the model gets the result, rounded.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qgalore.resumable import ResumableOptimizer

MASTER = "master"  # the float32 copy's key in the state of a parameter


class MasterWeights(ResumableOptimizer):
    """Steps a torch optimizer on float32 copies of the parameters and copies the result back.

    The state of a parameter holds its copy, `master`, beside what the optimizer keeps. The copy is made in the first
    step that has a gradient for the parameter.
    Memory: 4 bytes an element beside the moments, and the gradients of one update once more in float32.
    """

    CONFIGURATION = ("kind",)

    def __init__(self, kind: type[torch.optim.Optimizer], params: Iterable[Any], **options: Any) -> None:
        """
        kind: a class of torch.optim.
        params: parameters or groups, as for any torch optimizer.
        options: keyword arguments of the class.
        """
        self.kind = kind
        super().__init__(params, kind([torch.zeros(1)], **options).defaults)  # type: ignore[call-arg]

    @classmethod
    def around(
        cls, kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]], **options: Any
    ) -> torch.optim.Optimizer:
        """The optimizer itself if every parameter has at least the precision of float32, else one on master weights."""
        if all(torch.finfo(p.dtype).bits >= 32 for group in groups for p in group["params"]):
            return kind(groups, **options)  # type: ignore[call-arg]
        return cls(kind, groups, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. Raises ValueError for complex parameters."""
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError("complex parameters have no float32 copies: give them to the optimizer itself")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        masters = {p: self._master(p) for group in self.param_groups for p in group["params"] if p.grad is not None}
        groups = [
            {**group, "params": [masters[p] for p in group["params"] if p in masters]} for group in self.param_groups
        ]
        inner = self.kind(groups)  # type: ignore[call-arg]
        for p, master in masters.items():
            assert p.grad is not None
            master.grad = p.grad.float()
            inner.state[master] = {key: value for key, value in self.state[p].items() if key != MASTER}
        self.kind.step.__wrapped__(inner)  # type: ignore[attr-defined]  # the hooks of all optimizers run for this one
        for p, master in masters.items():
            master.grad = None
            self.state[p] = {MASTER: master, **inner.state[master]}
            p.copy_(master)
        return loss

    def _master(self, p: Tensor) -> Tensor:
        kept = self.state[p].get(MASTER)
        return p.detach().to(torch.float32, copy=True) if kept is None else kept

    def check_state(self, state: dict[str, Any], p: Tensor) -> None:
        if MASTER not in state:
            raise ValueError(
                f"this is not the state of {self.kind.__name__} on master weights: there is no '{MASTER}' beside "
                f"{', '.join(map(repr, state)) or 'nothing'}"
            )

    def load_value(self, value: Any, *, key: str, p: Tensor) -> Any:
        on_host = key == "step" and torch.is_tensor(value)  # torch's optimizers count on the CPU
        return value.clone() if on_host else super().load_value(value, key=key, p=p)
