"""A second architecture, through its row of family.py alone: trained, resumed, exported, evaluated."""

import json

import pytest
import torch
from support.command_line import refusal
from support.runs import losses
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import torchrun_main
from peft_pretraining.export.__main__ import export
from peft_pretraining.model.build import build_model, meta_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.loss import token_loss_sum
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


@pytest.mark.parametrize("full_layers", [0, 1, 2])
def test_packed_sequences_keep_the_window(full_layers):
    """One document with its positions has the loss that it has without; two have the sum of theirs."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    window = dict(use_sliding_window=True, sliding_window=4, max_window_layers=full_layers)
    config = Qwen3Config(**sizes, **window, num_key_value_heads=2, head_dim=16)
    model = build_model(config, device="cpu", dtype=torch.float32, seed=0)
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    first, second = ids[:, :10], ids[:, 10:]
    whole = token_loss_sum(model, ids, ids)
    torch.testing.assert_close(token_loss_sum(model, ids, ids, torch.arange(24).unsqueeze(0)), whole)
    places = torch.cat((torch.arange(10), torch.arange(14))).unsqueeze(0)
    parts = token_loss_sum(model, first, first) + token_loss_sum(model, second, second)
    torch.testing.assert_close(token_loss_sum(model, ids, ids, places), parts)
    assert not torch.isclose(whole, parts)
