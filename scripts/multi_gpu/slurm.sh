#!/usr/bin/env bash
#SBATCH --job-name=60m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# LLaMA-60M on C4 with GaLore, under Slurm: one torchrun a node, which starts a process a GPU. From the repository's root:
#     sbatch scripts/multi_gpu/slurm.sh --save_dir runs/60m
# Five minutes before the time limit all processes are told to stop, and save. Submitted again, or put back into the queue
# because a node failed, the run goes on. Arguments are passed on and win.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"  # Slurm runs a copy of this file from another folder
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# A new store for each start: in the old one, torch finds processes that are dead (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${NPROC:-auto}" --max-restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "$host:${PORT:-29500}" --rdzv_id "$SLURM_JOB_ID" \
    torchrun_main.py --preset galore_60m --batch_size 16 --save_dir runs/60m --save_every 500 --keep_last 2 \
    --resume auto "$@"
