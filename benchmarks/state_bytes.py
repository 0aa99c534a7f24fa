"""The bytes that each optimizer holds at the peak of an update, counted from the tensors themselves.

    python benchmarks/state_bytes.py --model_config configs/llama_7b.json --rank 1024

builds the model and every optimizer's state on the meta device, where tensors have shapes but no memory, so it takes
seconds and no GPU for any size. Prints GB (1e9 bytes) for a bfloat16 model and one micro-batch in an update, without
activations. After backward, the gradients of all parameters exist; inside backward, one does.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from peft_pretraining.errors import UserError
from peft_pretraining.model.build import build_model, meta_model, weight_quantizer
from peft_pretraining.model.config import read_config
from peft_pretraining.training.report import format_table
from qgalore.factory import Settings, create_optimizer, find_recipe
from qgalore.memory import kept_bytes
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import split_parameters

RUNS = {  # title: optimizer, bits of the weights of attention and MLP, bits of the bases
    "galore_adamw8bit": ("galore_adamw8bit", None, None),
    "galore_adamw8bit_per_layer": ("galore_adamw8bit_per_layer", None, None),
    "q_galore_adamw8bit_per_layer, INT8 weights, INT4 bases": ("q_galore_adamw8bit_per_layer", 8, 4),
    "the same with 4-bit weights": ("q_galore_adamw8bit_per_layer", 4, 4),
}


def adamw(config_path: str) -> dict[str, int]:
    """Bytes by kind of AdamW with everything in bfloat16. Raises UserError for a config that cannot be read."""
    once = 2 * sum(p.numel() for p in meta_model(read_config(config_path)).parameters())
    return {"weights": once, "bases": 0, "moments": 2 * once, "gradients": once}


def count(config_path: str, *, optimizer: str, weight_bits: int | None, proj_bits: int | None, rank: int
          ) -> tuple[dict[str, int], int]:  # fmt: skip
    """Bytes by kind of one optimizer, and of its sums over micro-batches if an update has several."""
    config, recipe = read_config(config_path), find_recipe(optimizer)
    groups = split_parameters(meta_model(config))
    quantization = argparse.Namespace(
        weight_bits=weight_bits,
        weight_group_size=256,
        stochastic_round=True,
        simulation=False,
        int8_matmul=None,
        embedding_weight_bits=None,
    )
    finish = weight_quantizer(quantization, groups=groups) if weight_bits else None
    model = build_model(config, device="meta", dtype=torch.bfloat16, seed=0, finish=finish)
    settings = Settings(rank=rank, proj_bits=proj_bits, cos_threshold=recipe.lazy_threshold)
    built = create_optimizer(optimizer, groups=split_parameters(model), settings=settings)
    assert isinstance(built, LowRankOptimizer)
    built.allocate()
    kept = kept_bytes(model, built)
    gradients = [2 * p.numel() for p in model.parameters()]
    held = {
        "weights": kept["weights"] + kept["scales"],
        "bases": kept["bases"],
        "moments": kept["moments"],
        "gradients": max(gradients) if recipe.per_layer else sum(gradients),
    }
    summed = [
        p.shape if update.always_whole else update.projector.projected_shape for p, update in built.updates.items()
    ]
    return held, sum(2 * shape.numel() for shape in summed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", required=True, metavar="JSON")
    parser.add_argument("--rank", type=int, default=1024, metavar="COLUMNS")
    args = parser.parse_args(argv)
    try:
        counted = {"AdamW, all in bfloat16": adamw(args.model_config)}
        for title, (optimizer, weight_bits, proj_bits) in RUNS.items():
            counted[title], _ = count(
                args.model_config, optimizer=optimizer, weight_bits=weight_bits, proj_bits=proj_bits, rank=args.rank
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [{"optimizer": title} | _gigabytes(held | {"total": sum(held.values())}) for title, held in counted.items()]
    print(f"{args.model_config}, rank {args.rank}, GB (1e9 bytes)\n{format_table(rows)}")
    return 0


def _gigabytes(held: dict[str, int]) -> dict[str, str]:
    return {kind: f"{size / 1e9:.1f}" for kind, size in held.items()}


if __name__ == "__main__":
    sys.exit(main())
