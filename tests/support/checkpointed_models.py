"""Models in 8 bits, and checkpoints of models that no run has trained."""

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM

from peft_pretraining.checkpoint import atomic_write
from peft_pretraining.checkpoint.snapshot import take_snapshot
from qgalore.storage.convert import quantize_linear_layers
from qgalore.storage.quantized_weight import QuantizedWeight


def write_checkpoint(model: LlamaForCausalLM, folder: Path, *, update: int = 3, **args: object) -> Path:
    """A checkpoint under a name of its own; `args` are the run's arguments."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshot = take_snapshot(model, optimizer, update=update, progress={"args": args})
    folder.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write.write_checkpoint(folder.parent, snapshot).rename(folder)


def quantize(model: LlamaForCausalLM, *, simulation: bool = False, group_size: int = 16) -> LlamaForCausalLM:
    """The model with all projections in 8 bits."""
    chosen = quantize_linear_layers(
        model, select=lambda name: "layers" in name, group_size=group_size, simulation=simulation
    )
    assert len(chosen) == 7 * model.config.num_hidden_layers
    return model


def values(model: nn.Module) -> dict[str, object]:
    """What every parameter stands for, as ordinary tensors."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: w.dequantize() if isinstance(w, QuantizedWeight) else w for name, w in weights.items()}
