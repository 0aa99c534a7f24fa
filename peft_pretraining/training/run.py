"""A run under way: its parts, and how far it has come."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from peft_pretraining.batch import Batch
from peft_pretraining.checkpoint.writer import CheckpointWriter
from peft_pretraining.data.position import Progress
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.validation import ValidationSet
from peft_pretraining.distributed import World
from peft_pretraining.training.evaluate import Evaluation
from peft_pretraining.training.health import Health
from peft_pretraining.training.interruption import Interruption
from peft_pretraining.training.memory_watch import MemoryWatch
from peft_pretraining.training.metrics import Record
from qgalore.per_layer import PerLayerUpdates
from qgalore.whole_model import WholeModelUpdates


@dataclass
class State:
    """How far the run has come. It describes the moment after the last finished update."""

    update: int = 0  # number of finished updates, including skipped ones
    tokens_seen: int = 0  # target tokens of these updates, over all ranks
    seconds: float = 0.0  # time spent in these updates, without evaluations
    epoch: int = 0  # 0-based number of the latest epoch that this rank has read from
    shortened: int = 0  # dialogues of --task sft that were too long, and ended after an earlier answer; over all ranks
    left_out: int = 0  # those that were longer still
    evaluated: int = 0  # update after which the run was last evaluated
    saved: int = 0  # update after which the run was last saved
    evaluation: Evaluation | None = None  # result of the last evaluation; None before the first
    scores: dict[str, Any] = field(default_factory=dict)  # of a task with scores: its last and its best evaluation
    health: Health = field(default_factory=Health)  # what has gone wrong so far
    position: Progress | None = None  # position in the data, as far as this rank knows; None before the first update
    began: float = field(default_factory=time.monotonic)  # start of this process, on the clock of time.monotonic

    def to_json(self) -> dict[str, Any]:
        """The part of the state that a checkpoint keeps. The position in the data is saved beside it."""
        return {key: value for key, value in asdict(self).items() if key not in ("position", "began")}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "State":
        """The inverse of to_json. The position is left empty."""
        evaluation, health = saved["evaluation"], Health(**saved["health"])
        return cls(**saved | {"evaluation": evaluation and Evaluation(*evaluation), "health": health})


@dataclass(frozen=True)
class Task:
    """What a run learns: the things in which tasks differ for the loop.

    loss_sum: the sum of the losses over the targets of a batch that are not IGNORED. ()
    lr_ratio: the learning rate of a 1-based update over the peak rate, by the arguments of the run.
    evaluate: evaluates and records the result; sets run.stopping where a signal has ended it.
    save_result: writes what the run was for, at its end.
    """

    loss_sum: Callable[[PreTrainedModel, Batch], Tensor]
    lr_ratio: Callable[[argparse.Namespace, int], float]
    evaluate: Callable[["Run"], None]
    save_result: Callable[["Run"], None]


@dataclass(kw_only=True)
class Run:
    """Everything that a training step, an evaluation or a save needs."""

    args: argparse.Namespace  # the completed command line
    world: World  # this process among the others
    save_dir: Path  # the run's folder, the same on every rank
    model: PreTrainedModel  # the model in training mode
    updates: WholeModelUpdates | PerLayerUpdates  # turns gradients into an update of the weights
    batches: Iterator[Batch]  # the endless training batches of this rank
    validation: ValidationSet | None  # the validation batches of this rank; None for a task that has its own
    record: Record  # takes the figures of the run
    interruption: Interruption  # knows whether a signal has asked this process to stop
    writer: CheckpointWriter | None  # writes checkpoints; None except on the main rank
    tokenizer: Tokenizer  # the tokenizer of both
    fingerprint: dict[str, str]  # identifies the training data, see DocumentSource
    validation_fingerprint: dict[str, str]  # identifies the validation data
    task: Task | None = None  # what is learned; None for the next token, see loop.LANGUAGE
    state: State = field(default_factory=State)  # how far the run has come
    memory: MemoryWatch | None = None  # puts the planned memory beside the measured one; None where it is not planned
    stopping: bool = False  # whether all ranks have agreed to end the run early
