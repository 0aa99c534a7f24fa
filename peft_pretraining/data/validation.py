"""The validation set: a fixed number of target tokens, kept in memory, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from loguru import logger

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.data.order import Skipped
from peft_pretraining.data.packing import Packer, Packing, make_packer
from peft_pretraining.data.pieces import encode
from peft_pretraining.data.sources import DocumentSource
from peft_pretraining.errors import UserError
from peft_pretraining.progress import LongWait

if TYPE_CHECKING:
    from peft_pretraining.data.tokenizer import Tokenizer

MAX_WARNINGS = 5  # for bad documents


class ValidationSet:
    """The first target tokens of the validation stream, read once; iterates over this rank's batches.

    The targets are the same for any world size and batch size: sequence i belongs to rank i % world_size. All ranks
    have equally many batches: if there are not enough sequences, the last rows have no target.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        tokens: int,
        batch_size: int,
        max_length: int,
        packing: Packing,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Reads and packs the documents. Raises UserError if there is none.

        tokens: how many target tokens to keep.
        batch_size: sequences in a batch, B.
        max_length: tokens of a sequence, L.
        """
        assert tokens >= 1 and batch_size >= 1 and max_length >= 2 and 0 <= rank < world_size
        self.batch_size = batch_size
        self.device = torch.device(device)
        packer = make_packer(packing, tokenizer, length=max_length)
        windows = _validation_windows(source, tokenizer, packer=packer)
        sequences, self.tokens = _take_targets(windows, tokens=tokens)
        if not sequences:
            raise UserError(f"no validation document in {source.name}. Give some with --validation PATH.")
        sequences += [packer.nothing()] * (-len(sequences) % world_size)
        self.sequences = torch.from_numpy(np.stack(sequences[rank::world_size]))  # (N, 2 or 3, L) int32

    def __len__(self) -> int:
        """Batches of this rank; the same for all ranks."""
        return -(-len(self.sequences) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for tokens in self.sequences.split(self.batch_size):
            yield Batch.of(tokens, epoch=0).to(self.device)


def _validation_windows(source: DocumentSource, tokenizer: Tokenizer, *, packer: Packer) -> Iterator[np.ndarray]:
    """(2 or 3, L) int32 each, all of the source. Bad documents are left out with a warning when the reading ends."""
    skipped: list[str] = []
    try:
        for item in encode(source.read(epoch=0), tokenizer):
            if isinstance(item, Skipped):
                skipped.append(item.reason)
            else:
                yield from (sequence.tokens for sequence in packer.add(item))
        yield from packer.end()
    finally:
        for reason in skipped[:MAX_WARNINGS]:
            logger.warning(f"skipped a validation document: {reason}")
        if len(skipped) > MAX_WARNINGS:
            logger.warning(f"skipped {len(skipped) - MAX_WARNINGS} more validation documents")


def _take_targets(sequences: Iterator[np.ndarray], *, tokens: int) -> tuple[list[np.ndarray], int]:
    """The first sequences that hold `tokens` targets, and their number of targets. Targets beyond become IGNORED."""
    taken: list[np.ndarray] = []
    missing = tokens
    with LongWait("reading validation tokens", total=tokens) as progress:
        for sequence in sequences:
            taken.append(sequence)
            places = np.flatnonzero(sequence[1] != IGNORED)
            sequence[1, places[missing:]] = IGNORED
            missing -= min(missing, len(places))
            progress.advance(len(places))
            if missing == 0:
                break
    return taken, tokens - missing
