"""A checkpoint as a transformers folder: `python -m peft_pretraining.hf_export CHECKPOINT OUT`.

OUT gets config.json, generation_config.json, the weights as safetensors, and the tokenizer where transformers has a
counterpart; AutoModelForCausalLM and AutoTokenizer load it. Quantized weights are written as their values; adapters are
merged into the weights. Tensors are read, decoded and written one at a time: memory never holds the model. With
--adapters, OUT gets the factors of LoRA alone, as the package peft reads them.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from peft_pretraining.checkpoint.files import CONFIG, Checkpoint, find_checkpoint
from peft_pretraining.checkpoint.weights import StoredWeights, load_weights, open_checkpoint
from peft_pretraining.errors import Parser, UserError, command_status
from peft_pretraining.export.adapters import export_adapters
from peft_pretraining.export.folder import SHARD, appearing, write_description, write_weights
from peft_pretraining.export.model import args_of, merged_model, tokenizer_of
from peft_pretraining.model.adapters import Adapters, merging
from peft_pretraining.model.build import build_model, meta_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.dtypes import DTYPES
from peft_pretraining.model.family import family_of
from qgalore.storage.affine import Simulated
from qgalore.storage.convert import quantize_module_weight

# How far merging adapters may move logits in float32, over the largest of them. It moved those of models of 9M to 350M
# parameters by 1e-6 to 3e-5; leaving out the adapters of a run of six updates, by more than 0.1.
MERGED = 2**-12


class NotTheSameModel(Exception):
    """The exported model computes other logits than the one that was trained."""


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD,
    verify: bool = False,
) -> float | None:
    """Writes the transformers folder `out`, which is complete or absent at any moment.

    checkpoint: a checkpoint, or a run's folder, whose newest checkpoint is taken.
    dtype: the dtype of the written weights, by default the one in which they appear in training.
    max_shard_size: the size of the largest file, such as "500MB".
    verify: loads what was written and compares its logits with those of the trained weights, 8-bit ones in place.
    Returns the largest difference to the logits as trained: 0, or what another `dtype` or the rounding of merged
    weights makes of them; None if not verified. Raises UserError if something cannot be read or written,
    NotTheSameModel if the logits differ at all from those of the trained weights in the same dtype, or if merging moves
    logits in float32 by more than MERGED of the largest.
    """
    opened = Checkpoint.open(find_checkpoint(checkpoint)).verify()
    config = read_config(opened.file(CONFIG))
    weights = open_checkpoint(opened.folder)
    adapters = Adapters.of(args_of(opened))
    structure = meta_model(config, adapters=adapters)
    weights.check({name: parameter.shape for name, parameter in structure.named_parameters()})
    trained = weights.dtype(family_of(config).embedding_weight)
    dtype = dtype or trained
    config.dtype, config.use_cache = dtype, True
    with appearing(out) as folder:
        _write_description(config, folder, checkpoint=opened)
        like: dict[str, Tensor] = dict(meta_model(config, dtype=dtype).named_parameters())
        read = merging(weights.read, adapters, names=weights.names())
        write_weights(like, folder, read=read, max_shard_size=max_shard_size)
        if not verify:
            return None
        return _compare_logits(folder, weights, adapters=adapters, dtype=dtype, trained=trained)


def _write_description(config: PreTrainedConfig, folder: Path, *, checkpoint: Checkpoint) -> None:
    """Prints a warning if the tokenizer has to be left out."""
    tokenizer, missing = None, None
    try:
        tokenizer = tokenizer_of(checkpoint, config=config)
    except UserError as error:
        missing = str(error)
    if problem := write_description(config, folder, tokenizer=tokenizer) or missing:
        print(f"warning: the tokenizer is left out: {problem}", file=sys.stderr)


def _compare_logits(
    folder: Path, weights: StoredWeights, *, adapters: Adapters | None, dtype: torch.dtype, trained: torch.dtype
) -> float:
    """The largest difference of two logits, of the written model and of the trained one. One model exists at a time.

    dtype: dtype of the written model.
    trained: dtype in which the model was trained.

    Raises NotTheSameModel unless the written model and the trained weights, with adapters merged, agree to
    the last bit in the same dtype. A tolerance for the rounding to bfloat16 would have to be wide: with random weights,
    it moved logits by 1% to 9%. For the same reason, whether merging is right is seen in float32.
    """
    disable_progress_bar()
    written = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True))
    if adapters is None:
        twin = _logits(_as_trained(weights, dtype=dtype))
    else:
        twin = _logits(merged_model(weights, adapters, dtype=dtype))
        _check_merging(weights, adapters)
    if not torch.equal(written, twin):
        raise NotTheSameModel(f"the exported logits differ from the trained by {(written - twin).abs().max():.3g}.")
    original = _logits(_as_trained(weights, dtype=trained, adapters=adapters))
    return (written - original).abs().max().item()


def _check_merging(weights: StoredWeights, adapters: Adapters) -> None:
    """Raises NotTheSameModel unless merged weights compute what the adapters do, in float32."""
    merged = _logits(merged_model(weights, adapters, dtype=torch.float32))
    trained = _logits(_as_trained(weights, dtype=torch.float32, adapters=adapters))
    difference = (merged - trained).abs().max()
    if not difference <= MERGED * trained.abs().max():
        raise NotTheSameModel(f"with merged adapters, logits differ from the trained by {difference:.3g}.")


def _as_trained(weights: StoredWeights, *, dtype: torch.dtype, adapters: Adapters | None = None) -> PreTrainedModel:
    """The model that was trained, its 8-bit weights or adapters in place, computing in `dtype`."""

    def finish(name: str, module: nn.Module) -> None:
        if settings := weights.quantized.get(f"{name}.weight"):
            codec = settings.codec
            simulation = isinstance(codec, Simulated)
            quantize_module_weight(
                module,
                bits=codec.bits,
                group_size=codec.group_size,
                stochastic=codec.stochastic,
                simulation=simulation,
            )

    config = read_config(weights.folder / "config.json")
    model = build_model(config, device="cpu", dtype=dtype, seed=0, adapters=adapters, finish=finish)
    load_weights(model, weights.folder)
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """The logits of two fixed sequences that go over the vocabulary with a large stride. (2, L, vocab) float32"""
    length = min(32, model.config.max_position_embeddings)
    ids = torch.arange(2 * length).view(2, length) * 7919 % model.config.vocab_size
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m peft_pretraining.hf_export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run: its newest one")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to be made")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as in training")
    parser.add_argument("--max_shard_size", default=SHARD, metavar="SIZE", help=f"of one file (default: {SHARD})")
    parser.add_argument("--adapters", action="store_true", help="the factors of --peft lora alone, as peft reads them")
    parser.add_argument("--verify", action="store_true", help="compare logits with those of the model as trained")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The whole command. Raises as export."""
    args = _parse_args(argv)
    if args.adapters:
        if args.dtype or args.verify or args.max_shard_size != SHARD:
            raise UserError("--adapters writes what was trained, in its dtype: leave out all other flags.")
        export_adapters(args.checkpoint, args.out)
        difference = None
    else:
        dtype = DTYPES[args.dtype] if args.dtype else None
        difference = export(
            args.checkpoint, args.out, dtype=dtype, max_shard_size=args.max_shard_size, verify=args.verify
        )
    if difference is not None:
        print(f"verified; the largest difference to a logit as trained: {difference:.3g}")
    print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


def command_line(argv: list[str] | None = None) -> int:
    """Runs main; one line and exit status 2 for what the user can mend, 1 where the models are not the same."""
    try:
        return command_status(lambda: main(argv))
    except NotTheSameModel as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(command_line())
