"""The bytes that each optimizer keeps between updates, counted from the tensors themselves.

    python benchmarks/state_bytes.py --model_config configs/llama_7b.json --rank 1024

builds the model and every optimizer's state on the meta device, where tensors have shapes but no memory, so it takes
seconds and no GPU for any size. `--device cpu` makes real ones. Prints GB (1e9 bytes) by kind. AdamW stands for the
usual way: weights, gradients and both moments in bfloat16.
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

RUNS = {  # title: optimizer, INT8 weights, INT4 bases
    "galore_adamw": ("galore_adamw", False, False),
    "adamw8bit": ("adamw8bit", False, False),
    "galore_adamw8bit": ("galore_adamw8bit", False, False),
    "q_galore, INT8 weights": ("q_galore_adamw8bit_per_layer", True, False),
    "q_galore, INT8 weights, INT4 bases": ("q_galore_adamw8bit_per_layer", True, True),
}


def count(config_path: str, *, optimizer: str, int8: bool, int4: bool, rank: int, device: str) -> dict[str, int]:
    """Bytes by kind of one optimizer on a bfloat16 model. Raises UserError for a config that cannot be read."""
    config = read_config(config_path)
    groups = split_parameters(meta_model(config))
    quantization = argparse.Namespace(weight_bits=8, weight_group_size=256, stochastic_round=True, simulation=False)
    finish = weight_quantizer(quantization, groups=groups) if int8 else None
    model = build_model(config, device=device, dtype=torch.bfloat16, seed=0, finish=finish)
    recipe = find_recipe(optimizer)
    settings = Settings(rank=rank, proj_bits=4 if int4 else None, cos_threshold=recipe.lazy_threshold)
    built = create_optimizer(optimizer, groups=split_parameters(model), settings=settings)
    assert isinstance(built, LowRankOptimizer)
    built.allocate()
    return kept_bytes(model, built)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", required=True, metavar="JSON")
    parser.add_argument("--rank", type=int, default=1024, metavar="COLUMNS")
    parser.add_argument("--device", default="meta", choices=("meta", "cpu", "cuda"))
    args = parser.parse_args(argv)
    try:
        elements = sum(p.numel() for p in meta_model(read_config(args.model_config)).parameters())
        rows = [
            {"optimizer": "AdamW, bfloat16, with gradients"}
            | _gigabytes({"weights": 4 * elements, "moments": 4 * elements})
        ]
        for title, (optimizer, int8, int4) in RUNS.items():
            kept = count(
                args.model_config, optimizer=optimizer, int8=int8, int4=int4, rank=args.rank, device=args.device
            )
            rows.append({"optimizer": title} | _gigabytes(kept))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.model_config}, rank {args.rank}, GB (1e9 bytes)\n{format_table(rows)}")
    return 0


def _gigabytes(kept: dict[str, int]) -> dict[str, str]:
    kinds = ("weights", "scales", "bases", "moments")
    return {kind: f"{kept.get(kind, 0) / 1e9:.3f}" for kind in kinds} | {"total": f"{sum(kept.values()) / 1e9:.3f}"}


if __name__ == "__main__":
    sys.exit(main())
