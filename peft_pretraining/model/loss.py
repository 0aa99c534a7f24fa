"""The next-token loss, without ever holding the logits of all tokens.

With H (rows, hidden) the last hidden states and W (vocab, hidden) the head, the loss needs three products:

    Z  = H W^T      the logits       (rows, vocab)
    dH = dZ W       dZ = softmax(Z) - onehot(targets)
    dW = dZ^T H

Z is the largest tensor of a training step, and dZ needs nothing but Z: the gradient of a sum of losses is known, up to
one factor, as soon as the loss is. So each chunk of rows makes all three products while its logits are at hand and then
forgets them; backward only multiplies by that factor. dtypes: the products take the model's dtype, the softmax and the
sums over chunks of the loss and of dW are float32. (Summed in bfloat16, dW is off by 0.45% after 16 chunks, by 2.2%
after 256; in float32 by 0.2%, which is the final rounding.)

Why not F.linear_cross_entropy, which torch 2.13 has and which makes the same three products: from bfloat16 it returns
the loss in bfloat16, having summed it there. Measured with torch 2.13 on 2 busy CPU cores with AVX512-BF16: hidden 512,
vocab 32000, 2048 rows in chunks of 512, forward and backward; the best time of several interleaved runs; errors
relative to float64:

    bfloat16                           seconds  peak MB  loss     dH       dW
    this file                          1.2      281      4e-06    2.3e-03  2.0e-03
    linear_cross_entropy               3.2      415      1.8e-03  3.6e-03  3.8e-03
    same, its own choice of chunks     7.6      326      3.1e-02  3.6e-03  4.2e-03
    checkpoint around each chunk       1.8      312      4e-06    3.4e-03  3.8e-03
    whole logits                       1.3      843      4e-06    3.4e-03  3.4e-03

    float32
    this file                          2.7      191      8e-08    3.4e-07  2.5e-07
    linear_cross_entropy               2.6      136      4e-09    3.3e-07  0.8e-07
    checkpoint around each chunk       3.9      262      4e-09    3.5e-07  2.5e-07
    whole logits                       2.7      758      4e-09    3.5e-07  2.6e-07

So there is one implementation for every torch. A price: dW exists in float32 from forward to the start of backward,
4 bytes for each element of the head (0.5 GB for the 7B). loss_by_words.py has the other order, which a GPU takes where
the vocabulary is larger than twice the rows.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig, PreTrainedModel

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.model.family import family_of
from peft_pretraining.model.loss_by_words import HeadLossByWords
from qgalore.per_layer import uses_up_gradient
from qgalore.storage.chunks import on_cpu, row_chunks
from qgalore.storage.quantized_weight import values_of

PRODUCT_ELEMENTS = 1 << 22  # of dW, made at once before they are added
Gradients = tuple[Tensor, Tensor | None]  # dH, and dW where the head is trained
SHARDED = "_sharded_token_loss"  # the attribute of a model that FSDP2 has spread: the module whose forward is its loss
CHUNK_ELEMENTS = 1 << 24  # logits held at once: 64 MB in float32, 512 rows of a vocabulary of 32000


def token_loss_sum(
    model: PreTrainedModel, input_ids: Tensor, targets: Tensor, positions: Tensor | None = None
) -> Tensor:
    """The SUM of the next-token cross-entropies, in nats, over the targets that are not IGNORED.

    input_ids: (B, L) int64.
    targets: (B, L) int64, already shifted: targets[b, t] follows input_ids[b, t].
    positions: (B, L) int64, the place of each token in its document, of which a sequence holds several: none of them
        sees another. None for sequences that are one text.
    Returns a float32 scalar. Divide it by the number of targets of the whole update before backward.
    """
    root = vars(model).get(SHARDED)
    if root is not None:
        return root(input_ids, targets, positions)
    return loss_of_whole(model, input_ids, targets, positions)


def loss_of_whole(
    model: PreTrainedModel, input_ids: Tensor, targets: Tensor, positions: Tensor | None = None
) -> Tensor:
    """token_loss_sum of a model whose weights are at hand."""
    # No attention mask where a sequence is one text: without one SDPA takes its causal kernel.
    packed = {} if positions is None else {"position_ids": positions, "attention_mask": masks(positions, model.config)}
    family = family_of(model.config)
    body = family.part("body", model)
    hidden = body(input_ids=input_ids, use_cache=False, **packed).last_hidden_state  # (B, L, hidden)
    return head_loss_sum(hidden.flatten(0, 1), family.part("head", model).weight, targets.flatten())


def masks(positions: Tensor, config: PreTrainedConfig) -> Tensor | dict[str, Tensor]:
    """block_mask as transformers' models take it. They pass a mask on as it is, so a sliding window must be in it.

    positions: (B, L) int64, see block_mask.
    Returns (B, 1, L, L) bool; by the kind of layer, where the configuration names kinds.
    """
    mask, window = block_mask(positions), getattr(config, "sliding_window", None)
    if window is None:
        return mask
    place = torch.arange(positions.shape[1], device=positions.device)
    near = mask & (place[:, None] - place < window)
    kinds = getattr(config, "layer_types", None)
    return near if kinds is None else {"full_attention": mask, "sliding_attention": near}


def block_mask(positions: Tensor) -> Tensor:
    """Which token sees which: earlier ones of its own document, and itself. A document begins where the place is 0.

    positions: (B, L) int64.
    Returns (B, 1, L, L) bool, rows for the tokens that look. transformers passes a mask of this shape on as it is.
    """
    document = (positions == 0).cumsum(1)  # (B, L), counted from 1
    return (document[:, None, :, None] == document[:, None, None, :]).tril_()


def language_loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
    """token_loss_sum of a batch."""
    return token_loss_sum(model, batch.input_ids, batch.targets, batch.positions)


def accumulate_gradients(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    targets: int,
    device: torch.device,
    loss_sum: Callable[[PreTrainedModel, Batch], Tensor] = language_loss_sum,
) -> Tensor:
    """Forward and backward of every micro-batch, whose gradients add up or are used by hooks. Returns the loss. ()

    targets: number of targets of the whole update, over all micro-batches and ranks: the loss is their mean.
    loss_sum: the sum of the losses over the targets of a batch that are not IGNORED, a scalar; by default the
        next-token loss.
    """
    loss = torch.zeros((), device=device)
    for batch in batches:
        share = loss_sum(model, batch) / targets
        share.backward()
        loss += share.detach()
    return loss


def head_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_rows: int | None = None,
    by_words: bool | None = None,
) -> Tensor:
    """The summed cross-entropy of softmax(hidden @ weight.T), chunk by chunk; differentiable once.

    hidden: (rows, hidden).
    weight: (vocab, hidden), in the dtype of `hidden`; one that is quantized has its values for this call.
    targets: (rows,) int64, or IGNORED.
    chunk_rows: rows whose logits exist at once, by default as many as CHUNK_ELEMENTS allows.
    by_words: whether chunks are of words instead, where gradients are wanted; None for what suits device and sizes.
    Returns a scalar in float32 (in float64 for float64).
    """
    chunk_rows = chunk_rows or rows_per_chunk(weight.shape[0])
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        if _suits_words(hidden, weight) if by_words is None else by_words:
            return HeadLossByWords.apply(hidden, weight, targets, CHUNK_ELEMENTS)
        weight = values_of(weight)
        return _HeadLoss.apply(hidden, weight, targets, chunk_rows)
    return _head_loss(hidden, values_of(weight), targets, chunk_rows, gradients=None)


def _suits_words(hidden: Tensor, weight: Tensor) -> bool:
    """Whether several chunks of words, on a GPU, take less memory and no more time than chunks of rows."""
    rows, vocab = len(hidden), len(weight)
    return not on_cpu(hidden.device) and weight.requires_grad and 2 * rows <= vocab and rows * vocab > CHUNK_ELEMENTS


def rows_per_chunk(vocab_size: int) -> int:
    """Rows whose logits are held at once: a multiple of 64, for the tensor cores."""
    return max(64, CHUNK_ELEMENTS // vocab_size // 64 * 64)


class _HeadLoss(torch.autograd.Function):
    """Makes the gradients in forward. They are the caller's only copy, so backward runs once.

    That of a frozen weight is not made: dW in float32 would be the largest tensor of fine-tuning with adapters.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if ctx.needs_input_grad[1] else None
        ctx.gradients = d_hidden, d_weight
        ctx.in_place = uses_up_gradient(weight)  # it may stay in the memory of its sum until then
        loss = _head_loss(hidden, weight, targets, chunk_rows, gradients=ctx.gradients)
        ctx.finite = loss.isfinite()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("head_loss_sum: backward a second time; its gradients were handed over the first time")
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        # Whoever sums gradients over the ranks must learn of a loss that is not finite.
        d_loss = torch.where(ctx.finite, d_loss, math.nan)
        if d_weight is not None:
            d_weight = (_narrow_in_place if ctx.in_place else _narrow)(d_weight, d_loss, d_hidden.dtype)
        return d_hidden.mul_(d_loss), d_weight, None, None


