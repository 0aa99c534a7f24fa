"""Configs as they come from the hub: what transformers accepts trains, exports and loads; the rest is one line."""

import json

import pytest
import torch
from support.checkpoints import logged
from support.runs import run
from transformers import AutoConfig, AutoModelForCausalLM

from peft_pretraining.errors import UserError
from peft_pretraining.export.__main__ import command_line as export
from peft_pretraining.model.build import build_model
from peft_pretraining.model.config import read_config

PLAIN = {
    "model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
BNB = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}, "auto_map": {"AutoModelForCausalLM": "x.Llama"}}


def write(path, fields, *, encoding="utf-8"):
    path.write_text(json.dumps(fields), encoding=encoding)
    return path


@pytest.mark.parametrize("change", [
    {}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": LLAMA3},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    {"num_key_value_heads": 2, "tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True},
    {"hidden_act": "gelu"}, {"head_dim": 16}, {"pad_token_id": 60}, {"pad_token_id": -1}, {"eos_token_id": [1, 2]},
    {"bos_token_id": None, "eos_token_id": None}, {"torch_dtype": "float16", "dtype": "bfloat16"},
    {"pretraining_tp": 2, "_name_or_path": "x", "transformers_version": "4.0"}, {"use_cache": True},
    {"_attn_implementation": "flash_attention_2"}, BNB, GPTQ,
    {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2}, {"architectures": ["SomethingElse"]},
], ids=lambda change: ",".join(change) or "plain")  # fmt: skip
def test_what_transformers_accepts_is_built(tmp_path, change):
    config = read_config(write(tmp_path / "config.json", PLAIN | change))
    model = build_model(config, device="cpu", dtype=torch.float32, seed=0)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    config.save_pretrained(tmp_path / "saved")
    saved = AutoConfig.from_pretrained(tmp_path / "saved")
    assert not hasattr(saved, "quantization_config") and not hasattr(saved, "auto_map")
    assert config.pad_token_id is None


def test_a_byte_order_mark_is_passed_over(tmp_path):
    assert read_config(write(tmp_path / "config.json", PLAIN, encoding="utf-8-sig")).vocab_size == 60


@pytest.mark.parametrize("foreign", [BNB, GPTQ])
def test_what_is_left_out_is_said(tmp_path, foreign):
    with logged("WARNING") as messages:
        read_config(write(tmp_path / "config.json", PLAIN | foreign))
    assert [name in messages[index] for index, name in enumerate(foreign)] == [True] * len(foreign)


@pytest.mark.parametrize("change, says", [
    ({"hidden_act": "swiglu"}, "hidden_act 'swiglu' is unknown. Did you mean 'silu'"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_type 'su' is unknown. .*llama3"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor|cannot build"),
    ({"rope_scaling": "linear"}, "rope"),
    ({"hidden_size": "32"}, 'hidden_size must be a whole number above 0, not "32"'),
    ({"hidden_size": 32.0}, "hidden_size must be a whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
    ({"vocab_size": 0}, "vocab_size"), ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
    ({"model_type": "qwen3"}, "4 is not a multiple of num_key_value_heads 32"),
    ({"num_attention_heads": 5}, "not a multiple of num_attention_heads 5"), ({"head_dim": 7}, "odd head size"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"), ({"initializer_range": -1}, "initializer_range"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"), ({"eos_token_id": "x"}, "eos"),
    ({"max_position_embeddings": None}, "max_position_embeddings"), ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
], ids=lambda value: ",".join(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_cannot_be_built_is_one_line(tmp_path, change, says):
    path = write(tmp_path / "config.json", PLAIN | change)
    with pytest.raises(UserError, match=says) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("text, says", [
    ('{"a":' * 100_000, "nested too deeply"), ("[" * 100_000, "nested too deeply"), ("[1]", "a JSON object is needed"),
    ("", "not valid JSON"), ('{"vocab_size": ' + "9" * 5000 + "}", "numbers too long|must be"),
], ids=["objects", "arrays", "no object", "empty", "a long number"])  # fmt: skip
def test_json_of_no_use_is_one_line(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        read_config(tmp_path / "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    BNB | {"num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 60},
    {"rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
], ids=["quantized, tied", "llama3 rope, biases"])  # fmt: skip
def test_it_trains_exports_and_loads(tiny, tmp_path, change):
    config = write(tmp_path / "config.json", PLAIN | change)
    run(tiny, tmp_path / "run", model_config=config, num_training_steps=2)
    assert export([str(tmp_path / "run"), str(tmp_path / "out"), "--verify"]) == 0
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("run/model", "out"))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(first(ids).logits, second(ids).logits)
