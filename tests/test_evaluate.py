"""Evaluation on models whose perplexity is known by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.errors import UserError
from peft_pretraining.model.build import build_model
from peft_pretraining.training.evaluate import evaluate, perplexity

BIGRAMS = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.9, 0.05, 0.05]])


class Bigrams(nn.Module):
    """Predicts from the last token alone: hidden state = one-hot, head = the table's logarithms."""

    config = LlamaConfig()

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(3, 3, bias=False)
        self.lm_head.weight.data = BIGRAMS.log().T.contiguous()

    def model(self, input_ids, use_cache):
        assert not self.training and not torch.is_grad_enabled() and not use_cache
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, 3).float())


def batch(inputs, targets):
    return Batch(torch.tensor(inputs), torch.tensor(targets), epoch=0)


# Seven targets with probability 1/2, then one with 1/20 and one ignored: a mean of batch means would be 1.84.
UNEQUAL = [batch([[0] * 7], [[0] * 7]), batch([[2, 2]], [[1, IGNORED]])]
UNEQUAL_LOSS = (7 * math.log(2) + math.log(20)) / 8


def test_every_token_counts_the_same():
    result = evaluate(Bigrams(), UNEQUAL)
    assert result.tokens == 8
    assert result.loss == pytest.approx(UNEQUAL_LOSS, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(UNEQUAL_LOSS), rel=1e-6)
    assert result.loss != pytest.approx((math.log(2) + math.log(20)) / 2, rel=0.1)


def test_ranks_with_unequal_shares_give_the_whole():
    """Two ranks, one batch each; the sum over ranks is played by a list."""
    shares = []
    for one in UNEQUAL:
        evaluate(Bigrams(), [one], reduce_sum=lambda sums: shares.append(sums.clone()) or sums)
    assert all(share.dtype == torch.float64 for share in shares)
    result = evaluate(Bigrams(), [], reduce_sum=lambda sums: sums + sum(shares))
    assert result == pytest.approx(evaluate(Bigrams(), UNEQUAL))


def test_a_head_of_zeros_has_the_perplexity_of_the_vocabulary():
    config = LlamaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = build_model(config, device="cpu", dtype=torch.float32, seed=0)
    nn.init.zeros_(model.lm_head.weight)
    tokens = torch.randint(0, 101, (3, 21))
    result = evaluate(model, [Batch(tokens[:, :-1], tokens[:, 1:], epoch=0)])
    assert result.tokens == 60
    assert result.perplexity == pytest.approx(101, rel=1e-5)
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_even_on_an_error(training):
    model = Bigrams().train(training)

    def failing():
        yield UNEQUAL[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        evaluate(model, failing())
    assert model.training == training


def test_nothing_to_predict_is_told():
    with pytest.raises(UserError, match="no token to predict"):
        evaluate(Bigrams(), [batch([[0]], [[IGNORED]])])


def test_perplexity_does_not_overflow():
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
