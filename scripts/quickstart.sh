#!/usr/bin/env bash
# From nothing to a LLaMA that learns, on any machine: sets up a virtual environment, then trains configs/llama_3m.json with
# Q-GaLore on the documentation of the installed Python packages for about 3 minutes on 2 cores. Arguments are passed on
# and win.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/set_up.sh requirements.txt
torchrun --standalone torchrun_main.py \
    --model_config configs/llama_3m.json \
    --dataset pydocs \
    --optimizer q_galore_adamw8bit_per_layer \
    --proj_quant --proj_bits 4 \
    --weight_quant --weight_bits 8 \
    --stochastic_round \
    --rank 48 \
    --update_proj_gap 10 \
    --galore_scale 0.5 \
    --lr 0.01 \
    --batch_size 16 \
    --num_training_steps 500 \
    --eval_every 10 \
    --eval_tokens 20K \
    --wandb_mode disabled \
    "$@"
