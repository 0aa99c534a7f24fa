#!/usr/bin/env bash
# LLaMA-60M on C4 with GaLore, on several machines with a common file system. Start it on each of them, with the name of
# one as HOST, which has to live as long as the job:
#     HOST=node1 NODES=2 bash scripts/multi_gpu/several_nodes.sh
# With NODES=1:2 the job goes on with one machine if the other dies, and with both when it is back and the script is started
# there again. An update has 512 sequences in any case: it needs 512 to be a multiple of batch_size x all GPUs.
# Arguments are passed on and win.
set -euo pipefail
cd "$(dirname "$0")/../.."
# A new store for each start: in the old one, torch finds processes that are dead (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --nnodes "${NODES:?how many machines}" --nproc_per_node "${NPROC:-auto}" --max-restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "${HOST:?the name of one machine}:${PORT:-29500}" --rdzv_id "${JOB:-60m}" \
    torchrun_main.py --preset galore_60m --batch_size 16 --save_dir runs/60m --save_every 500 --keep_last 2 \
    --resume auto "$@"
