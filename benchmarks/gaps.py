"""Validation perplexity of GaLore at several gaps, for each thing that may become of the moments at a refresh.

    python benchmarks/gaps.py --model_config configs/llama_9m.json --dataset data/books --tokenizer data/spiece.model \\
        --rank 32 --updates 300 --jobs 2 --seeds 0 --out gaps.jsonl

Takes the arguments of compare.py and prints its table.
"""

import sys

from compare import LOW_RANK, Methods, main

METHODS: Methods = {
    f"gap {gap}, moments: {policy}": (
        "galore_adamw",
        [*LOW_RANK, "--update_proj_gap", str(gap), "--moments_on_refresh", policy],
        (0.008,),
    )
    for gap in (1, 3, 10, 50)
    for policy in ("project", "keep", "reset")
}

if __name__ == "__main__":
    sys.exit(main(METHODS, doc=__doc__))
