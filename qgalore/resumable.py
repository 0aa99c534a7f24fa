"""How an optimizer of this package loads a state, and what travels with a copy or a pickle of it."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from qgalore.sharding import local


class ResumableOptimizer(torch.optim.Optimizer):
    """An optimizer whose state comes back as it was saved.

    torch.optim.Optimizer casts every tensor that it loads to the dtype of the parameter: float32 moments of bfloat16
    weights would lose their precision, and codes their meaning.
    """

    CONFIGURATION: ClassVar[tuple[str, ...]] = ()  # attributes that travel with a copy or a pickle

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.CONFIGURATION}}  # type: ignore[misc]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict() returned, as torch.optim does, but every tensor keeps its dtype.

        Parameters are matched by their order in the groups, whatever they are called there: numbers or names.
        Raises ValueError, before anything has changed, for the state of another optimizer.
        """
        given: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            given.update(loaded)
            groups = [self.check_group(group, params=params) for group, params in self._pairs(loaded)]
            for p, state in self._states(loaded):
                self.check_state(state, p)
            return {**loaded, "state": {}, "param_groups": groups or loaded["param_groups"]}

        def restore(_: torch.optim.Optimizer) -> None:
            known = {index for group in given["param_groups"] for index in group["params"]}
            self.state.update({key: value for key, value in given["state"].items() if key not in known})
            for p, state in self._states(given):
                state = self.upgrade_state(state)
                self.state[p] = {key: self.load_value(value, key=key, p=p) for key, value in state.items()}

        hooks = (  # behind the user's hooks before loading, before those after it
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def check_group(self, group: dict[str, Any], *, params: list[Tensor]) -> dict[str, Any]:
        """A loaded group, completed. params: the parameters that it is for. Raises ValueError if it does not fit."""
        return group

    def upgrade_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A loaded state of a parameter, of which an earlier version may have kept parts in another form."""
        return state

    def check_state(self, state: dict[str, Any], p: Tensor) -> None:
        """Raises ValueError if the loaded state of a parameter is not one of this optimizer."""

    def load_value(self, value: Any, *, key: str, p: Tensor) -> Any:
        """A value of a loaded state as this optimizer keeps it."""
        return local(value).to(p.device, copy=True) if torch.is_tensor(value) else copy.deepcopy(value)

    def _pairs(self, loaded: dict[str, Any]) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The loaded groups with the parameters that they are for; empty if the groups differ, which torch reports."""
        here, there = self.param_groups, loaded["param_groups"]
        if [len(group["params"]) for group in here] != [len(group["params"]) for group in there]:
            return []
        return [(group, own["params"]) for own, group in zip(here, there, strict=True)]

    def _states(self, loaded: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        state = loaded["state"]
        return [
            (p, state[index])
            for group, params in self._pairs(loaded)
            for index, p in zip(group["params"], params, strict=True)
            if index in state
        ]
