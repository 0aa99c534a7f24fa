"""Learning rates of classification: transformers' own schedules, as GaLore's script has them."""

import argparse

import pytest
import torch
from transformers import get_scheduler

from peft_pretraining.glue.rates import DECAYS, lr_ratio


@pytest.mark.parametrize("scheduler", DECAYS)
@pytest.mark.parametrize("warmup", [0, 3])
def test_they_are_transformers_own(scheduler, warmup):
    """Over a whole run, to the last bit or two."""
    updates, lr = 17, 3e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = get_scheduler(scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=updates)
    args = argparse.Namespace(lr_scheduler_type=scheduler, warmup_steps=warmup, num_training_steps=updates, lr=lr)
    for update in range(1, updates + 1):
        assert lr * lr_ratio(args, update) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
