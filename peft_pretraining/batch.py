"""What training and evaluation are fed: token ids, and beside each the token that follows it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the target where nothing is to be predicted: what cross_entropy ignores


@dataclass(frozen=True)
class Batch:
    """Some sequences, and where the data stands after them.

    input_ids: (B, L) int64.
    targets: (B, L) int64; `targets[b, t]` is the token that follows `input_ids[b, t]`, or IGNORED.
    epoch: 0-based number of the latest epoch that a document of this batch came from.
    position: plain JSON, all that this rank has consumed up to and including the batch; see train_batches.
    skipped: one line for each document that could not be read on the way to this batch.
    """

    input_ids: Tensor
    targets: Tensor
    epoch: int
    position: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokens: Tensor, *, epoch: int) -> Batch:
        """A batch from (B, 2, L) int32 of inputs above targets."""
        input_ids, targets = tokens.long().unbind(1)
        return cls(input_ids.contiguous(), targets.contiguous(), epoch)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. Call it in the thread that trains, because the current GPU belongs to the thread."""
        if device.type != "cuda":
            return replace(self, input_ids=self.input_ids.to(device), targets=self.targets.to(device))
        # Pinned, so that nobody waits for the copy.
        input_ids, targets = (
            tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.input_ids, self.targets)
        )
        return replace(self, input_ids=input_ids, targets=targets)
