"""Where the memory of a run will be at its peak, found by running it without data.

Model, optimizer and updates are those of the run, built by the same functions from the same arguments, on tensors that
have shapes but no memory (qgalore/live_memory.py). So the plan is the program: it holds for every model, optimizer,
batch, accumulation and option.

The layers of a deep model are alike, so few of them are run; see memory_extrapolation.py.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import math
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from peft_pretraining.batch import Batch
from peft_pretraining.model.build import meta_model, prepare_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.family import family_of
from peft_pretraining.model.loss import accumulate_gradients, token_loss_sum
from peft_pretraining.model.sharding import Sharding
from peft_pretraining.training.memory_extrapolation import MemoryPlan, Trace, extrapolate
from peft_pretraining.training.plan import open_updates
from peft_pretraining.training.planned_ranks import one_of
from qgalore.factory import find_recipe
from qgalore.kernel import StepValues
from qgalore.live_memory import LiveMemory, Peak, Visit
from qgalore.memory import state_kind, weight_kind
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.rules.moments import Moment
from qgalore.sharding import local
from qgalore.storage.chunks import meta_stands_for, on_cpu
from qgalore.storage.quantized_weight import open_weight
from qgalore.storage.stored import Stored
from qgalore.subspace.projector import Projector
from qgalore.whole_model import WholeModelUpdates

_ATTENTION = "planned"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Causal attention that keeps no matrix of tokens x tokens, as on GPUs and CPUs. torch has one for the meta device.

    query: (B, heads, L, head_dim); key, value: the same with fewer heads. Returns (B, L, heads, head_dim).
    """
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, is_causal=True, scale=scaling)[0].transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)


@dataclass(frozen=True)
class _Run:
    """What is planned."""

    args: argparse.Namespace
    config: PreTrainedConfig
    dtype: torch.dtype  # of the model's weights
    device_type: str  # whose way the program takes
    ranks: int  # processes
    real: bool  # whether there are data


def plan_memory(
    args: argparse.Namespace,
    *,
    dtype: torch.dtype,
    device_type: str = "cuda",
    ranks: int = 1,
    real: bool = False,
    whole: bool = False,
) -> MemoryPlan:
    """The plan of a run.

    args: a completed command line, see parse_args. Compiled code is planned as if it were eager.
    dtype: dtype of the model's weights.
    device_type: whose way the program takes, `cuda` or `cpu`.
    ranks: processes of the run; the plan is that of rank 0.
    real: whether to run on that device for real, and measure; of several ranks, all must.
    whole: whether to run all layers. A plan without data is else made from few of them; the result is the same.
    Raises UserError for a config that cannot be read.
    """
    # Of many micro-batches the first and the last differ from all others, which are alike.
    micro_batches = args.gradient_accumulation if real else min(args.gradient_accumulation, 3)
    args = argparse.Namespace(**vars(args) | {"compile": False, "gradient_accumulation": micro_batches})
    run = _Run(args, read_config(args.model_config), dtype, device_type, ranks, real)
    if real:
        return _plan_whole(run)
    shown = sorted((name, value) for name, value in vars(args).items() if name not in _BESIDE)
    key = repr((shown, dtype, device_type, ranks))
    if key not in _PLANS or whole:
        with _quick_collections(), one_of(ranks), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they tell of another number of layers
            _PLANS[key] = (None if whole else _extend(run)) or _plan_whole(run)
    return _PLANS[key]


_PLANS: dict[str, MemoryPlan] = {}
# Arguments that a plan does not depend on; of the micro-batches of an update, their number counts.
_BESIDE = frozenset(
    "total_batch_size num_training_steps max_train_tokens num_train_epochs name ignored dry_run".split()
)


def _plan_whole(run: _Run) -> MemoryPlan:
    trace = _trace(run, layers=run.config.num_hidden_layers)
    return MemoryPlan(trace.held, {phase: _most(visits) for phase, visits in trace.visits.items()})


def _most(visits: Mapping[Visit, Peak]) -> Peak:
    return max(visits.values(), key=lambda peak: peak.bytes)


def _extend(run: _Run) -> MemoryPlan | None:
    """The plan of a deep model from two of few layers; None if it cannot be extended."""
    if len(set(getattr(run.config, "layer_types", None) or [0])) > 1:
        return None
    layers = run.config.num_hidden_layers
    # Layers at the beginning whose visits have straight lines of their own, as the last two have: those with refreshes
    # and one more.
    first = 1 + max(1, _layers_due(run.args, run.config))
    few = first + 2
    if few + 1 >= layers:
        return None
    less, more = (_trace(run, layers=count) for count in (few, few + 1))
    return extrapolate(less, more, few=few, layers=layers)


