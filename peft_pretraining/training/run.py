"""A run under way: what it consists of, and how far it has come."""

import argparse
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peft_pretraining.batch import Batch
from peft_pretraining.checkpoint.writer import CheckpointWriter
from peft_pretraining.data.validation import ValidationSet
from peft_pretraining.distributed import World
from peft_pretraining.training.evaluate import Evaluation
from peft_pretraining.training.health import Health
from peft_pretraining.training.interruption import Interruption
from peft_pretraining.training.metrics import Record
from qgalore.per_layer import PerLayerUpdates
from qgalore.whole_model import WholeModelUpdates


@dataclass
class State:
    """How far the run has come: what holds after the last finished update.

    update: number of finished updates, skipped ones included.
    tokens_seen: target tokens of these updates, over all ranks.
    seconds: time spent in them, without evaluations.
    epoch: 0-based number of the latest epoch that this rank has read from.
    evaluated: the update after which the run was last evaluated.
    saved: the update after which it was last saved.
    evaluation: the last evaluation; None before the first.
    health: what has gone wrong so far.
    position: where this rank is in the data, see Batch.
    began: when this process began, on the clock of time.monotonic.
    """

    update: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    epoch: int = 0
    evaluated: int = 0
    saved: int = 0
    evaluation: Evaluation | None = None
    health: Health = field(default_factory=Health)
    position: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def advance(self, batch: Batch, *, targets: int, seconds: float) -> None:
        """Counts one more finished update.

        batch: the last batch of the update on this rank.
        targets: its target tokens, over all ranks.
        seconds: the time it took.
        """
        self.update += 1
        self.tokens_seen += targets
        self.seconds += seconds
        self.epoch = max(self.epoch, batch.epoch)
        self.position = batch.position

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of the state. Beside it are the positions of all ranks."""
        return {key: value for key, value in asdict(self).items() if key not in ("position", "began")}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "State":
        """The inverse of to_json; the position is left empty."""
        evaluation, health = saved["evaluation"], Health(**saved["health"])
        return cls(**saved | {"evaluation": evaluation and Evaluation(*evaluation), "health": health})


@dataclass(kw_only=True)
class Run:
    """Everything that a training step, an evaluation or a save needs.

    args: the completed command line.
    world: this process among the others.
    save_dir: the run's folder, the same on every rank.
    model: the model in training mode.
    updates: what turns gradients into an update of the weights.
    batches: the endless training batches of this rank.
    validation: the validation batches of this rank.
    record: where figures go.
    interruption: whether a signal has asked this process to stop.
    writer: the writer of checkpoints; None except on the main rank.
    fingerprint: what the training data is, see DocumentSource.
    state: how far the run has come.
    stopping: whether all ranks have agreed to end the run early.
    """

    args: argparse.Namespace
    world: World
    save_dir: Path
    model: PreTrainedModel
    updates: WholeModelUpdates | PerLayerUpdates
    batches: Generator[Batch, None, None]
    validation: ValidationSet
    record: Record
    interruption: Interruption
    writer: CheckpointWriter | None
    fingerprint: dict[str, str]
    state: State = field(default_factory=State)
    stopping: bool = False
