"""The low-rank baselines of GaLore's tables, in place of the attention and MLP matrices W (m, n) that GaLore projects.

    lora       W = W0 + (alpha / r) B A    W0 as drawn without adapters, frozen; A (r, n) and B (m, r) are trained
    relora     the same; now and then the product is merged into W0, and A, B and their optimizer state restart
    low_rank   W = B A                     no W0; both factors are trained

Embedding, norms, biases and head train in full, or with `only` stay as they are, which is usual in fine-tuning. W0 of
LoRA may be quantized: it is never written (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, there in NF4). Sources: Hu et
al. 2021 (arXiv 2106.09685), Lialin et al. 2023 (arXiv 2307.05695), Kamalakara et al. 2022 (arXiv 2209.13569). As in
GaLore's tables, ReLoRA has no full-rank warm start; but where those have a dropout of 0.05 before A, there is none
here. ReLoRA's paper prunes the optimizer's state by 99%; here it goes whole.

LoRA's modules are peft's, which is imported only to build them. The factors have the dtype of the model.
"""

import argparse
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from peft_pretraining.errors import UserError
from qgalore.param_groups import split_parameters
from qgalore.storage.quantized_weight import QuantizedWeight, open_weight
from qgalore.storage.rounding import mix_seed, random_bits

LORA_KINDS = ("lora", "relora")
KINDS = (*LORA_KINDS, "low_rank")
BASE = ".base_layer"  # W0's module, as peft names it
_FACTOR = re.compile(r"\.(?:lora_([AB])\.default|([AB]))(?:\.weight)?$")  # peft's names, and LowRankLinear's
_DRAW, _MERGE = 2, 3  # tell the seeds of factors and of merged weights from each other and from the optimizer's


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    kind: one of KINDS.
    rank: r, clamped to the shorter side of each matrix.
    alpha: LoRA's scale of the product, divided by the clamped r.
    reset_every: updates from one reset of ReLoRA to the next; None for the other kinds.
    only: whether the factors alone are trained.
    """

    kind: str
    rank: int
    alpha: int
    reset_every: int | None = None
    only: bool = False

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> "Adapters | None":
        """The adapters that the arguments of a run, or those in a checkpoint, ask for; None for no adapters."""
        if args.get("peft") is None:
            return None
        return cls(args["peft"], args["rank"], args["peft_alpha"], args["reset_every"], bool(args.get("freeze_others")))

    def describe(self) -> str:
        """A description in a few words, for the table of parameter groups."""
        if self.kind == "low_rank":
            return f"factors of W = B A, rank {self.rank}"
        resets = f", merged and restarted every {self.reset_every} updates" if self.kind == "relora" else ""
        return f"LoRA, rank {self.rank}, alpha {self.alpha}{resets}"

    def describe_frozen(self, *, bits: int | None) -> str:
        """The same for the parameters that are not trained. bits: those of a quantized W0; None if it is not."""
        others = ", embedding, norms and head" if self.only else ""
        return f"nothing: W0 of the adapters{'' if bits is None else f' in INT{bits}'}{others}"

    def part(self, module: str, part: str) -> str:
        """The name of A or B in the place of a linear layer's weight.

        module: the layer's name.
        part: "A" or "B".
        """
        return f"{module}.lora_{part}.default.weight" if self.kind in LORA_KINDS else f"{module}.{part}.weight"

    @torch.no_grad()
    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """The product that the factors add to W, in float32. A (r, n), B (m, r) -> (m, n)"""
        scale = self.alpha / len(A) if self.kind in LORA_KINDS else 1.0
        return (B.float() @ A.float()).mul_(scale)


class LowRankLinear(nn.Module):
    """A linear layer whose weight (m, n) is the product of B (m, r) and A (r, n), never made as a whole."""

    def __init__(self, linear: nn.Linear, *, rank: int) -> None:
        super().__init__()
        options: dict[str, Any] = dict(bias=False, device=linear.weight.device, dtype=linear.weight.dtype)
        self.A = nn.Linear(linear.in_features, rank, **options)
        self.B = nn.Linear(rank, linear.out_features, **options)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.A(x), self.B.weight, self.bias)


def insert(model: PreTrainedModel, adapters: Adapters) -> None:
    """Gives a model on the meta device its final structure, and freezes what is not trained.

    Raises UserError if the package peft is needed and missing.
    """
    if adapters.kind in LORA_KINDS:
        _insert_lora(model, adapters)
    else:
        for name, rank in _ranks(model, adapters).items():
            module = name.removesuffix(".weight")
            linear = model.get_submodule(module)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(module, LowRankLinear(linear, rank=rank))
    for name, p in model.named_parameters():
        p.requires_grad_(is_factor(name) if adapters.only else not name.endswith(f"{BASE}.weight"))


def _ranks(model: PreTrainedModel, adapters: Adapters) -> dict[str, int]:
    """The rank of each matrix's factors, by the name of its weight in a model without adapters."""
    names = [name for group in split_parameters(model) if group.kind == "matrix" for name in group.names]
    return {name: min(adapters.rank, *model.get_parameter(name).shape) for name in names}


