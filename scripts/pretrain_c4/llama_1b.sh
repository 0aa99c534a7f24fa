#!/usr/bin/env bash
# LLaMA-1B on C4 with GaLore, as published (Zhao et al. 2024; the paper's 15.64 is at rank 512). Arguments are passed on
# and win.
# One process; for N GPUs: NPROC=N bash scripts/pretrain_c4/llama_1b.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --standalone --nproc_per_node "${NPROC:-1}" torchrun_main.py \
    --model_config configs/llama_1b.json \
    --lr 0.01 \
    --galore_scale 0.25 \
    --rank 1024 \
    --update_proj_gap 200 \
    --batch_size 16 \
    --total_batch_size 512 \
    --num_training_steps 100000 \
    --warmup_steps 10000 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --optimizer galore_adamw \
    "$@"
