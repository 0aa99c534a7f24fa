"""Runs that differ in their seeds alone are one group; what else differs is what a comparison compares."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_pretraining.report.records import RunRecord

# Arguments that say where a run is kept and how it is looked after, not what is trained. A preset stands in the other
# arguments as well.
UNCOMPARED = frozenset(
    "seed save_dir name tags project wandb_mode unset_wandb tensorboard no_report continue_from resume allow_changed "
    "save_every keep_last keep_every workers num_threads single_gpu use_hf_model dry_run eval_only log_details "
    "max_bad_updates max_bad_documents preset config ignored".split()
)
# Arguments that name a group best, the best first.
TELLING = (
    "model_config optimizer peft residual lr rank update_proj_gap proj_type galore_scale weight_quant weight_bits "
    "proj_quant proj_bits cos_threshold dataset total_batch_size num_training_steps"
).split()


@dataclass
class Group:
    """Runs with the same arguments but for the seed."""

    label: str
    runs: list[RunRecord]
    number: int  # 0-based, in the order in which the runs were given

    @property
    def args(self) -> dict[str, Any]:
        """The arguments that are compared."""
        return compared(self.runs[0])


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """The groups, in the order of their first runs."""
    by_args: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_args.setdefault(_words({key: value for key, value in compared(run).items() if value}), []).append(run)
    members = list(by_args.values())
    return [Group(label, runs, i) for i, (label, runs) in enumerate(zip(_labels(members), members, strict=True))]


def compared(run: RunRecord) -> dict[str, Any]:
    """The arguments of a run that can set it apart; of a model and a tokenizer, the name without its folder."""
    args = {key: value for key, value in run.args.items() if key not in UNCOMPARED}
    for key in ("model_config", "tokenizer"):
        if isinstance(args.get(key), str):
            args[key] = Path(args[key]).name
    return args


def differing(groups: Sequence[Group]) -> list[str]:
    """The arguments in which groups differ, the most telling first."""
    return _differing([group.args for group in groups])


def _differing(args: Sequence[dict[str, Any]]) -> list[str]:
    keys = {key: None for each in args for key in each}
    found = [key for key in keys if len({_words(each.get(key) or None) for each in args}) > 1]
    return sorted(found, key=lambda key: (TELLING.index(key) if key in TELLING else len(TELLING), key))


def _words(value: Any) -> str:
    """Text that is the same for the same value. A switch that is off is like one that the run did not know."""
    return json.dumps(value, sort_keys=True, default=str)


def _labels(members: Sequence[Sequence[RunRecord]]) -> list[str]:
    """A short name for each group: as few of the differing arguments as tell them apart."""
    args = [compared(runs[0]) for runs in members]
    if len(members) == 1:
        return [str(args[0].get("optimizer") or members[0][0].name)]
    chosen: list[str] = []

    def names() -> list[str]:
        return [", ".join(part for key in chosen if (part := _part(key, each.get(key)))) or "default" for each in args]

    for key in _differing(args):
        before = len(set(names())) if chosen else 0
        chosen.append(key)
        if len(set(names())) <= before:
            chosen.pop()
        if len(set(names())) == len(args):
            break
    return [f"{name} ({i + 1})" if names().count(name) > 1 else name for i, name in enumerate(names())]


def _part(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    if key in ("optimizer", "peft", "model_config"):
        return str(value).removesuffix(".json")
    return key if value is True else f"{key} {value}"


@dataclass
class Spread:
    """The mean of a figure over the runs of a group, and how far they lie apart."""

    mean: float
    half_range: float
    runs: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """The spread of the values that are known; None if none is. A value that is not finite makes the mean so."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(float(np.mean(known)), float(np.max(known) - np.min(known)) / 2, len(known))


def tokens_per_second(run: RunRecord) -> float | None:
    """The median over the updates; None without any."""
    rates = run.updates["tokens_per_second"]
    return float(np.nanmedian(rates)) if np.isfinite(rates).any() else None


def state_bytes(run: RunRecord) -> float | None:
    """Bytes that the optimizer keeps between updates: bases, moments, sums. None before the end of a run."""
    kept = (run.end or {}).get("kept_bytes")
    if not isinstance(kept, dict):
        return None
    return float(sum(kept.get(kind) or 0 for kind in ("bases", "moments", "accumulators")))


def peak_bytes(run: RunRecord) -> float | None:
    """The largest memory that the process had: allocated on a GPU, resident on a CPU."""
    peaks = run.updates["memory_bytes"]
    return float(np.nanmax(peaks)) if np.isfinite(peaks).any() else None
