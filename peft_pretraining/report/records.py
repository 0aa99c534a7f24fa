"""What a run has recorded, read from its metrics.jsonl into arrays.

Lines of lost work are left out: after a resume or a rollback to update N, what was recorded of later updates does not
count. Lines that are not JSON, such as the last one of a run that was killed, are counted and passed over.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_pretraining.errors import UserError

METRICS = "metrics.jsonl"
UPDATE_FIELDS = ("loss", "lr", "grad_norm", "tokens_seen", "tokens_per_second", "memory_bytes")
EVENTS = ("start", "update", "eval", "scores", "subspaces", "subspace_details", "memory", "end")
EVAL_FIELDS = ("loss", "perplexity", "score")  # of text the first two, of a classification the first and the last
INCIDENTS = {"bad_update": "bad update", "bad_documents": "bad documents", "rollback": "rollback", "resume": "resume"}


class Incident(NamedTuple):
    """Something that went wrong, or a new beginning."""

    update: int
    kind: str  # a value of INCIDENTS
    text: str


@dataclass
class RunRecord:
    """The record of one run. Arrays run over the updates, or the evaluations, that count; NaN stands for null."""

    name: str  # of the run's folder
    start: dict[str, Any] = field(default_factory=dict)  # the last start event
    updates: dict[str, np.ndarray] = field(default_factory=dict)  # "update", UPDATE_FIELDS and "seconds", all (n,)
    evals: dict[str, np.ndarray] = field(default_factory=dict)  # "update" and EVAL_FIELDS, all (n,)
    subspaces: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # matrices of a subspaces event, by update
    details: dict[int, dict[str, Any]] = field(default_factory=dict)  # subspace_details events, by update
    memory: list[dict[str, Any]] = field(default_factory=list)  # memory events
    incidents: list[Incident] = field(default_factory=list)  # in the order in which they happened
    end: dict[str, Any] | None = None  # the end event; None if the run has not come to its end
    unreadable: int = 0  # lines that are not JSON objects

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of the run; empty if the record has no start."""
        args = self.start.get("args")
        return args if isinstance(args, dict) else {}

    @property
    def last_update(self) -> int:
        """Number of the last update that counts, 0 before the first."""
        return int(self.updates["update"][-1]) if len(self.updates["update"]) else 0

    @property
    def scored(self) -> bool:
        """Whether it is judged by a score, as a classification is, and not by perplexity."""
        return bool(np.isfinite(self.evals["score"]).any())

    @property
    def perplexity(self) -> float | None:
        """The validation perplexity of the last evaluation; NaN if it is not finite, None if there is none."""
        return None if self.scored or not len(self.evals["update"]) else float(self.evals["perplexity"][-1])

    @property
    def score(self) -> float | None:
        """The score of the last evaluation on the first split, None if there is none."""
        return float(self.evals["score"][-1]) if self.scored else None

    def happened(self, kind: str) -> int:
        """How often an incident of this kind happened."""
        return sum(incident.kind == kind for incident in self.incidents)


def read_run(path: Path) -> RunRecord:
    """Reads the record of a run from its folder, or from the file itself.

    Raises UserError if there is no such folder, no record in it, or nothing in the record.
    """
    file = path / METRICS if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: there is no such folder. Give the --save_dir of a run.")
    if not file.is_file():
        raise UserError(f"{path}: there is no {METRICS} in it. Give the --save_dir of a run.")
    reader = _Reader(RunRecord(file.resolve().parent.name))
    try:
        for line in _objects(file, reader.run):
            reader.take(line)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Check the file's permissions.") from None
    if not reader.known:
        raise UserError(f"{file}: there is no line of a run's record in it. Give the --save_dir of a run.")
    return reader.finish()