def lora_config(model: PreTrainedModel, adapters: Adapters, **options: Any) -> Any:
    """peft's configuration of the adapters of a model, which has none yet. options: further fields of it.

    Raises UserError if the package peft is missing.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(f"--peft lora and relora need the package peft ({error}): pip install peft.") from error
    # Layers are alike: q_proj and its kin say which rank.
    by_kind = {name.split(".")[-2]: rank for name, rank in _ranks(model, adapters).items()}
    return LoraConfig(
        r=max(by_kind.values()),
        lora_alpha=adapters.alpha,
        target_modules=list(by_kind),
        rank_pattern=by_kind,
        **options,
    )


def _insert_lora(model: PreTrainedModel, adapters: Adapters) -> None:
    config = lora_config(model, adapters, init_lora_weights=False)
    from peft import inject_adapter_in_model

    dtype = model.dtype
    with torch.device("meta"):
        inject_adapter_in_model(config, model)
    for name, module in model.named_modules():
        if is_factor(name):
            module.to(dtype)


def is_factor(name: str) -> bool:
    """Whether this is the name of an A or B, or of its module."""
    return _letter(name) is not None


def _letter(name: str) -> str | None:
    match = _FACTOR.search(name)
    return match and (match[1] or match[2])


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the model has without adapters, by their names there. The factors are left out."""
    return {name.replace(f"{BASE}.", "."): p for name, p in model.named_parameters() if not is_factor(name)}


@torch.no_grad()
def draw_factors(model: PreTrainedModel, adapters: Adapters, *, seed: int, update: int = 0) -> None:
    """Fills every A and B from (seed, update, parameter): the same values on every device and rank.

    LoRA's A is uniform with variance 1 / 3n, as peft and ReLoRA have it, and B zero. Where W = B A, both are uniform,
    with the variance that gives each element of B A the variance of the configuration's initializer_range.
    """
    for index, (name, p) in enumerate(model.named_parameters()):
        letter = _letter(name)
        if letter is None:
            continue
        if adapters.kind == "low_rank":
            rank = p.shape[0] if letter == "A" else p.shape[1]
            bound = math.sqrt(3 * model.config.initializer_range / math.sqrt(rank))
        else:
            bound = 1 / math.sqrt(p.shape[1]) if letter == "A" else 0.0
        _fill_uniform(p, bound=bound, seed=mix_seed(seed, update, index, _DRAW))


def _fill_uniform(p: Tensor, *, bound: float, seed: int) -> None:
    """Uniform in (-bound, bound), by the stateless noise: no generator is moved."""
    steps = random_bits(p.numel(), seed=seed, device=p.device).bitwise_right_shift_(8)  # -2**23 ... 2**23 - 1
    p.copy_(steps.float().add_(0.5).mul_(bound * 2.0**-23).view(p.shape))


def reset_if_due(
    args: argparse.Namespace, model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, update: int
) -> None:
    """Does ReLoRA's reset if it is due after `update`. It is not due after the last update of a run."""
    adapters = Adapters.of(vars(args))
    if adapters is None or adapters.reset_every is None or update == args.num_training_steps:
        return
    if update % adapters.reset_every == 0:
        reset(model, optimizer, adapters, seed=args.seed, update=update)


@torch.no_grad()
def reset(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, adapters: Adapters, *, seed: int, update: int
) -> None:
    """Merges (alpha / r) B A into W0, draws a new A, zeroes B, and lets the optimizer forget both.

    The sum is float32 and rounded once: in bfloat16 stochastically, by (seed, update, parameter). The merged model
    computes what it did, up to that rounding.
    """
    parameters = dict(model.named_parameters())
    for index, (name, W0) in enumerate(parameters.items()):
        if not name.endswith(f"{BASE}.weight"):
            continue
        module = name.removesuffix(f"{BASE}.weight")
        A, B = (parameters[adapters.part(module, letter)] for letter in "AB")
        W = adapters.product(A, B).add_(W0)
        open_weight(W0).write(W, seed=mix_seed(seed, update, index, _MERGE))
    draw_factors(model, adapters, seed=seed, update=update)
    _forget(optimizer, (p for name, p in parameters.items() if is_factor(name)))


def _forget(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Empties the optimizer's state of these parameters, counts of steps included."""
    optimizer.state.update((p, {}) for p in parameters)


def merging(
    read: Callable[[str], Tensor], adapters: Adapters | None, *, names: Collection[str]
) -> Callable[[str], Tensor]:
    """A reader of the weights without adapters, W = W0 + (alpha / r) B A in float32, from one of the weights with them.

    read: gives a weight by its name, of `names`. Without adapters, every weight stays as it is.
    """
    if adapters is None:
        return read

    def merged(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        base, A = f"{module}{BASE}.{kind}", adapters.part(module, "A")
        if kind == "weight" and A in names:
            product = adapters.product(read(A), read(adapters.part(module, "B")))
            return product.add_(_values(read(base))) if base in names else product
        return read(base if base in names else name)

    return merged


def _values(weight: Tensor) -> Tensor:
    """A weight in floating point."""
    return weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight
