"""The loss of loss.py with all rows and some words of the vocabulary at once, for a head that is larger than its input.

By chunks of rows, dW (vocab, hidden) is summed in float32 and read and written once a chunk. By chunks of words each of
its rows is one product, so it is made where it will stay, in the model's dtype, and it is dH (rows, hidden) that is
summed. The softmax needs all words, so the logits are made twice: once for its sums, in forward, and again in backward.
That is one product more, of four, and 2 bytes in place of 4 for each element of dW: for a vocabulary of 128,000 and
4096 columns 1 GB at the peak of training.

A quantized head is decoded by chunks, too.

On a GPU the product costs no more than the reading and writing that it replaces. On a CPU it does; loss.py chooses.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_pretraining.batch import IGNORED
from qgalore.storage.chunks import row_chunks
from qgalore.storage.quantized_weight import open_weight


class HeadLossByWords(torch.autograd.Function):
    """The summed cross-entropy of softmax(hidden @ weight.T), in float32 or wider; differentiable once.

    hidden: (rows, hidden); weight: (vocab, hidden), in the same dtype or quantized; targets: (rows,) int64, or IGNORED.
    elements: logits that exist at once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, elements: int) -> Tensor:
        normalizer, chosen = _sums(hidden, weight, targets, elements=elements)
        loss = ((normalizer - chosen) * _counted(targets)).sum()
        ctx.save_for_backward(hidden, weight, targets, normalizer, loss.isfinite())
        ctx.elements = elements
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, normalizer, finite = ctx.saved_tensors
        # Whoever sums gradients over the ranks must learn of a loss that is not finite.
        factor = torch.where(finite, d_loss, torch.nan) * _counted(targets)  # (rows, 1)
        d_hidden, d_weight = torch.zeros_like(hidden, dtype=normalizer.dtype), hidden.new_empty(weight.shape)
        for words, values in _chunks(hidden, weight, elements=ctx.elements):
            dz = _logits(hidden, values).sub_(normalizer).exp_().mul_(factor)
            place, inside = _places(targets, words)
            dz = dz.scatter_add_(1, place, -factor * inside).to(hidden.dtype)
            torch.mm(dz.T, hidden, out=d_weight[words])
            d_hidden += dz @ values
        return d_hidden.to(hidden.dtype), d_weight, None, None


def _sums(hidden: Tensor, weight: Tensor, targets: Tensor, *, elements: int) -> tuple[Tensor, Tensor]:
    """log sum exp of each row's logits, and the logit of its target; 0 where that is IGNORED. Both (rows, 1)"""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    highest = torch.full((len(hidden), 1), -torch.inf, dtype=wide, device=hidden.device)
    total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
    for words, values in _chunks(hidden, weight, elements=elements):
        z = _logits(hidden, values)
        place, inside = _places(targets, words)
        chosen += torch.where(inside, z.gather(1, place), 0.0)
        before, highest = highest, torch.maximum(highest, z.amax(1, keepdim=True))
        total = total * (before - highest).exp_() + z.sub_(highest).exp_().sum(1, keepdim=True)
    return highest + total.log(), chosen


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(rows, words), float32 or wider."""
    return (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))


def _places(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Where among these words the target of each row is, and whether it is there. Both (rows, 1)"""
    inside = (targets >= words.start) & (targets < words.stop)  # IGNORED is below all words
    return (targets - words.start).clamp(0, words.stop - words.start - 1).unsqueeze(1), inside.unsqueeze(1)


def _counted(targets: Tensor) -> Tensor:
    return (targets != IGNORED).unsqueeze(1)  # (rows, 1)


def _chunks(hidden: Tensor, weight: Tensor, *, elements: int) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of words with their rows of the weight: a multiple of 64, for the tensor cores."""
    stored = open_weight(weight)
    for words in row_chunks(len(weight), len(hidden), device=hidden.device, multiple=64, elements=elements):
        yield words, stored.rows(words).read(hidden.dtype)