def _layers_due(args: argparse.Namespace, config: PreTrainedConfig) -> int:
    """Layers with a matrix that is due in the update with refreshes, see _make_due."""
    if not find_recipe(args.optimizer).projected:
        return 0
    (sizes,) = (
        [p.numel() for p in group.parameters]
        for group in split_parameters(meta_model(_of_depth(config, 1)))
        if group.kind == "matrix"
    )
    count = -(-len(sizes) * config.num_hidden_layers // args.update_proj_gap)
    return -(-count // sizes.count(max(sizes)))


def _trace(run: _Run, *, layers: int) -> Trace:
    """Runs the updates of a model with that many layers."""
    args, config, depth = run.args, run.config, run.config.num_hidden_layers
    place = torch.device(run.device_type if run.real else "meta")
    with meta_stands_for(run.device_type), LiveMemory() as live:
        visits: dict[str, dict[Visit, Peak]] = {}
        with _phase("building the model", live, visits):
            spread, next_part = run.ranks if args.parallel == "fsdp" else 1, itertools.count().__next__
            model = prepare_model(
                args,
                config=_of_depth(config, layers),
                dtype=run.dtype,
                device=place,
                sharding=Sharding(place, ranks=spread) if spread > 1 else None,
                layer_done=lambda layer: live.belong(next_part(), _parts(layer)),
            )
            if not run.real:
                model.set_attn_implementation(_ATTENTION)
            updates = open_updates(args, model=model)
        if not run.real:
            _run_kernels_once(updates.optimizer, live)
        for part, layer in enumerate(family_of(config).part("layers", model)):
            live.belong(part, _parts(layer))
            if spread > 1 and not run.real:
                layer.unshard()  # into memory that the layer is gathered in from now on
                live.belong(part, _parts(layer))
                layer.reshard()
        _mark(live, model, updates)
        tokens = torch.zeros(args.batch_size, args.max_length, dtype=torch.int64, device=place)
        packed = tokens if args.packing == "whole" else None
        batches = [Batch(tokens, tokens, epoch=0, positions=packed)] * args.gradient_accumulation
        for name in ("the first update", "an update", "an update with refreshes"):
            refreshed = _make_due(updates.optimizer, layers=layers, depth=depth, any_due="refreshes" in name)
            if "refreshes" in name and not refreshed:
                continue
            with _phase(name, live, visits):
                accumulate_gradients(model, batches, targets=1, device=place)
                updates.finish()
            _mark(live, model, updates)
        held = dict(+live.kinds)
        with _phase("evaluation", live, visits), torch.no_grad():
            token_loss_sum(model.eval(), tokens, tokens, packed)
    return Trace(held, visits)


_KERNELS: dict[Hashable, Peak] = {}  # what the kernel of an update needs, by its arguments


def _run_kernels_once(optimizer: torch.optim.Optimizer, live: LiveMemory) -> None:
    """Makes an optimizer run the kernel of its updates once for arguments that look alike.

    Most of a plan's time goes there, and the weights of all layers, updates, batches and plans look alike.
    """
    if not isinstance(optimizer, LowRankOptimizer) or optimizer.measures:
        return
    engine = next(iter(optimizer.updates.values())).engine
    run = engine.kernel

    def kernel(R: Tensor, weight: Stored, moments: Sequence[Moment], *, watch: Any, **others: Any) -> None:
        key = _looks((on_cpu(R.device), R, weight, moments, others))
        part = next(iter(weight.parts.values()))
        live.once(key, lambda: run(R, weight, moments, watch=watch, **others), done=_KERNELS, of=part)

    engine.kernel = kernel


def _looks(value: Any) -> Hashable:
    """All of a kernel's arguments that decide what it allocates."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.stride()
    if isinstance(value, Stored):
        return value.codec, value.shape, _looks(value.parts)
    if isinstance(value, Moment):
        return _looks(value.stored), value.dtype, value.seed is None
    if isinstance(value, Projector):
        return replace(value, schedule=None, seed=0)  # type: ignore[arg-type]
    if isinstance(value, StepValues):
        return tuple(each is None for each in value)
    if isinstance(value, Mapping):
        return tuple((name, _looks(each)) for name, each in value.items())
    return tuple(_looks(each) for each in value) if isinstance(value, list | tuple) else value


def _of_depth(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The configuration with that many of its layers."""
    if config.num_hidden_layers == layers:
        return config
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Leaves what exists already out of the garbage collector's rounds, which else take most of a plan's time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _phase(name: str, live: LiveMemory, visits: dict[str, dict[Visit, Peak]]) -> Iterator[None]:
    """Notes the peaks of what is done inside."""
    gc.collect()
    live.restart()
    yield
    visits[name] = dict(live.peaks)


def _parts(module: nn.Module) -> list[Tensor]:
    """What the parameters of a module are stored in; of sharded ones, the rows that are here."""
    return [part for p in module.parameters() for part in open_weight(p).tensors().values()]


def _mark(live: LiveMemory, model: PreTrainedModel, updates: WholeModelUpdates | PerLayerUpdates) -> None:
    """Tells the watcher what is kept."""
    for p in model.parameters():
        for part, tensor in open_weight(p).tensors().items():
            live.mark(weight_kind(part), [tensor])
    live.mark("buffers", model.buffers())
    for state in updates.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                live.mark(state_kind(name), [local(value)])


def _make_due(optimizer: torch.optim.Optimizer, *, layers: int, depth: int, any_due: bool) -> int:
    """Makes as many of the largest matrices due for a refresh as one update has at most, or none. Returns how many.

    layers: layers of this model; it stands for one of `depth` layers.
    """
    if not isinstance(optimizer, LowRankOptimizer):
        return 0
    each = [
        update
        for update in optimizer.updates.values()
        if "next_refresh" in update.state and not update.projector.learns
    ]
    each.sort(key=lambda update: update.p.numel(), reverse=True)
    gap = min((update.projector.schedule.gap for update in each), default=1)
    count = -(-len(each) // layers * depth // gap) if any_due else 0
    for number, update in enumerate(each):
        update.state["next_refresh"] = 0 if number < count else math.inf
    return count
