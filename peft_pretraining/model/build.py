"""The LLaMA: read from a JSON file, built without a second copy, in the dtype the device is good at."""

import argparse
import copy
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_pretraining.errors import UserError
from peft_pretraining.json_files import read_json
from peft_pretraining.model.adapters import Adapters, draw_factors, insert, is_factor
from qgalore.param_groups import ParameterGroup, split_parameters
from qgalore.storage.convert import quantize_module_weight

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp32": torch.float32, "float32": torch.float32}


def read_config(path: str | Path) -> LlamaConfig:
    """Reads a LLaMA's shape from one of our JSON files, or from those of the GaLore family's repositories.

    There, max_sequence_length stands for max_position_embeddings, and pad_token_id -1 for "none": taken literally it
    becomes the embedding's padding_idx and freezes the vocabulary's last row. The file's dtype is not read: the
    command line decides. Raises UserError where the file is missing, broken or no LLaMA that can be built.
    """
    path = Path(path)
    fields = read_json(path)
    if fields.get("model_type", "llama") != "llama":
        raise UserError(f"{path}: model_type is {fields['model_type']!r}, but only 'llama' can be trained here.")
    _check_sizes(path, fields)
    if "max_sequence_length" in fields:
        fields.setdefault("max_position_embeddings", fields.pop("max_sequence_length"))
    if isinstance(pad := fields.get("pad_token_id"), int) and pad < 0:
        fields["pad_token_id"] = None
    fields["architectures"] = [LlamaForCausalLM.__name__]
    for name in ("model_type", "dtype", "torch_dtype", "transformers_version"):
        fields.pop(name, None)
    try:
        return LlamaConfig(**fields)
    except Exception as error:  # transformers' own checks raise classes of many kinds
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def _check_sizes(path: Path, fields: dict[str, Any]) -> None:
    optional = ("max_sequence_length", "max_position_embeddings", "num_key_value_heads", "head_dim")
    for name in SIZES + tuple(name for name in optional if fields.get(name) is not None):
        if name not in fields:
            raise UserError(f"{path}: {name} is missing. It must be a whole number above 0.")
        value = fields[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {name} must be a whole number above 0, not {json.dumps(value)}.")
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if hidden % heads:
        raise UserError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    if (fields.get("head_dim") or hidden // heads) % 2:
        raise UserError(
            f"{path}: hidden_size {hidden} / num_attention_heads {heads} is an odd head size; rotary embeddings turn "
            "pairs and need an even one."
        )
    if heads % (fields.get("num_key_value_heads") or heads):
        raise UserError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{fields['num_key_value_heads']}."
        )


def meta_model(
    config: LlamaConfig, *, dtype: torch.dtype = torch.float32, adapters: Adapters | None = None
) -> LlamaForCausalLM:
    """The model on the meta device: shapes, dtypes and names, but no memory. `config` is left as it is.

    adapters: inserted, so that this is the structure that is trained.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    # A padding row gets no gradient. Where the padding token is also the end of a text, that row must learn.
    model.model.embed_tokens.padding_idx = None
    if adapters is not None:
        insert(model, adapters)
    return model


def build_model(
    config: LlamaConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    adapters: Adapters | None = None,
    activation_checkpointing: bool = False,
    finish: Callable[[str, nn.Module], None] | None = None,
) -> LlamaForCausalLM:
    """Builds the model on `device` in `dtype`, in training mode, with weights drawn from `seed`.

    Weights of linear layers and of the embedding are normal(0, initializer_range), those of norms are one, biases
    zero; LoRA leaves them as they are, and adapters.draw_factors draws the rest. The same seed gives the same weights
    on the same kind of device; the global random state is neither read nor moved. Memory: the model, and no second copy
    of any part of it. finish(name, module) is called for each module right after its own weights are initialised and
    before the next one's exist, to quantize them, say.
    """
    device = torch.device(device)
    model = meta_model(config, dtype=dtype, adapters=adapters)
    # On the meta device there is nothing to draw, and no generator.
    generator = None if device.type == "meta" else torch.Generator(device=device).manual_seed(seed)
    tied = model.lm_head if model.config.tie_word_embeddings else None
    for name, module in model.named_modules():
        if module is not tied:
            module.to_empty(device=device, recurse=False)
            if not is_factor(name):
                _initialize(module, std=model.config.initializer_range, generator=generator)
            if finish is not None:
                finish(name, module)
    model.tie_weights()
    if adapters is not None:
        draw_factors(model, adapters, seed=seed)
    # Its buffers are in no checkpoint and were lost on the meta device; they are float32 whatever the dtype.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    if activation_checkpointing:
        # transformers renamed the method and warns about the old name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


def prepare_model(
    args: argparse.Namespace, *, config: LlamaConfig, dtype: torch.dtype, device: torch.device
) -> LlamaForCausalLM:
    """The model on its device, with weights drawn from the seed; with adapters, quantized and compiled as asked for."""
    model = build_model(
        config,
        device=device,
        dtype=dtype,
        seed=args.seed,
        adapters=Adapters.of(vars(args)),
        activation_checkpointing=args.activation_checkpointing,
        finish=weight_quantizer(args, groups=split_parameters(meta_model(config))) if args.weight_quant else None,
    )
    if args.compile:
        compile_layers(model)
    return model


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile would find no C++ compiler, which it needs for a CPU."""
    if device.type == "cpu" and not any(
        shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")
    ):
        raise UserError("--compile needs a C++ compiler on a CPU, such as g++, and finds none. Leave it out.")


def compile_layers(model: LlamaForCausalLM) -> None:
    """Compiles each decoder layer in place: names, parameters, hooks and state_dict stay as they are.

    The layers are alike, so whichever runs first is compiled for all of them, once for each shape of a batch and each
    mode: training, evaluation, and the last, smaller batch of an evaluation. Embedding, head and loss stay eager.
    """
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def weight_quantizer(args: argparse.Namespace, *, groups: Sequence[ParameterGroup]) -> Callable[[str, nn.Module], None]:
    """What --weight_quant does with a module that has just been initialised: its weight, if projected, becomes INT8."""
    chosen = {name for group in groups if group.projected for name in group.names}

    def finish(name: str, module: nn.Module) -> None:
        if f"{name}.weight" in chosen:
            quantize_module_weight(
                module,
                group_size=args.weight_group_size,
                stochastic=args.stochastic_round,
                simulation=args.simulation,
            )

    return finish


@torch.no_grad()
def _initialize(module: nn.Module, *, std: float, generator: torch.Generator | None) -> None:
    """Fills the weights that belong to `module` itself, not to its children."""
    for name, weight in module.named_parameters(recurse=False):
        if name == "bias":
            weight.zero_()
        elif isinstance(module, nn.Linear | nn.Embedding):
            weight.normal_(0.0, std, generator=generator)
        else:
            assert type(module).__name__.endswith("RMSNorm"), f"no initialisation for {name} of {type(module)}"
            weight.fill_(1.0)


def native_bfloat16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 in hardware. Emulation is slower than float32 and does not count."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # not is_bf16_supported(): it counts emulation
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch 2.11
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def resolve_dtype(name: str | None, device: torch.device | str) -> torch.dtype:
    """The dtype of weights and activations: what --dtype names, by default the fastest that `device` has natively.

    Raises UserError for an unknown name, and for bfloat16 where the device would only emulate it.
    """
    native = native_bfloat16(device)
    if name is None:
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise UserError(f"unknown --dtype {name!r}. Known: {', '.join(DTYPES)}.")
    dtype = DTYPES[name]
    if dtype == torch.bfloat16 and not native:
        raise UserError(
            f"--dtype {name}: this {torch.device(device).type} has no bfloat16 arithmetic. Use --dtype float32."
        )
    return dtype
