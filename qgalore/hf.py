"""The optimizers in transformers' Trainer, and INT8 weights in any transformers model. Needs transformers 5.

    quantize(model)
    trainer = Trainer(
        model, args, train_dataset=data, callbacks=[LogRefreshes()],
        optimizer_cls_and_kwargs=QGaLore.for_trainer(args, "q_galore_adamw8bit_per_layer", rank=128),
    )
    trainer.train()
    export(model, "folder")

What `QGaLore()` makes is a torch optimizer with the whole state in its state_dict, per layer, too: accelerate,
Lightning and loops of your own call its `step` as that of any other.
"""

import dataclasses
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import check_target_module_exists

from qgalore.factory import create_optimizer, find_recipe
from qgalore.optimizer import LowRankOptimizer
from qgalore.options import Settings, unknown_option
from qgalore.param_groups import ParameterGroup, split_parameters
from qgalore.per_layer import PerLayerUpdates, release
from qgalore.storage.convert import quantize_linear_layers
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.storage.stored import part_key

LINEAR = (nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear layer whose weight is (in, out)
Targets = str | list[str] | None


def linear_layers(model: nn.Module, targets: Targets = None) -> list[str]:
    """The names of a model's linear layers that `optim_target_modules` means.

    targets: as transformers has it, a list of parts of names or regexes, one regex, or "all-linear"; None means all but
        the output layer. A layer whose weight is an embedding's, too, must be named in full.
    Raises ValueError if there is no such layer.
    """
    if not (targets is None or isinstance(targets, str | list)):
        raise ValueError(f"optim_target_modules must be a list, a regex or 'all-linear', not {targets!r}")
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tied = {id(p) for module in embeddings for p in module.parameters()}
    exact = [targets] if isinstance(targets, str) else targets or []
    every = targets is None or (isinstance(targets, str) and targets.replace("_", "-") == "all-linear")
    output = getattr(model, "get_output_embeddings", lambda: None)() if targets is None else None
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR)
        and (every or check_target_module_exists(targets, name))
        and module is not output
        and (id(module.weight) not in tied or name in exact)
    ]
    if not names:
        raise ValueError(f"optim_target_modules = {targets!r} matches no linear layer of the model")
    return names


def quantize(
    model: nn.Module,
    optim_target_modules: Targets = None,
    *,
    bits: int = 8,
    group_size: int = 256,
    stochastic: bool = True,
    seed: int | None = None,
    simulation: bool = False,
) -> list[str]:
    """Puts the weights of linear layers into 8 or 4 bits, GPT-2's Conv1D included. Returns the parameters' names.

    Call it before there is a Trainer: a checkpoint is loaded into a model that was quantized in the same way.
    optim_target_modules: which layers, see `linear_layers`.
    The other arguments are those of QuantizedWeight.from_float.
    Raises ValueError if no layer matches, and for a weight that is shared.
    """
    names = linear_layers(model, optim_target_modules)
    return quantize_linear_layers(
        model,
        select=names.__contains__,
        kinds=LINEAR,
        bits=bits,
        group_size=group_size,
        stochastic=stochastic,
        seed=seed,
        simulation=simulation,
    )


