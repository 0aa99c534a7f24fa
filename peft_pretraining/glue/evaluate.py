"""How good a model is at a task: its metrics on each split, over all processes; and what a run leaves at its end."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.nn import functional as F

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.distributed import World
from peft_pretraining.glue.batches import Encoded, ExampleBatch
from peft_pretraining.glue.metrics import score
from peft_pretraining.glue.nf4 import from_nf4
from peft_pretraining.progress import LongWait
from peft_pretraining.training.report import memory_bytes, per_matrix
from peft_pretraining.training.run import Run
from qgalore.memory import kept_bytes
from qgalore.optimizer import LowRankOptimizer


def loss_sum(model: Any, batch: Batch) -> Tensor:
    """The SUM of the cross-entropies of the examples, or of their squared errors in a regression, in float32.

    In training, dropout is a function of the batch: a run that goes on drops what it would have dropped.
    """
    assert isinstance(batch, ExampleBatch)
    if model.training:
        torch.manual_seed(batch.noise)
    logits = model(**batch.features).logits.float()  # (B, classes)
    return losses(logits, batch.targets).sum()


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each example; 0 where the target is IGNORED. logits (B, classes), targets (B,) -> (B,)"""
    if targets.is_floating_point():
        return (logits.squeeze(-1) - targets).square() * (targets != IGNORED)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


@torch.no_grad()
def evaluate(
    model: Any,
    data: Encoded,
    *,
    metrics: tuple[str, ...],
    batch_size: int,
    world: World,
    numbers: tuple[int, ...] = (),
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The mean loss and the metrics on a split, the same on every rank. The model is then back in its old mode.

    Examples of like lengths go together, so that little of a batch is padding.
    numbers: the task's number of each class of the model, where the model has another order. Metrics are by the task's:
        F1 asks which class is number 1.
    stop: is asked before every batch, and says the same on every rank. If it says yes, the result is None.
    """
    order = sorted(range(len(data)), key=data.lengths().__getitem__)
    own, found = order[world.rank :: world.size], []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, math.ceil(len(order) / world.size), batch_size):  # as many on every rank
            if stop():
                return None
            chosen = own[start : start + batch_size]
            if not chosen:
                continue
            features, targets = data.collate(chosen)
            logits = model(**{name: each.to(world.device) for name, each in features.items()}).logits.float().cpu()
            answers = logits.squeeze(-1) if targets.is_floating_point() else logits.argmax(-1)
            rows = zip(chosen, answers.tolist(), losses(logits, targets).tolist(), strict=True)
            found += [list(row) for row in rows]
    finally:
        model.train(was_training)
    everything = sorted(row for rank in world.gather(found) for row in rank)
    _, predictions, lost = zip(*everything, strict=True)
    mean = sum(lost) / len(lost)
    if not math.isfinite(mean):
        return {"loss": mean, **dict.fromkeys((*metrics, "score"), 0.0)}
    of_task = torch.tensor(numbers) if numbers else None
    answers, labels = (x if of_task is None else of_task[x] for x in (torch.tensor(predictions), data.labels))
    return {"loss": mean, **score(metrics, answers, labels)}


@dataclass(frozen=True)
class Judge:
    """Evaluates a run on the splits of its task and remembers the best; writes what the run was for at its end."""

    metrics: tuple[str, ...]
    splits: dict[str, Encoded]  # by name; the first decides what is best
    tokenizer: Any  # of transformers
    numbers: tuple[int, ...] = ()  # see evaluate

    def evaluate(self, run: Run) -> None:
        """Evaluates on all splits, and records the result. A signal ends it without one. See run.Task."""
        state, found = run.state, {}
        with LongWait("evaluating"):
            for name, split in self.splits.items():
                result = evaluate(
                    run.model, split, metrics=self.metrics, batch_size=run.args.per_device_eval_batch_size,
                    world=run.world, numbers=self.numbers, stop=lambda: run.world.any(run.interruption.requested),
                )  # fmt: skip
                if result is None:
                    run.stopping = True
                    return
                found[name] = result
        state.evaluated = state.update
        epoch = state.update / run.args.updates_per_epoch
        last = {"update": state.update, "epoch": epoch, "splits": found}
        best = state.scores.get("best")
        first = next(iter(found.values()))
        if best is None or first["score"] > next(iter(best["splits"].values()))["score"]:
            best = last
        state.scores = {"last": last, "best": best}
        run.record.event("scores", **last)
        for name, values in found.items():
            told = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
            logger.info(f"epoch {epoch:g}, update {state.update}: {name}: {told}")

    def finish(self, run: Run) -> None:
        """Writes the end of the record, all_results.json and, on the main rank, the model. See run.Task."""
        state, args = run.state, run.args
        kept = kept_bytes(run.model, run.updates.optimizer, accumulators=run.updates.sums.values())
        matrices = per_matrix(run, LowRankOptimizer.refreshes)
        measured = {
            "updates": state.update,
            "seconds": round(state.seconds, 3),
            "micro_batch_seconds": state.seconds / max(1, state.update * args.gradient_accumulation),
            "memory_bytes": memory_bytes(run.world.device),
            "kept_bytes": kept,
            "refreshes": sum(matrix["refreshes"] for matrix in matrices),
        }
        run.record.event("end", tokens_seen=state.tokens_seen, **measured, **state.scores)
        logger.info(f"kept between updates: {sum(kept.values()) / 1e6:,.1f} MB {kept}")
        if run.world.is_main:
            write_results(run.save_dir, state.scores)
            save_model(run.model, run.save_dir, tokenizer=self.tokenizer)
            logger.info(f"results: {run.save_dir}/all_results.json; model: {run.save_dir}")


def write_results(folder: Path, scores: dict[str, Any]) -> None:
    """all_results.json: the last evaluation's metrics as eval_NAME, as GaLore's script has them (of mnli, on the
    mismatched split), and the best one's as best_NAME, with its update."""
    last, best = scores["last"]["splits"], scores["best"]["splits"]
    results = {f"eval_{name}": value for name, value in [*last.values()][-1].items() if name not in ("loss", "score")}
    results |= {f"best_{name}": value for name, value in [*best.values()][0].items()}
    results |= {"best_update": scores["best"]["update"]}
    for split, values in list(last.items())[:-1]:
        results |= {f"eval_{split}_{name}": value for name, value in values.items()}
    (folder / "all_results.json").write_text(json.dumps(results, indent=1) + "\n")


def save_model(model: Any, folder: Path, *, tokenizer: Any) -> None:
    """Writes a plain transformers folder; of a model with adapters, these to FOLDER/adapter first, as peft reads them.

    The adapters are then merged into the model, whose quantized weights become floating.
    """
    from qgalore.hf import export
    from qgalore.storage.convert import dequantize_linear_layers

    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")
        dequantize_linear_layers(model)
        from_nf4(model)
        model = model.merge_and_unload()
    export(model, folder)
    tokenizer.save_pretrained(folder)