def _narrow(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor in another dtype."""
    return total.mul_(factor).to(dtype)


def _narrow_in_place(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in the first part of the memory of `total`, whose values are lost: of a large vocabulary, a copy in
    bfloat16 beside the float32 is a GB."""
    if dtype.itemsize >= total.dtype.itemsize:
        return _narrow(total, factor, dtype)
    narrow = total.view(-1).view(dtype)[: total.numel()].view(total.shape)
    for rows in row_chunks(*total.shape, device=total.device):  # rows that are written have been read
        narrow[rows] = total[rows] * factor
    return narrow


def _head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, *, gradients: Gradients | None
) -> Tensor:
    """The loss. Where `gradients` = (d_hidden, d_weight) are given, fills the first and adds to the second, if any."""
    loss = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
    # Allocated once: large CPU tensors are fresh pages each time, and touching those costs more than the products.
    product = hidden.new_empty(min(chunk_rows, len(hidden)), len(weight))  # (chunk, vocab)
    logits = product if product.dtype == loss.dtype else product.to(loss.dtype)  # (chunk, vocab)
    for start in range(0, len(hidden), chunk_rows):
        rows = slice(start, start + chunk_rows)
        of_chunk = None if gradients is None else (gradients[0][rows], gradients[1])
        size = len(targets[rows])
        loss += _chunk_loss(
            hidden[rows], weight, targets[rows], product=product[:size], logits=logits[:size], gradients=of_chunk
        )
    return loss


