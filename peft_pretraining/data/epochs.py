"""How long one pass over the dialogues is, found by tokenizing and packing them once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from peft_pretraining.batch import IGNORED
from peft_pretraining.data.order import Skipped
from peft_pretraining.data.packing import Packing, make_packer
from peft_pretraining.data.pieces import encode
from peft_pretraining.data.sources import DocumentSource
from peft_pretraining.data.tokenizer import Tokenizer


class Epoch(NamedTuple):
    """The size of an epoch."""

    dialogues: int  # that can be read, also those that are too long
    sequences: float  # that they fill; a sequence that the next epoch goes on filling counts in part
    places: float  # of these sequences that hold a token, in units of a sequence

    @property
    def filled(self) -> float:
        """The share of the sequences that is no padding."""
        return self.places / self.sequences if self.sequences else 0.0


def measure_epoch(source: DocumentSource, tokenizer: Tokenizer, *, packing: Packing, max_length: int) -> Epoch:
    """The first epoch as the virtual readers of a run pack it. Later ones are shuffled, and so packed, a bit otherwise.

    max_length: tokens of a sequence, L.
    """
    packers = [make_packer(packing, tokenizer, length=max_length) for _ in range(source.readers)]
    dialogues, sequences, places = 0, 0.0, 0.0
    for item in encode(source.read(epoch=0, readers=source.readers), tokenizer):
        if isinstance(item, Skipped):
            continue
        dialogues += 1
        for sequence in packers[item.reader].add(item):
            sequences += 1
            places += _filled(sequence.tokens)
    rest = sum(_filled(tokens) for packer in packers for tokens in packer.end())
    return Epoch(dialogues, sequences + rest, places + rest)


def _filled(tokens: np.ndarray) -> float:
    """The share of a sequence up to its last target, with which its last dialogue ends."""
    targets = np.flatnonzero(tokens[1] != IGNORED)
    return (targets[-1] + 1) / tokens.shape[1] if len(targets) else 0.0
