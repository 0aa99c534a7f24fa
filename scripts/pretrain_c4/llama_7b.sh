#!/usr/bin/env bash
# LLaMA-7B on C4 with GaLore, as published (Zhao et al. 2024). Arguments are passed on and win.
# One process; for N GPUs: NPROC=N bash scripts/pretrain_c4/llama_7b.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --standalone --nproc_per_node "${NPROC:-1}" torchrun_main.py \
    --model_config configs/llama_7b.json \
    --lr 0.005 \
    --galore_scale 0.25 \
    --rank 1024 \
    --update_proj_gap 500 \
    --batch_size 8 \
    --total_batch_size 512 \
    --num_training_steps 150000 \
    --warmup_steps 15000 \
    --weight_decay 0 \
    --grad_clipping 1.0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --optimizer galore_adamw \
    "$@"
