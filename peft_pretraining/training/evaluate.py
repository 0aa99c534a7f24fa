"""Loss and perplexity on held-out text."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_pretraining.batch import IGNORED
from peft_pretraining.checkpoint.files import find_checkpoint
from peft_pretraining.checkpoint.weights import is_transformers_folder, load_weights
from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from peft_pretraining.model.family import family_of
from peft_pretraining.model.loss import token_loss_sum


class Tokens(Protocol):
    """What evaluate wants of a batch. input_ids, targets: (B, L) int64, on any device."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...


class Evaluation(NamedTuple):
    """The result of one evaluation.

    loss: mean over the target tokens, in nats.
    perplexity: exp(loss), inf where that is beyond a float.
    tokens: number of target tokens.
    """

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Tokens],
    *,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The mean loss over all target tokens of all batches and ranks: not a mean of batch means.

    reduce_sum: returns the sum over the ranks of a float64 tensor; None where this process is alone.
    stop: asked before every batch; where it says yes on any rank, there is no evaluation and None is returned.

    Ranks may hold different numbers of batches. The model is put back into the mode it was in, also after an error.
    Raises UserError where there is no target token on any rank.
    """
    device = family_of(model.config).part("head", model).weight.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, tokens, ranks that were stopped
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if stop():
                sums[2] += 1
                break
            input_ids, targets = batch.input_ids.to(device), batch.targets.to(device)
            sums[0] += token_loss_sum(model, input_ids, targets)
            sums[1] += (targets != IGNORED).sum()
    finally:
        model.train(was_training)
    loss_sum, tokens, stopped = (sums if reduce_sum is None else reduce_sum(sums)).tolist()
    if stopped:
        return None
    if not tokens:
        raise UserError("the validation data holds no token to predict. Give --validation a file with more text.")
    loss = loss_sum / tokens
    return Evaluation(loss, perplexity(loss), int(tokens))


def evaluate_only(folder: str, *, model: PreTrainedModel, validation: Iterable[Tokens], world: World) -> None:
    """Prints loss and perplexity of the weights in a checkpoint, a run's folder or a transformers folder."""
    place = Path(folder) if is_transformers_folder(folder) else find_checkpoint(Path(folder))
    load_weights(model, place)
    evaluation = evaluate(model, validation, reduce_sum=world.sum)
    assert evaluation is not None
    if world.is_main:
        print(
            f"{place}: loss {evaluation.loss:.6f}, perplexity {evaluation.perplexity:.4f} "
            f"on {evaluation.tokens:,} validation tokens"
        )


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token, or inf where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
