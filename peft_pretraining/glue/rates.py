"""Learning rates as transformers' schedules have them, as pure functions of the update.

They differ from peft_pretraining/schedules.py by one update: the first of a warm-up has rate 0, and the decay reaches 0
only after the last. GaLore's fine-tuning script uses these.
"""

import argparse
import math
from collections.abc import Callable

POLYNOMIAL_END = 1e-7  # the rate at the end of `polynomial`, whose power is 1; transformers' default


def _linear(done: float, lr: float) -> float:
    return 1 - done


def _cosine(done: float, lr: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _polynomial(done: float, lr: float) -> float:
    return (1 - POLYNOMIAL_END / lr) * (1 - done) + POLYNOMIAL_END / lr


def _constant(done: float, lr: float) -> float:
    return 1.0


# By name: the ratio to the peak rate, from the share of the decay that is done and the peak rate; one cycle of restarts
# is transformers' default, which is a cosine. `constant` has no warm-up.
DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant,
}


def lr_ratio(args: argparse.Namespace, update: int) -> float:
    """The learning rate of a 1-based update over the peak rate, as transformers.get_scheduler has it."""
    before, warmup = update - 1, 0 if args.lr_scheduler_type == "constant" else args.warmup_steps
    if before < warmup:
        return before / warmup
    done = (before - warmup) / max(1, args.num_training_steps - warmup)
    return DECAYS[args.lr_scheduler_type](done, args.lr)