def export(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """Writes a folder that `from_pretrained` loads, with the values of quantized weights in the model's dtype.

    The model stays as it is. Memory: the values exist beside it while they are written.
    options: keyword arguments of save_pretrained.
    """
    state = model.state_dict()
    for name, p in model.named_parameters():
        if isinstance(p, QuantizedWeight):
            for part in p.codec.PARTS:
                del state[part_key(name, part)]
            state[name] = p.detach().dequantize()
    model.save_pretrained(folder, state_dict=state, **options)  # type: ignore[operator]


class QGaLore:
    """What Trainer takes as `optimizer_cls_and_kwargs=(QGaLore, {...})`: it is made, then called with the model."""

    def __call__(
        self,
        model: nn.Module,
        *,
        optimizer: str = "q_galore_adamw8bit",
        optim_target_modules: Targets = None,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        **settings: Any,
    ) -> torch.optim.Optimizer:
        """Makes the optimizer of a model, which an earlier one no longer updates inside backward.

        optimizer: a name of qgalore.OPTIMIZERS. With `_per_layer`, parameters are updated inside backward, and `step`
            ends the update.
        optim_target_modules: the layers whose gradients are projected, see `linear_layers`.
        gradient_accumulation_steps: micro-batches in an update; needed per layer only.
        max_grad_norm: maximum norm of each parameter's own gradient, as projected; per layer only. Elsewhere the
            Trainer clips all gradients together.
        settings: fields of qgalore.Settings. Vectors have no weight decay, as in the Trainer.
        Raises ValueError for unknown names, values out of range, and several processes with updates per layer.
        """
        recipe = find_recipe(optimizer)
        if recipe.per_layer:
            _check_per_layer(max_grad_norm)
        elif max_grad_norm is not None:
            raise ValueError(f"max_grad_norm is for updates per layer: with {optimizer}, clip all gradients together")
        made = create_optimizer(
            optimizer,
            groups=_groups(model, linear_layers(model, optim_target_modules)),
            settings=_settings({"cos_threshold": recipe.lazy_threshold, **settings}),
        )
        for group in made.param_groups:
            if all(p.ndim < 2 for p in group["params"]):
                group["weight_decay"] = 0.0
        release(model.parameters())
        if recipe.per_layer:
            assert isinstance(made, LowRankOptimizer)
            PerLayerUpdates(made, accumulation=gradient_accumulation_steps, clip=max_grad_norm or 0.0)
        return made

    @classmethod
    def for_trainer(
        cls, args: TrainingArguments, optimizer: str = "q_galore_adamw8bit", **options: Any
    ) -> tuple[type["QGaLore"], dict[str, Any]]:
        """The pair for `optimizer_cls_and_kwargs`, with what the TrainingArguments say.

        These are learning_rate, weight_decay, adam_epsilon, seed, optim_target_modules; adam_beta1 and adam_beta2 where
        the rule is Adam's; per layer, also gradient_accumulation_steps and max_grad_norm.
        optimizer: a name of qgalore.OPTIMIZERS.
        options: keyword arguments of QGaLore(), which win.
        Raises ValueError for an unknown name, and for fp16 with updates per layer.
        """
        recipe = find_recipe(optimizer)
        told: dict[str, Any] = dict(
            optimizer=optimizer,
            optim_target_modules=args.optim_target_modules,
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            eps=args.adam_epsilon,
            seed=args.seed,
        )
        if recipe.rule == "adam" and "beta2" in recipe.uses:
            told |= dict(beta1=args.adam_beta1, beta2=args.adam_beta2)
        if recipe.per_layer:
            if args.fp16:
                raise ValueError(f"{optimizer} cannot train in fp16, whose gradients are scaled: use bf16=True")
            told |= dict(gradient_accumulation_steps=args.gradient_accumulation_steps, max_grad_norm=args.max_grad_norm)
        return cls, told | options


class LogRefreshes(TrainerCallback):
    """Adds to the Trainer's logs what happens to the bases, and per layer the norm of the gradients.

        refreshes, failed_refreshes    of all matrices, so far
        refresh_seconds                time spent in them, since the start or the last resume
        mean_gap                       mean over the matrices of the updates from one refresh to the next
        grad_norm                      per layer, of all gradients as projected; the Trainer sees none and says 0

    They are in the printed lines and in `log_history`. Reporters that the Trainer makes itself, as for wandb, come
    before it: give them the lines by `trainer.callback_handler.callbacks.insert(0, LogRefreshes())`.
    """

    def __init__(self) -> None:
        self._norm: float | None = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        optimizer = _inner(others["optimizer"])
        if isinstance(optimizer, LowRankOptimizer):
            self._norm = optimizer.end_update().norm if optimizer.flush is not None else None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        optimizer = _inner(others["optimizer"])
        if logs is None or "loss" not in logs or not isinstance(optimizer, LowRankOptimizer):
            return
        more = _summary([found for p in optimizer.updates if (found := optimizer.refreshes(p)) is not None])
        if self._norm is not None:
            more["grad_norm"] = self._norm
        logs |= more
        state.log_history[-1] |= more


def _summary(bases: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = [base["gap"] for base in bases if base["gap"] is not None]
    return {
        "refreshes": sum(base["refreshes"] for base in bases),
        "failed_refreshes": sum(base["failed"] for base in bases),
        "refresh_seconds": round(sum(base["seconds"] for base in bases), 3),
    } | ({"mean_gap": sum(gaps) / len(gaps)} if gaps else {})


def _inner(optimizer: Any) -> Any:
    """The optimizer inside of accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _groups(model: nn.Module, names: Collection[str]) -> list[ParameterGroup]:
    """The parameters by kind, vectors in groups of their own."""
    matrices = [model.get_submodule(name).weight for name in names]
    groups = []
    for group in split_parameters(model, matrices=matrices):  # type: ignore[arg-type]
        members = list(zip(group.names, group.parameters, strict=True))
        for part in ([m for m in members if m[1].ndim >= 2], [m for m in members if m[1].ndim < 2]):
            if part:
                own, parameters = zip(*part, strict=True)
                groups.append(dataclasses.replace(group, names=own, parameters=parameters))
    return groups


def _settings(chosen: dict[str, Any]) -> Settings:
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in chosen:
        if name not in known:
            raise ValueError(unknown_option(name, of="QGaLore", known=known))
    return Settings(**chosen)


def _check_per_layer(max_grad_norm: float | None) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise ValueError(
                "updates per layer run on one process in a Trainer: its DistributedDataParallel sums gradients after "
                "they are used. Take the name without _per_layer"
            )
    if max_grad_norm is None:
        warnings.warn("per layer, no gradients are left to clip: give QGaLore the max_grad_norm", stacklevel=3)
    elif max_grad_norm > 0:
        warnings.warn(
            f"per layer, max_grad_norm = {max_grad_norm:g} limits the gradient of each parameter, not of all together",
            stacklevel=3,
        )