def _chunk_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    product: Tensor,
    logits: Tensor,
    gradients: Gradients | None,
) -> Tensor:
    """_head_loss of one chunk.

    product: (chunk, vocab) to work in, in the dtype of the products.
    logits: the same in the dtype of the sums; where the dtypes are equal, it may be the same tensor.
    """
    counted = (targets != IGNORED).unsqueeze(1)  # (chunk, 1)
    target = targets.clamp(min=0).unsqueeze(1)  # (chunk, 1)
    # In place, from the logits to their gradient.
    z = logits.copy_(torch.mm(hidden, weight.T, out=product))  # (chunk, vocab)
    z -= z.amax(dim=1, keepdim=True)
    chosen = z.gather(1, target)  # (chunk, 1)
    total = z.exp_().sum(dim=1, keepdim=True)  # (chunk, 1)
    if gradients is not None:
        d_hidden, d_weight = gradients
        z *= counted / total
        dz = product.copy_(z.scatter_add_(1, target, -counted.to(z.dtype)))  # (chunk, vocab)
        torch.mm(dz, weight, out=d_hidden)
        if d_weight is not None:
            for words in row_chunks(*d_weight.shape, device=dz.device, elements=PRODUCT_ELEMENTS):
                _add_(d_weight[words], dz[:, words].T @ hidden)
    return ((total.log() - chosen) * counted).sum()


def _add_(total: Tensor, part: Tensor) -> None:
    """total += part, a few rows at a time on a CPU, where torch would first convert the whole of a narrower part."""
    for rows in row_chunks(*total.shape, device=total.device) if on_cpu(total.device) else [slice(None)]:
        total[rows] += part[rows]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
