"""Checkpoints written by hand from a model, to the letter of their format."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from qgalore.int8_weight import Int8Weight
from qgalore.quantize_model import quantize_linear_layers


def write_checkpoint(model: LlamaForCausalLM, folder: Path, *, update: int = 3, **args: object) -> Path:
    """The folder with manifest.json, config.json, model.safetensors and state.json; `args` are the run's arguments."""
    folder.mkdir(parents=True)
    tensors, quantized = {}, {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if isinstance(weight, Int8Weight):
            tensors |= {f"{name}.{part}": tensor for part, tensor in weight.parts().items()}
            quantized[name] = {
                "kind": type(weight).__name__,
                "group_size": weight.group_size,
                "dtype": str(weight.dtype).removeprefix("torch."),
                "stochastic": weight.stochastic,
            }
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"quantized": json.dumps(quantized)})
    model.config.save_pretrained(folder)
    (folder / "state.json").write_text(json.dumps({"update": update, "args": args}))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "update": update, "files": files}))
    return folder


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
    return {name: w.dequantize() if isinstance(w, Int8Weight) else w for name, w in weights.items()}
