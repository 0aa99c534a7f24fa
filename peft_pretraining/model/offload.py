"""Recomputed layers whose inputs wait in host memory, so that a GPU holds the activations of one layer only.

With activation checkpointing a layer keeps its input, (B, L, hidden), until the backward pass runs the layer once more.
Here that input is copied to pinned host memory after the forward pass and comes back for the backward pass:
2 x B x L x hidden bytes a layer in bfloat16, twice over the bus in an update, in the order of the GPU's work.

torch.autograd.graph.save_on_cpu does not see these inputs: torch's checkpoint keeps them in a closure.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel


def offload_inputs(model: PreTrainedModel) -> None:
    """Makes a model with activation checkpointing keep the inputs of its layers in host memory."""
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            setattr(module, "_gradient_checkpointing_func", recompute)  # noqa: B010 # mypy takes it for a parameter


def recompute(run: Callable[..., Tensor], hidden: Tensor, *others: Any) -> Tensor:
    """run(hidden, *others), of which only `hidden` is kept for the backward pass, in host memory.

    run: a layer. Gradients reach its parameters and `hidden`, not the others. It must do the same when it runs again;
        what it draws from torch's generators is the same.
    hidden: (B, L, hidden); it must require a gradient.
    """
    return _Recompute.apply(run, hidden, others)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], hidden: Tensor, others: tuple[Any, ...]) -> Tensor:
        ctx.run, ctx.others, ctx.device = run, others, hidden.device
        ctx.waiting = _to_host(hidden)
        ctx.drawn = torch.get_rng_state(), *get_device_states(hidden)
        return run(hidden, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, None]:
        if ctx.waiting is None:
            raise RuntimeError("a backward pass a second time: the inputs of the layers were given up the first time")
        hidden, ctx.waiting = ctx.waiting.to(ctx.device, non_blocking=True).requires_grad_(), None
        state, devices, states = ctx.drawn
        with torch.enable_grad(), torch.random.fork_rng(devices, device_type=ctx.device.type):
            torch.set_rng_state(state)
            set_device_states(devices, states, device_type=ctx.device.type)
            output = ctx.run(hidden, *ctx.others)
        torch.autograd.backward(output, gradient)
        return None, hidden.grad, None


def _to_host(hidden: Tensor) -> Tensor:
    """A copy in host memory, without waiting for it. On a CPU it is there already."""
    if hidden.device.type == "cpu":
        return hidden.detach()
    host = torch.empty_like(hidden, device="meta" if hidden.is_meta else "cpu", pin_memory=not hidden.is_meta)
    return host.copy_(hidden, non_blocking=True)
