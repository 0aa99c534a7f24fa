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
    too_long: tuple[int, int] = (0, 0)  # dialogues that were shortened and left out on the way, see packing.TooLong
    # (B, L) int64: the place of each token in its document, if a sequence holds several that must not see each other.
    positions: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tensor, *, epoch: int) -> Batch:
        """A batch from (B, 2, L) int32 tokens: the inputs above the targets; or (B, 3, L), with positions below."""
        input_ids, targets, *positions = (part.contiguous() for part in tokens.long().unbind(1))
        return cls(input_ids, targets, epoch, positions=positions[0] if positions else None)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. Call it in the thread that trains, because the current GPU belongs to the thread."""

        def there(tensor: Tensor) -> Tensor:
            if device.type != "cuda" or tensor.is_cuda:
                return tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)  # pinned, so that the host does not wait

        positions = None if self.positions is None else there(self.positions)
        return replace(self, input_ids=there(self.input_ids), targets=there(self.targets), positions=positions)
