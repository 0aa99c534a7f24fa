"""The model: built without a second copy, quantized and compiled by the flags."""

import argparse
import copy
import os
import shutil
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from peft_pretraining.errors import UserError
from peft_pretraining.model.adapters import BASE, Adapters, draw_factors, insert, is_factor
from peft_pretraining.model.attention import attention_for
from peft_pretraining.model.family import family_of
from peft_pretraining.model.lean_layers import keep_little
from peft_pretraining.model.offload import offload_inputs
from peft_pretraining.model.sharding import Sharding
from peft_pretraining.progress import LongWait
from qgalore.factored import allow_in_graphs
from qgalore.param_groups import ParameterGroup, split_parameters
from qgalore.storage.convert import quantize_module_weight


def meta_model(
    config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, adapters: Adapters | None = None
) -> PreTrainedModel:
    """The model on the meta device: shapes, dtypes and names, but no memory. `config` is left as it is.

    adapters: adapters to insert.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    config.dtype = dtype  # transformers 5.4 leaves it empty
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_for(config), dtype=dtype)
    # A padding row gets no gradient. Where the padding token is also the end of a text, that row must learn.
    family_of(config).part("embedding", model).padding_idx = None
    if adapters is not None:
        insert(model, adapters)
    return model


def build_model(
    config: PreTrainedConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    adapters: Adapters | None = None,
    activation_checkpointing: bool = False,
    offload_activations: bool = False,
    finish: Callable[[str, nn.Module], None] | None = None,
    layer_done: Callable[[nn.Module], None] | None = None,
) -> PreTrainedModel:
    """Builds the model on `device` in `dtype`, in training mode, with weights drawn from `seed`.

    Weights of linear layers and of the embedding are normal(0, initializer_range), those of norms are one, biases
    zero; LoRA leaves them as they are, and adapters.draw_factors draws the rest. The same seed gives the same weights
    on the same kind of device; the global random state is neither read nor moved. Memory: the model, and no second copy
    of any part of it. finish(name, module) is called for each module right after its own weights are initialised and
    before the next one's exist, to quantize them, say; layer_done(layer) for each decoder layer, when its weights all
    exist.
    """
    device = torch.device(device)
    model = meta_model(config, dtype=dtype, adapters=adapters)
    keep_little(model)
    family = family_of(config)
    # On the meta device there is nothing to draw, and no generator.
    generator = None if device.type == "meta" else torch.Generator(device=device).manual_seed(seed)
    std = model.config.initializer_range
    tied = family.part("head", model) if model.config.tie_word_embeddings else None
    ends = {id(list(layer.modules())[-1]): layer for layer in family.part("layers", model)}
    with LongWait("drawing the weights of modules", total=sum(1 for _ in model.modules())) as progress:
        for name, module in model.named_modules():
            if module is not tied:
                module.to_empty(device=device, recurse=False)
                if not is_factor(name):
                    _initialize(module, std=std, generator=generator, norm=family.norm)
                if finish is not None:
                    finish(name, module)
            if layer_done is not None and id(module) in ends:
                layer_done(ends[id(module)])
            progress.advance()
    model.tie_weights()
    if adapters is not None:
        draw_factors(model, adapters, seed=seed)
    # Its buffers are in no checkpoint and were lost on the meta device; they are float32 whatever the dtype.
    rotary = type(family.part("rotary", model))(config=model.config)
    model.set_submodule(family.rotary, rotary.to(device))
    if activation_checkpointing:
        _checkpoint_activations(model, offload=offload_activations)
    return model.train()


def _checkpoint_activations(model: PreTrainedModel, *, offload: bool) -> None:
    """Lets each layer keep its inputs alone, on the host with `offload`, and compute the rest again in backward."""
    # transformers renamed the method and warns about the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if offload:
        offload_inputs(model)


def prepare_model(
    args: argparse.Namespace,
    *,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    sharding: Sharding | None = None,
    layer_done: Callable[[nn.Module], None] | None = None,
) -> PreTrainedModel:
    """The model on its device with weights drawn from the seed; with adapters, quantized and compiled by the flags.

    sharding: spreads the weights over the processes.
    layer_done: called with each decoder layer when its weights all exist, before they are spread.
    """

    def done(layer: nn.Module) -> None:
        if layer_done is not None:
            layer_done(layer)
        if sharding is not None:
            sharding.shard(layer)

    model = build_model(
        config,
        device=device,
        dtype=dtype,
        seed=args.seed,
        adapters=Adapters.of(vars(args)),
        activation_checkpointing=args.activation_checkpointing,
        offload_activations=args.offload_activations,
        finish=weight_quantizer(args, groups=split_parameters(meta_model(config))) if args.weight_quant else None,
        layer_done=done,
    )
    freeze_by_flags(model, args)
    if sharding is not None:
        sharding.shard_rest(model)
    if args.compile:
        compile_layers(model)
    return model


def freeze_by_flags(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Freezes all but the matrices with --freeze_others. Adapters have seen to it themselves."""
    if args.freeze_others and args.peft is None:
        for group in split_parameters(model):
            for p in group.parameters:
                p.requires_grad_(group.kind == "matrix")


def check_compiler(device: torch.device) -> None:
    """Raises UserError if torch.compile would find no C++ compiler, which it needs for a CPU."""
    if device.type == "cpu" and not any(
        shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")
    ):
        raise UserError("--compile needs a C++ compiler on a CPU, such as g++, and finds none. Leave it out.")


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each decoder layer in place: names, parameters, hooks and state_dict stay as they are.

    The layers are alike, so whichever runs first is compiled for all of them, once for each shape of a batch and each
    mode: training, evaluation, and the last, smaller batch of an evaluation. Embedding, head and loss stay eager.
    """
    allow_in_graphs()
    for layer in family_of(model.config).part("layers", model):
        layer.compile(dynamic=False)


def weight_quantizer(args: argparse.Namespace, *, groups: Sequence[ParameterGroup]) -> Callable[[str, nn.Module], None]:
    """The function by which --weight_quant quantizes the weight of an initialised module: that of a matrix and, with
    --embedding_weight_bits, of embedding and head."""
    kinds = {name: group.kind for group in groups for name in group.names}
    bits = {"matrix": args.weight_bits, "embedding": args.embedding_weight_bits, "head": args.embedding_weight_bits}

    def finish(name: str, module: nn.Module) -> None:
        kind = kinds.get(f"{name.removesuffix(BASE)}.weight", "")
        own = "weight" in dict(module.named_parameters(recurse=False))  # around W0, LoRA's module shows it as its own
        if own and bits.get(kind) is not None:
            quantize_module_weight(
                module,
                bits=bits[kind],
                group_size=args.weight_group_size,
                stochastic=args.stochastic_round,
                simulation=args.simulation,
                products=args.int8_matmul if kind == "matrix" else None,
            )

    return finish


@torch.no_grad()
def _initialize(module: nn.Module, *, std: float, generator: torch.Generator | None, norm: str) -> None:
    """Fills the weights that belong to `module` itself, not to its children.

    std: standard deviation of the weights of linear layers and embeddings.
    norm: the end of the names of the norms' classes, see Family.
    """
    for name, weight in module.named_parameters(recurse=False):
        if name == "bias":
            weight.zero_()
        elif isinstance(module, nn.Linear | nn.Embedding):
            weight.normal_(0.0, std, generator=generator)
        else:
            assert type(module).__name__.endswith(norm), f"no initialisation for {name} of {type(module)}"
            weight.fill_(1.0)
