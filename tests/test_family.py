"""A second architecture, through its row of family.py alone: trained, resumed, exported, evaluated."""

import json

import pytest
import torch
from support.command_line import refusal
from support.runs import losses
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

import torchrun_main
from peft_pretraining.export.__main__ import export
from peft_pretraining.model.build import meta_model
from peft_pretraining.model.config import read_config
from qgalore.param_groups import split_parameters


@pytest.fixture
def qwen(tiny, tmp_path):
    """A Qwen3 of the tiny LLaMA's size; its heads are wider than hidden_size / num_attention_heads."""
    shape = json.loads(tiny.config.read_text()) | {"model_type": "qwen3", "head_dim": 24, "architectures": None}
    path = tmp_path / "qwen3_tiny.json"
    path.write_text(json.dumps(shape | {"num_key_value_heads": 1}))
    return path


def test_its_parameters_are_of_the_kinds_of_a_llama(qwen):
    """The norms of queries and keys, which a LLaMA does not have, are norms."""
    groups = {group.kind: group.names for group in split_parameters(meta_model(read_config(qwen)))}
    assert len(groups["matrix"]) == 14 and groups["embedding"] and groups["head"]
    assert "model.layers.0.self_attn.q_norm.weight" in groups["norm"]


def test_it_is_trained_resumed_and_exported(qwen, tiny, tmp_path):
    flags = dict(model_config=qwen, optimizer="q_galore_adamw8bit_per_layer", rank=8, update_proj_gap=2)
    flags |= dict(weight_quant=True, stochastic_round=True, weight_group_size=16, proj_quant=True, save_every=3)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "whole", **flags)) == 0
    found = losses(tmp_path / "whole")
    assert found[-1] < found[0]
    middle = tmp_path / "whole" / "checkpoint-00000003"
    assert torchrun_main.command_line(tiny.flags(tmp_path / "half", continue_from=middle, **flags)) == 0
    assert losses(tmp_path / "half") == found[3:]
    assert export(tmp_path / "whole", tmp_path / "out", verify=True) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, Qwen3ForCausalLM) and model(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_what_has_no_row_is_refused(tiny, tmp_path, capsys):
    path = tmp_path / "mistral.json"
    path.write_text(json.dumps(json.loads(tiny.config.read_text()) | {"model_type": "mistral"}))
    message = refusal(tiny.flags(tmp_path / "run", model_config=path), capsys)
    assert "mistral" in message and "llama" in message and "qwen3" in message
