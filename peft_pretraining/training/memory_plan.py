"""Where the memory of a run will be at its peak, found by running it without data.

Model, optimizer and updates are those of the run, built by the same functions from the same arguments, on tensors that
have shapes but no memory (qgalore/live_memory.py). So the plan is the program: it holds for every model, optimizer,
batch, accumulation and option, and a 7B takes seconds.
"""

import argparse
import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from peft_pretraining.batch import Batch
from peft_pretraining.model.build import prepare_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.loss import accumulate_gradients, token_loss_sum
from peft_pretraining.training.plan import open_updates
from peft_pretraining.training.report import format_table
from qgalore.live_memory import LiveMemory, Peak
from qgalore.memory import state_kind, weight_kind
from qgalore.optimizer import LowRankOptimizer
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage.chunks import meta_stands_for
from qgalore.storage.quantized_weight import open_weight
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
class MemoryPlan:
    """What a run keeps and needs, in bytes.

    held: bytes by kind between updates.
    peaks: the peak of each phase: building the model, the first update, a later one, one with refreshes, evaluation.
    """

    held: dict[str, int]
    peaks: dict[str, Peak]

    @property
    def peak(self) -> Peak:
        """The largest of the peaks."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes)


def log_memory(args: argparse.Namespace, *, dtype: torch.dtype, device_type: str) -> None:
    """Logs the plan of a run, in MB of 1e6 bytes: what is held between updates, and the peak of each phase."""
    plan = plan_memory(args, dtype=dtype, device_type=device_type)
    rows = [{"phase": "held between updates", "MB": _megabytes(sum(plan.held.values())), "made_by": ""}]
    for phase, peak in plan.peaks.items():
        rows.append({"phase": phase, "MB": _megabytes(peak.bytes), "made_by": peak.line})
    kinds = ", ".join(f"{kind} {_megabytes(size)}" for kind, size in plan.peak.kinds.items() if size > 5e5)
    logger.info(f"memory, planned:\n{format_table(rows)}\nat the peak, in MB: {kinds}")


def _megabytes(size: int) -> int:
    return round(size / 1e6)


def plan_memory(
    args: argparse.Namespace, *, dtype: torch.dtype, device_type: str = "cuda", real: bool = False
) -> MemoryPlan:
    """The plan of a run.

    args: a completed command line, see parse_args. Compiled code is planned as if it were eager.
    dtype: dtype of the model's weights.
    device_type: whose way the program takes, `cuda` or `cpu`.
    real: whether to run on that device for real, and measure.
    Raises UserError for a config that cannot be read.
    """
    # Of many micro-batches the first and the last differ from all others, which are alike.
    micro_batches = args.gradient_accumulation if real else min(args.gradient_accumulation, 3)
    args = argparse.Namespace(**vars(args) | {"compile": False, "gradient_accumulation": micro_batches})
    config, place = read_config(args.model_config), torch.device(device_type if real else "meta")
    with meta_stands_for(device_type), LiveMemory() as live:
        peaks: dict[str, Peak] = {}
        with _phase("building the model", live, peaks):
            model = prepare_model(args, config=config, dtype=dtype, device=place)
            if not real:
                model.set_attn_implementation(_ATTENTION)
            updates = open_updates(args, model=model)
        _mark(live, model, updates)
        tokens = torch.zeros(args.batch_size, args.max_length, dtype=torch.int64, device=place)
        batches = [Batch(tokens, tokens, epoch=0)] * args.gradient_accumulation
        for name in ("the first update", "an update", "an update with refreshes"):
            if "refreshes" in name and not _make_due(updates.optimizer):
                continue
            with _phase(name, live, peaks):
                accumulate_gradients(model, batches, targets=1, device=place)
                updates.finish()
            _mark(live, model, updates)
        held = dict(+live.kinds)
        with _phase("evaluation", live, peaks), torch.no_grad():
            token_loss_sum(model.eval(), tokens, tokens)
    return MemoryPlan(held, peaks)


@contextlib.contextmanager
def _phase(name: str, live: LiveMemory, peaks: dict[str, Peak]) -> Iterator[None]:
    """Notes the peak of what is done inside."""
    gc.collect()
    live.restart()
    yield
    peaks[name] = live.peak


def _mark(live: LiveMemory, model: PreTrainedModel, updates: WholeModelUpdates | PerLayerUpdates) -> None:
    """Tells the watcher what is kept."""
    for p in model.parameters():
        for part, tensor in open_weight(p).tensors().items():
            live.mark(weight_kind(part), [tensor])
    live.mark("buffers", model.buffers())
    for state in updates.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                live.mark(state_kind(name), [value])


def _make_due(optimizer: torch.optim.Optimizer) -> bool:
    """Makes as many of the largest matrices due for a refresh as one update has at most. Whether there are any."""
    if not isinstance(optimizer, LowRankOptimizer):
        return False
    due = [update for update in optimizer.updates.values() if update.projector.sides and not update.projector.learns]
    due.sort(key=lambda update: update.p.numel(), reverse=True)
    gap = min((update.projector.schedule.gap for update in due), default=1)
    for update in due[: -(-len(due) // gap)]:
        update.state["next_refresh"] = 0
    return bool(due)
