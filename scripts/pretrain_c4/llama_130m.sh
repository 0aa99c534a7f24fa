#!/usr/bin/env bash
# LLaMA-130M on C4 with GaLore, as published (Zhao et al. 2024): perplexity 25.36. Arguments are passed on and win.
# One process; for N GPUs: NPROC=N bash scripts/pretrain_c4/llama_130m.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --standalone --nproc_per_node "${NPROC:-1}" torchrun_main.py --preset galore_130m "$@"
