#!/usr/bin/env bash
# LLaMA-350M on C4 with GaLore, as published (Zhao et al. 2024): perplexity 18.95. Arguments are passed on and win.
# One process; for N GPUs: NPROC=N bash scripts/pretrain_c4/llama_350m.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --standalone --nproc_per_node "${NPROC:-1}" torchrun_main.py --preset galore_350m "$@"