def _objects(file: Path, run: RunRecord) -> Iterator[dict[str, Any]]:
    """The JSON objects of the lines; other lines are counted."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                yield value
            else:
                run.unreadable += 1


class _Reader:
    """Takes one event after the other, and forgets those of lost work."""

    def __init__(self, run: RunRecord) -> None:
        self.run, self.known = run, 0
        self.updates: dict[int, tuple[float, ...]] = {}
        self.evals: dict[int, tuple[float, ...]] = {}

    def take(self, line: dict[str, Any]) -> None:
        """Takes one event; passes over names that it does not know, and numbers that are missing."""
        run, name, update = self.run, line.get("event"), line.get("update")
        self.known += name in EVENTS
        number = update if isinstance(update, int) else None
        if name == "start":
            run.start, run.end = line, None
        elif name == "end":
            run.end = line
        elif name == "memory":
            run.memory.append(line)
        elif number is None:
            return
        elif name == "update":
            self.updates[number] = tuple(_number(line.get(key)) for key in UPDATE_FIELDS)
        elif name == "eval":
            self.evals[number] = tuple(_number(line.get(key)) for key in EVAL_FIELDS)
        elif name == "scores":
            self.evals[number] = tuple(_number(_first_split(line).get(key)) for key in EVAL_FIELDS)
        elif name == "subspaces":
            run.subspaces[number] = [each for each in line.get("matrices") or [] if isinstance(each, dict)]
        elif name == "subspace_details":
            run.details[number] = line
        elif name in INCIDENTS:
            self._incident(name, number, line)

    def _incident(self, name: str, update: int, line: dict[str, Any]) -> None:
        parameters = line.get("parameters") or []
        more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
        texts = {
            "bad_update": f"skipped: {parameters[0]}{more} not finite" if parameters else "skipped: loss not finite",
            "bad_documents": f"{line.get('skipped')} documents skipped, {line.get('total')} so far",
            "rollback": f"loss {_number(line.get('loss')):.3f} is a spike; back to update {line.get('to')}",
            "resume": f"went on after update {update}",
        }
        self.run.incidents.append(Incident(update, INCIDENTS[name], texts[name]))
        if name in ("resume", "rollback"):
            counts = line.get("to") if name == "rollback" else update
            self._forget(later_than=counts if isinstance(counts, int) else update)

    def _forget(self, *, later_than: int) -> None:
        by_update: tuple[dict[int, Any], ...] = (self.updates, self.evals, self.run.subspaces, self.run.details)
        for events in by_update:
            for lost in [update for update in events if update > later_than]:
                del events[lost]

    def finish(self) -> RunRecord:
        """The record, with arrays in the order of the updates."""
        run, order, evaluated = self.run, sorted(self.updates), sorted(self.evals)
        rows = np.array([self.updates[update] for update in order], dtype=float).reshape(-1, len(UPDATE_FIELDS))
        run.updates = {"update": np.array(order, dtype=float)}
        run.updates |= {key: rows[:, column] for column, key in enumerate(UPDATE_FIELDS)}
        run.updates["seconds"] = _seconds(run.updates)
        results = np.array([self.evals[update] for update in evaluated], dtype=float).reshape(-1, len(EVAL_FIELDS))
        run.evals = {"update": np.array(evaluated, dtype=float)}
        run.evals |= {key: results[:, column] for column, key in enumerate(EVAL_FIELDS)}
        run.subspaces = dict(sorted(run.subspaces.items()))
        run.details = dict(sorted(run.details.items()))
        return run


def _seconds(updates: dict[str, np.ndarray]) -> np.ndarray:
    """(n,) seconds spent in the updates up to each one, without evaluations: their tokens over their tokens/s."""
    tokens = np.diff(updates["tokens_seen"], prepend=0.0)
    if len(tokens) > 1 and updates["update"][0] > 1:  # goes on from another folder: what came before is not known
        tokens[0] = np.median(tokens[1:])
    rate = updates["tokens_per_second"]
    spent = np.divide(tokens, rate, out=np.zeros_like(rate), where=rate > 0)
    return np.cumsum(np.nan_to_num(spent).clip(min=0))


def _first_split(line: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a scores event on the first split, which decides what is best; empty if it has none."""
    splits = line.get("splits")
    first = next(iter(splits.values()), None) if isinstance(splits, dict) else None
    return first if isinstance(first, dict) else {}


def _number(value: Any) -> float:
    """A number of the record; NaN for null and for what is no number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
