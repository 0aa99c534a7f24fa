"""Examples as batches: token ids with padding, in an order that is a function of the seed and the epoch.

An epoch has ceil(examples / examples of an update) updates. The last one has what is left, over all micro-batches and
processes; a micro-batch with no example of its own has one whose target is IGNORED. So an update has the same examples
on any number of processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.data.position import Position, Progress
from peft_pretraining.distributed import World
from peft_pretraining.glue.data import Example
from qgalore.storage.rounding import mix_seed

_ORDER, _NOISE = 11, 12  # tell the seeds of the order and of dropout apart


@dataclass(frozen=True)
class ExampleBatch(Batch):
    """Examples with padding. `targets` is (B,): classes in int64, or values in float32; IGNORED where there is none."""

    features: dict[str, Tensor] = field(default_factory=dict)  # what the model is called with, each (B, L)
    noise: int = 0  # seed of dropout

    def to(self, device: torch.device) -> "ExampleBatch":
        """The batch on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.features.items()}
        return replace(self, input_ids=moved["input_ids"], targets=self.targets.to(device), features=moved)


class Encoded:
    """Tokenized examples of one split."""

    def __init__(self, examples: Sequence[Example], *, tokenizer: Any, max_length: int, pad_to: int | None) -> None:
        """
        tokenizer: of transformers, with a padding token.
        max_length: tokens to which the text, or the longer of the pair, is cut.
        pad_to: length of every sequence; None for the longest of a batch.
        """
        self.tokenizer, self.pad_to = tokenizer, pad_to
        columns = list(zip(*(example.texts for example in examples), strict=True))
        self.rows = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
        labels = [example.label for example in examples]
        self.labels = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> list[int]:
        """The tokens of each example."""
        return [len(ids) for ids in self.rows["input_ids"]]

    def collate(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """The features and the labels of some examples, in host memory."""
        rows = {name: [column[i] for i in indices] for name, column in self.rows.items()}
        padding = "longest" if self.pad_to is None else "max_length"
        padded = self.tokenizer.pad(rows, padding=padding, max_length=self.pad_to, return_tensors="pt")
        return dict(padded), self.labels[list(indices)]


def order_of(count: int, *, seed: int, epoch: int) -> list[int]:
    """The order of `count` examples in an epoch."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch, _ORDER))
    return torch.randperm(count, generator=generator).tolist()


def training_batches(
    data: Encoded, *, batch_size: int, accumulation: int, seed: int, world: World, resume: Any = None
) -> Iterator[ExampleBatch]:
    """The endless micro-batches of this rank, on its device.

    resume: the saved position of a run, as Progress.to_json gave it; an update begins there.
    """
    done = Progress.from_json(resume).readers[0] if resume else Position()
    epoch, start = done.epoch, done.document
    size = batch_size * accumulation * world.size
    while True:
        order = order_of(len(data), seed=seed, epoch=epoch)
        while start < len(order):
            chosen = order[start : start + size]
            start += size
            position = Progress((Position(epoch=epoch, document=start),))
            for k in range(accumulation):
                slot = k * world.size + world.rank
                own = chosen[slot * batch_size : (slot + 1) * batch_size]
                features, targets = data.collate(own or chosen[:1])
                batch = ExampleBatch(
                    features["input_ids"], targets if own else torch.full_like(targets, IGNORED), epoch,
                    position=position, features=features, noise=mix_seed(seed, epoch, start, slot, _NOISE),
                )  # fmt: skip
                yield batch.to(world.device)
        epoch, start = epoch + 1, 0
