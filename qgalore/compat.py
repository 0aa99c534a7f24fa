"""The optimizers under the names of galore_torch and q_galore_torch: an import line is all that changes.

    from qgalore.compat import GaLoreAdamW    # was: from galore_torch import GaLoreAdamW

Arguments, their order and their defaults are those of the packages, and so are the keys of a group. Where a package
would do something else than it says, docs/reference_defects.md has what happens here. In a group, `subspace: "svd"`
and `moments_on_refresh: "keep"` give the packages' own bases and moments; the defaults are faster and train better.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qgalore.factory import LAZY_THRESHOLD
from qgalore.optimizer import LowRankOptimizer
from qgalore.storage.convert import quantize_module_weight, shared_parameters

# What a group that cannot be projected has in place of its own rank and scale.
UNPROJECTED = {"rank": None, "scale": 1.0}


class _Twin(LowRankOptimizer):
    """A LowRankOptimizer whose groups need not say by which rule they are trained."""

    CONFIGURATION = (*LowRankOptimizer.CONFIGURATION, "group")
    PROJECTED: ClassVar[dict[str, Any]] = {}  # options of groups with a rank
    group: Mapping[str, Any] = {}  # options of all groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. Vectors in a group of their own are not projected, whatever rank the group has."""
        params = param_group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        group = {**self.group, **param_group, "params": members}
        if group.get("rank") is not None:
            vectors = all((p[1] if isinstance(p, tuple) else p).ndim != 2 for p in members)
            group = group | UNPROJECTED if vectors else self.PROJECTED | group
        super().add_param_group(group)


class GaLoreAdamW(_Twin):
    """galore_torch.GaLoreAdamW. `no_deprecation_warning` is accepted: there is no such warning here."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
    ) -> None:
        self.group = {"correct_bias": correct_bias}
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class GaLoreAdamW8bit(_Twin):
    """galore_torch.GaLoreAdamW8bit, without bitsandbytes.

    `optim_bits`, `args`, `min_8bit_size` and `block_wise` have no effect, `is_paged` has none but a warning.
    Raises ValueError for `amsgrad` and for a `percentile_clipping` below 100.
    """

    group = {"state_bits": 8}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
    ) -> None:
        _only(self, amsgrad=(amsgrad, False), percentile_clipping=(percentile_clipping, 100))
        if is_paged:
            warnings.warn("is_paged has no effect: the moments stay on the device of their weights", stacklevel=2)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class GaLoreAdafactor(_Twin):
    """galore_torch.GaLoreAdafactor with a given learning rate, which means `relative_step=False`.

    beta1: decay rate of the average of the clipped directions; None for none.
    Raises ValueError for relative steps, steps scaled by the weights' size, and other constants than the usual ones.
    """

    group = {"rule": "adafactor", "correct_bias": False}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool | None = None,
        relative_step: bool | None = None,
        warmup_init: bool = False,
    ) -> None:
        # The package refuses a learning rate with neither word: here it means the only thing that it can mean.
        plain = scale_parameter is None and relative_step is None
        if lr is None or warmup_init or not (plain or (scale_parameter is False and relative_step is False)):
            raise ValueError(
                "GaLoreAdafactor takes its step size from you only: give it lr=..., scale_parameter=False and "
                "relative_step=False"
            )
        _only(self, clip_threshold=(clip_threshold, 1.0), decay_rate=(decay_rate, -0.8))
        super().__init__(params, lr=lr, betas=(beta1 or 0.0, 0.0), weight_decay=weight_decay)


class GaLoreLion(_Twin):
    """GaLoreLion of Online Subspace Descent's galore_torch."""

    group = {"rule": "lion"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)


class QGaLoreAdamW8bit(GaLoreAdamW8bit):
    """q_galore_torch.QGaLoreAdamW8bit: the arguments of GaLoreAdamW8bit; refreshes are lazy.

    A group's `cos_threshold` is compared with the overlap of subspaces, not with the cosine of one vector.
    """

    PROJECTED = {"cos_threshold": LAZY_THRESHOLD}


class QGaLoreAdamW8bit_simulate(QGaLoreAdamW8bit):
    """The same: whether weights are in codes or simulated is the model's matter."""


class QGaLoreLinear(nn.Linear):
    """q_galore_torch's linear layer with an INT8 weight, which is an ordinary parameter here: it has a gradient."""

    SIMULATION: ClassVar[bool] = False

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_bits: int = 8,
        group_size: int = 256,
        stochastic_round: bool = True,
    ) -> None:
        """
        weight: (out, in), any floating dtype.
        bias: (out,).
        num_bits: 8 or 4.
        group_size: largest number of elements in a row that share a scale.
        stochastic_round: whether updates are rounded stochastically.
        """
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight.detach().to(device, dtype), requires_grad=weight.requires_grad)
        quantize_module_weight(
            self, bits=num_bits, group_size=group_size, stochastic=stochastic_round, simulation=self.SIMULATION
        )
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(device, dtype))

    def forward(self, input: Tensor) -> Tensor:
        if hasattr(self.weight, "backward_hook"):
            raise RuntimeError(
                "weight.backward_hook = hook is called by nobody here, and the weight would not be trained: use "
                "p.register_post_accumulate_grad_hook(hook), which works for every parameter"
            )
        return super().forward(input)


class QLinear(QGaLoreLinear):
    """q_galore_torch's linear layer that holds the values of its codes in floating point."""

    SIMULATION = True


def prepare_model_for_int8_training(model: nn.Module, args: Any, target_module: Collection[str]) -> nn.Module:
    """Replaces linear layers by QGaLoreLinear, in place. Returns the model.

    args: has `weight_bits`, `weight_group_size` and `stochastic_round`.
    target_module: the last parts of the layers' names, as "q_proj".
    """
    return _prepare(model, args, target_module, kind=QGaLoreLinear)


def prepare_model_for_int8_training_simulation(
    model: nn.Module, args: Any, target_module: Collection[str]
) -> nn.Module:
    """The same with the codes' values in floating point, see QLinear."""
    return _prepare(model, args, target_module, kind=QLinear)


def saving_model_weight(model: nn.Module, path: str) -> None:
    """Saves a model's state dict, INT8 weights as they are."""
    torch.save(model.state_dict(), path)


def load_model_weight(model: nn.Module, path: str) -> nn.Module:
    """Loads what `saving_model_weight` saved into a model that was prepared in the same way. Returns the model."""
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def _prepare(
    model: nn.Module, args: Any, target_module: Collection[str], *, kind: Callable[..., QGaLoreLinear]
) -> nn.Module:
    shared = shared_parameters(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and not isinstance(layer, QGaLoreLinear) and name in target_module:
                if id(layer.weight) in shared:
                    raise ValueError(f"the weight of {name} is shared with another module and cannot be quantized")
                new = kind(
                    layer.weight,
                    layer.bias,
                    num_bits=args.weight_bits,
                    group_size=args.weight_group_size,
                    stochastic_round=args.stochastic_round,
                )
                setattr(parent, name, new.train(layer.training))
    return model


def _only(optimizer: object, **options: tuple[Any, Any]) -> None:
    """Raises ValueError for an option with another value than the one that is supported: (value, supported)."""
    for name, (value, supported) in options.items():
        if value != supported:
            raise ValueError(f"{type(optimizer).__name__}: {name}={value!r} is not supported, only {supported!r} is")
