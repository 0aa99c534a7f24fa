#!/usr/bin/env bash
# LLaMA-130M on C4 with GaLore, as published (Zhao et al. 2024): perplexity 25.36. Arguments are passed on and win.
# One process; for N GPUs: NPROC=N bash scripts/pretrain_c4/llama_130m.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --standalone --nproc_per_node "${NPROC:-1}" torchrun_main.py \
    --model_config configs/llama_130m.json \
    --lr 0.01 \
    --galore_scale 0.25 \
    --rank 256 \
    --update_proj_gap 200 \
    --batch_size 256 \
    --total_batch_size 512 \
    --num_training_steps 20000 \
    --warmup_steps 2000 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --optimizer galore_adamw \
    "$@"
