#!/usr/bin/env bash
# From nothing to a LLaMA that learns, on any machine: sets up a virtual environment, then trains configs/llama_3m.json with
# Q-GaLore on the documentation of the installed Python packages. A few updates show how fast the machine is; then as many
# are chosen as take about 4 minutes, from 140 to 500. Arguments are passed on and win.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/set_up.sh requirements.txt

train() {
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
        --eval_every 10 \
        --eval_tokens 10K \
        --wandb_mode disabled \
        "$@"
}

updates=500
if [[ " $* " != *" --num_training_steps"* ]]; then
    trial=$(mktemp -d)
    trap 'rm -rf "$trial"' EXIT
    echo "measuring this machine with six updates" >&2
    train --num_training_steps 6 --save_dir "$trial/run" 2> "$trial/log" || { cat "$trial/log" >&2; exit 1; }
    updates=$(python - "$trial/run/metrics.jsonl" <<'PYTHON'
import json, statistics, sys

lines = [json.loads(line) for line in open(sys.argv[1])]
speeds = [line["tokens_per_second"] for line in lines if line["event"] == "update"][1:]
seconds = 16 * 256 / statistics.median(speeds)
updates = max(140, min(500, round(240 / seconds, -1)))
print(f"an update takes {seconds:.2f} s here: {updates:.0f} updates, about {updates * seconds / 60:.0f} min", file=sys.stderr)
print(f"{updates:.0f}")
PYTHON
    )
fi
train --num_training_steps "$updates" "$@"
