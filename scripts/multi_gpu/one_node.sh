#!/usr/bin/env bash
# LLaMA-60M on C4 with GaLore, on all GPUs of this machine; NPROC=4 for four of them. Arguments are passed on and win:
# --parallel fsdp for a model that does not fit one GPU, --save_dir for a folder of its own.
# If a process dies, torchrun starts all of them again, at most three times, and the run goes on from its last checkpoint;
# after more, or a power cut, the same command does.
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --standalone --nproc_per_node "${NPROC:-auto}" --max-restarts 3 torchrun_main.py \
    --preset galore_60m --batch_size 16 --save_dir runs/60m --save_every 500 --keep_last 2 --resume auto "$@"
