"""Batches for training and evaluation: token ids, and for each of them the token that follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the target of a position where nothing is predicted; cross_entropy ignores it


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens, and the position in the data after them."""

    input_ids: Tensor  # (B, L) int64
    targets: Tensor  # (B, L) int64; targets[b, t] is the token after input_ids[b, t], or IGNORED
    epoch: int  # 0-based number of the latest epoch that a document of this batch comes from
    position: Any = None  # a data.position.Progress: how far the run has come, as far as this rank knows
    skipped: tuple[str, ...] = ()  # one line for each document that could not be read on the way to this batch

    @classmethod
    def of(cls, tokens: Tensor, *, epoch: int) -> Batch:
        """A batch from (B, 2, L) int32 tokens: the inputs above the targets."""
        input_ids, targets = tokens.long().unbind(1)
        return cls(input_ids.contiguous(), targets.contiguous(), epoch)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. Call it in the thread that trains, because the current GPU belongs to the thread."""
        tensors = self.input_ids, self.targets
        if device.type == "cuda":  # pinned, so that the host does not wait for the copy
            tensors = self.input_ids.pin_memory(), self.targets.pin_memory()
        input_ids, targets = (tensor.to(device, non_blocking=device.type == "cuda") for tensor in tensors)
        return replace(self, input_ids=input_ids, targets=targets)
