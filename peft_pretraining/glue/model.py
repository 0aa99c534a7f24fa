"""The model of a fine-tuning run and its tokenizer, from transformers, prepared for a method."""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

from peft_pretraining.errors import UserError
from peft_pretraining.glue.data import Examples
from peft_pretraining.glue.methods import METHODS, chosen_layers
from peft_pretraining.glue.nf4 import to_nf4
from peft_pretraining.glue.tasks import GlueTask
from qgalore.param_groups import ParameterGroup, split_parameters
from qgalore.storage.convert import quantize_linear_layers

LLAMA_TOKENIZER = "t5-base"  # that of GaLore's pre-training
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class HubTokenizer:
    """A tokenizer of transformers as a checkpoint remembers it, see data.tokenizer.Tokenizer."""

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name

    def files(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}

    def digest(self) -> str:
        """A hash of the vocabulary and of a sample."""
        known = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer("It's a dog.", "Yes!")["input_ids"]]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def open_tokenizer(args: argparse.Namespace) -> HubTokenizer:
    """The tokenizer, with a padding token: its end of a text, where it has none. Raises UserError if there is none."""
    name = args.tokenizer_name or (LLAMA_TOKENIZER if args.eval_llama else args.model_name_or_path)
    with _reported(f"--tokenizer_name {name}" if args.tokenizer_name else f"the tokenizer of {name}"):
        side = {"padding_side": "left"} if args.eval_llama else {}
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=not args.use_slow_tokenizer, **side)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"--tokenizer_name {name}: it has neither a padding token nor one for the end of a text.")
        tokenizer.pad_token = tokenizer.eos_token
    return HubTokenizer(tokenizer, name=name)


def open_config(args: argparse.Namespace, *, task: GlueTask, tokenizer: HubTokenizer) -> PreTrainedConfig:
    """The model's configuration, with the labels of the task. Raises UserError for --max_length beyond the model."""
    with _reported(f"--model_name_or_path {args.model_name_or_path}"):
        config = AutoConfig.from_pretrained(args.model_name_or_path)
    config.num_labels, own = max(1, len(task.labels)), dict(getattr(config, "label2id", None) or {})
    config.finetuning_task = args.task_name
    config.problem_type = None if task.labels else "regression"
    if task.labels:
        order = {name.lower(): number for name, number in own.items()}
        if set(order) != {name.lower() for name in task.labels}:
            order = {name.lower(): number for number, name in enumerate(task.labels)}
        config.label2id = {name: order[name.lower()] for name in task.labels}
        config.id2label = {number: name for name, number in config.label2id.items()}
    if config.pad_token_id is None or config.pad_token_id < 0 or args.eval_llama:
        config.pad_token_id = tokenizer.tokenizer.pad_token_id  # a LLaMA is judged at its last token before padding
    longest = config.max_position_embeddings - (2 if "roberta" in config.model_type else 0)
    if args.max_length > longest:
        raise UserError(f"--max_length {args.max_length}: {args.model_name_or_path} allows at most {longest}.")
    return config


def in_order_of_model(examples: Examples, config: PreTrainedConfig) -> Examples:
    """The examples with the class numbers of the model, which may have learned the labels in another order."""
    if examples.regression:
        return examples
    assert config.label2id is not None, "open_config has set it"
    numbers = [int(config.label2id[name]) for name in examples.task.labels]
    if numbers == list(range(len(numbers))):
        return examples
    logger.info(f"the model has its own order of the labels, which is kept: {config.label2id}")

    def moved(split: Any) -> Any:
        return [example._replace(label=numbers[int(example.label)]) for example in split]

    return Examples(
        examples.task,
        moved(examples.train),
        {name: moved(split) for name, split in examples.evaluations.items()},
        numbers=tuple(map(numbers.index, range(len(numbers)))),
    )


def open_model(
    args: argparse.Namespace, *, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Any, tuple[ParameterGroup, ...]]:
    """The model on the device in training mode, with frozen weights and adapters as the method wants; and the groups of
    parameters that are trained. Raises UserError if weights are missing or do not fit."""
    model = _load(args, config=config, dtype=dtype).to(device)
    method, layers = METHODS[args.method], chosen_layers(model, all_modules=args.lora_all_modules)
    inner = chosen_layers(model, all_modules=True)
    if method.weight_bits is not None and args.qlora_codec == "affine":
        quantize_linear_layers(
            model, select=inner.__contains__, bits=args.weight_bits, group_size=args.weight_group_size,
            stochastic=args.stochastic_round,
        )  # fmt: skip
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if method.adapters:
        model = insert_adapters(model, layers, args=args)
        if args.qlora_codec == "nf4":
            to_nf4(model, select=inner.__contains__)
        matrices = [p for name, p in model.named_parameters() if ".lora_" in name]
    else:
        matrices = [model.get_submodule(name).weight for name in layers]
    if args.freeze_others and not method.adapters:
        heads = [p for name in heads_of(model) for p in model.get_submodule(name).parameters()]
        trained = {id(p) for p in (*matrices, *heads)}
        for p in model.parameters():
            p.requires_grad_(id(p) in trained)
    return model.train(), split_parameters(model, matrices=matrices)


def insert_adapters(model: Any, layers: list[str], *, args: argparse.Namespace) -> Any:
    """The model inside peft's: LoRA in these layers, the classifier trained, everything else frozen."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(f"--method {args.method} needs the package peft ({error}): pip install peft.") from error
    config = LoraConfig(
        task_type="SEQ_CLS", r=args.rank, lora_alpha=args.peft_alpha, target_modules=layers,
        modules_to_save=heads_of(model), base_model_name_or_path=args.model_name_or_path,
    )  # fmt: skip
    return get_peft_model(model, config)


def heads_of(model: nn.Module) -> list[str]:
    """The names of the modules that make labels of what the model has made of a text."""
    return [name for name, _ in model.named_children() if name in ("classifier", "score")]


def _load(args: argparse.Namespace, *, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model on the CPU, with a classifier drawn from the seed."""
    torch.manual_seed(args.seed)
    if args.eval_llama:
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    else:
        with _reported(f"--model_name_or_path {args.model_name_or_path}"):
            model = AutoModelForSequenceClassification.from_pretrained(
                args.model_name_or_path,
                config=config,
                dtype=dtype,
                ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            )
    if args.load_pretrained_model:
        _load_fitting(model, Path(args.load_pretrained_model))
    return model


def _load_fitting(model: nn.Module, folder: Path) -> None:
    """Gives the model the weights of a folder, where names and shapes are its own. Raises UserError if none is."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"--load_pretrained_model {folder}: there is neither {' nor '.join(WEIGHTS)}.")
    with _reported(f"--load_pretrained_model {folder}"):
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    own: dict[str, Tensor] = model.state_dict()
    fitting = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise UserError(f"--load_pretrained_model {folder}: no weight there has a name and shape of this model's.")
    model.load_state_dict(fitting, strict=False)
    logger.info(
        f"{len(fitting)} tensors from {file}; {len(found) - len(fitting)} of its tensors have no place here, and "
        f"{len(own) - len(fitting)} of the model's stay as drawn: {', '.join(sorted(own.keys() - fitting.keys())[:4])}"
    )


class _reported:
    """Turns what transformers and the files raise into one line."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            reason = " ".join(str(error).split()) or type(error).__name__
            if "ignore_mismatched_sizes" in reason:
                reason = "its classifier is for another number of labels: --ignore_mismatched_sizes draws a new one"
            raise UserError(f"{self.what} cannot be used ({reason[:300]}).") from error
