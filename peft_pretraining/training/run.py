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
from peft_pretraining.training.metrics import Metrics
from qgalore.per_layer import PerLayerUpdates
from qgalore.whole_model import WholeModelUpdates


@dataclass
class State:
    """How far the run has come.

    update: updates finished, skipped ones included.  seconds: spent in them, evaluations left out.  epoch: 0-based.
    position: of this rank in the data, see Batch.  evaluated, saved: the updates after which that was done last.
    began: when this process did, on the clock of time.monotonic.
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

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; positions are gathered from all ranks beside it."""
        return {key: value for key, value in asdict(self).items() if key not in ("position", "began")}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "State":
        evaluation, health = saved["evaluation"], Health(**saved["health"])
        return cls(**saved | {"evaluation": evaluation and Evaluation(*evaluation), "health": health})


@dataclass
class Run:
    """Everything that a training step, an evaluation or a save needs.

    writer: of checkpoints, on the main rank only.  fingerprint: of the training data.  stopping: whether all ranks
    have agreed to end the run early.
    """

    args: argparse.Namespace
    world: World
    save_dir: Path
    model: PreTrainedModel
    updates: WholeModelUpdates | PerLayerUpdates
    batches: Generator[Batch, None, None]
    validation: ValidationSet
    metrics: Metrics
    interruption: Interruption
    writer: CheckpointWriter | None
    fingerprint: dict[str, str]
    state: State = field(default_factory=State)
    stopping: bool = False
