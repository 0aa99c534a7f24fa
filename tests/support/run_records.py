"""Records of runs that never took place, with figures that are known."""

import json
import math
from pathlib import Path
from typing import Any

KINDS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
ARGS = {"optimizer": "galore_adamw", "lr": 0.01, "seed": 0, "save_dir": "runs/a", "num_training_steps": 100}
TOKENS = 512  # of an update


def matrices(layers: int) -> list[str]:
    """The names of a LLaMA's matrices."""
    return [f"model.layers.{layer}.{kind}.weight" for layer in range(layers) for kind in KINDS.split()]


def start(**args: Any) -> dict[str, Any]:
    return {"event": "start", "args": ARGS | args, "device": "x86_64 CPU", "commit": "abc"}


def update(number: int, **fields: Any) -> dict[str, Any]:
    """An update whose loss is 5 + 1 / number; two of them take a second."""
    known = dict(loss=5 + 1 / number, lr=0.01, grad_norm=1.0, memory_bytes=3 * 10**8)
    speed = dict(tokens_seen=number * TOKENS, tokens_per_second=2.0 * TOKENS)
    return {"event": "update", "update": number} | known | speed | fields


def evaluation(number: int, *, perplexity: float | None) -> dict[str, Any]:
    loss = None if perplexity is None else math.log(perplexity)
    return {"event": "eval", "update": number, "loss": loss, "perplexity": perplexity, "tokens": 1000}


def scores(number: int, *, score: float, loss: float = 0.5) -> dict[str, Any]:
    """An evaluation of a classifier on two splits, of which the first counts."""
    splits = {"validation": {"loss": loss, "accuracy": score, "score": score}, "other": {"loss": 9.0, "score": 0.0}}
    return {"event": "scores", "update": number, "epoch": number / 10, "splits": splits}


def subspaces(number: int, *, refreshes: dict[str, int], overlap: float | None = None) -> dict[str, Any]:
    rows = [dict(name=k, refreshes=v, failed=0, seconds=0.1, gap=10, overlap=overlap) for k, v in refreshes.items()]
    return {"event": "subspaces", "update": number, "matrices": rows}


def end(number: int, **kept: int) -> dict[str, Any]:
    return {"event": "end", "updates": number, "kept_bytes": kept, "seconds": number / 2, "refreshes": 0}


def whole_run(folder: Path, *, updates: int = 100, every: int = 20, gain: float = 0.0, **args: Any) -> Path:
    """The folder of a run that came to its end, and whose perplexity after update u was 1000 / u + gain."""
    lines = [start(**args)]
    for number in range(1, updates + 1):
        lines.append(update(number, loss=5 + 1 / number + gain))
        if number % every == 0:
            counts = {name: 1 + number // every for name in matrices(2)}
            lines += [evaluation(number, perplexity=1000 / number + gain)]
            lines += [subspaces(number, refreshes=counts, overlap=number / updates)]
    return write(folder, [*lines, end(updates, weights=2 * 10**6, bases=10**5, moments=4 * 10**6)])


def write(folder: Path, lines: list[dict[str, Any]], *, cut: str = "") -> Path:
    """The folder with these lines in its metrics.jsonl. cut: the beginning of a line whose writer was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    return folder
