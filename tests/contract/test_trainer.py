"""transformers' Trainer with our optimizers: accumulate, save, go on, evaluate."""

import pytest
import torch
from support.contract import same, weights
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from qgalore import Settings, create_optimizer, quantize_linear_layers, split_parameters

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, use_cache=False
)
DATA = [{"input_ids": row, "labels": row} for row in (torch.arange(16) + torch.arange(64)[:, None]) % 64]


class Stop(TrainerCallback):
    """Ends the run after so many updates, as a time limit would."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **rest):
        control.should_training_stop |= state.global_step == self.after


def trainer(folder, *, name, bits, stop=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    if bits:
        quantize_linear_layers(model, select=lambda layer: layer != "lm_head", bits=bits, group_size=32)
    settings = Settings(lr=0.01, rank=8, update_proj_gap=3)
    optimizer = create_optimizer(name, groups=split_parameters(model), settings=settings)
    args = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=4, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_steps=1, lr_scheduler_type="cosine", max_grad_norm=1.0, seed=1,
        warmup_steps=2,
    )  # fmt: skip
    callbacks = [Stop(stop)] if stop else []
    return Trainer(
        model, args, train_dataset=DATA, eval_dataset=DATA, optimizers=(optimizer, None), callbacks=callbacks
    )


@pytest.mark.parametrize("name, bits", [("q_galore_adamw8bit", 8), ("galore_adamw", None), ("muon", 4)])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(name, bits, tmp_path):
    whole = trainer(tmp_path / "whole", name=name, bits=bits)
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    trainer(tmp_path / "cut", name=name, bits=bits, stop=4).train()
    second = trainer(tmp_path / "cut", name=name, bits=bits)
    second.train(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(second.model))
    assert second.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
