#!/usr/bin/env bash
# LLaMA-60M on C4 with GaLore, as published (Zhao et al. 2024): perplexity 34.88. Arguments are passed on and win.
# One process; for N GPUs: NPROC=N bash scripts/pretrain_c4/llama_60m.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --standalone --nproc_per_node "${NPROC:-1}" torchrun_main.py \
    --model_config configs/llama_60m.json \
    --lr 0.01 \
    --galore_scale 0.25 \
    --rank 128 \
    --update_proj_gap 200 \
    --batch_size 256 \
    --total_batch_size 512 \
    --num_training_steps 10000 \
    --warmup_steps 1000 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --optimizer galore_adamw \
    "$@"
