"""Loss and perplexity on validation text."""

import math
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.checkpoint.files import find_checkpoint
from peft_pretraining.checkpoint.weights import is_transformers_folder, load_weights
from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from peft_pretraining.model.family import family_of
from peft_pretraining.model.loss import token_loss_sum
from peft_pretraining.model.sharding import reshard
from peft_pretraining.progress import LongWait


class Evaluation(NamedTuple):
    """The result of one evaluation."""

    loss: float  # mean over the target tokens, in nats
    perplexity: float  # exp(loss); inf if that is too large for a float
    tokens: int  # number of target tokens


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    reduce_sum: Callable[[Tensor], Tensor] = lambda sums: sums,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The mean loss over all target tokens of all batches and ranks. It is not a mean of the batches' means.

    reduce_sum: sums a float64 tensor over the ranks. The default is for a process that is alone.
    stop: is asked before every batch, and says the same on every rank, because a model that is spread over them needs
        all. If it says yes, the evaluation ends and returns None.

    At the end, also after an error, the model is back in its old mode.
    Raises UserError if no rank has a target token.
    """
    device = family_of(model.config).part("head", model).weight.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens
    was_training = model.training
    model.eval()
    try:
        with LongWait("evaluating", total=len(batches) if isinstance(batches, Sized) else None) as progress:
            for batch in batches:
                if stop():
                    return None
                batch = batch.to(device)
                sums[0] += token_loss_sum(model, batch.input_ids, batch.targets, batch.positions)
                sums[1] += (batch.targets != IGNORED).sum()
                progress.advance()
    finally:
        model.train(was_training)
        reshard(model)
    loss_sum, tokens = reduce_sum(sums).tolist()
    if not tokens:
        raise UserError("the validation data holds no token to predict. Give --validation a file with more text.")
    loss = loss_sum / tokens
    return Evaluation(loss, perplexity(loss), int(tokens))


def evaluate_only(folder: str, *, model: PreTrainedModel, validation: Iterable[Batch], world: World) -> None:
    """Prints loss and perplexity of the weights in a checkpoint, a run's folder or a transformers folder."""
    place = Path(folder) if is_transformers_folder(folder) else find_checkpoint(Path(folder))
    with LongWait(f"reading {place.name}"):
        load_weights(model, place)
    result = evaluate(model, validation, reduce_sum=world.sum)
    assert result is not None
    if world.is_main:
        figures = f"loss {result.loss:.6f}, perplexity {result.perplexity:.4f} on {result.tokens:,} validation tokens"
        print(f"{place}: {figures}")


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token, or inf if that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
