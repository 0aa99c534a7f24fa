"""The model: what a file may say, and what is built from it."""

import json

import pytest
import torch
from support.memory import LiveBytes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pretraining.errors import UserError
from peft_pretraining.model import dtypes
from peft_pretraining.model.build import build_model, meta_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.dtypes import native_bfloat16, resolve_dtype
from peft_pretraining.model.loss import token_loss_sum

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
# As in the files of the reference repositories.
REFERENCE = SIZES | {
    "architectures": ["LLaMAForCausalLM"],
    "model_type": "llama",
    "max_sequence_length": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": -1,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
}


def write(folder, fields, name="llama.json"):
    path = folder / name
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


def build(seed=0, dtype=torch.float32, activation_checkpointing=False, **changes):
    config = LlamaConfig(**(SIZES | changes))
    return build_model(config, device="cpu", dtype=dtype, seed=seed, activation_checkpointing=activation_checkpointing)


def random_tokens(rows=2, length=24):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


# Reading a file


def test_a_reference_file_is_understood(tmp_path):
    config = read_config(write(tmp_path, REFERENCE))
    assert config.max_position_embeddings == 128
    assert config.pad_token_id is None
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
    assert meta_model(config, dtype=torch.bfloat16).config.dtype == torch.bfloat16


def test_a_saved_config_is_read_back(tmp_path):
    model = build(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, num_key_value_heads=2)
    model.config.save_pretrained(tmp_path)
    config = read_config(tmp_path / "config.json")
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.num_key_value_heads == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_size": "32"}, 'hidden_size must be a whole number above 0, not "32"'),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number above 0, not 0"),
        ({"vocab_size": True}, "vocab_size must be a whole number above 0, not true"),
        ({"intermediate_size": 1.5}, "intermediate_size must be .* not 1.5"),
        ({"max_sequence_length": -1}, "max_sequence_length must be"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_attention_heads": 32}, "odd head size"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0"),
        ({"attention_dropout": 1.5}, "attention_dropout must be below 1, not 1.5"),
        ({"model_type": ["llama"]}, "model_type is .*llama.*, but only"),
    ],
)
def test_sizes_that_cannot_be_built(tmp_path, change, said):
    with pytest.raises(UserError, match=said) as caught:
        read_config(write(tmp_path, REFERENCE | change))
    assert "llama.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [{"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False}])
def test_what_a_model_must_return_is_not_read_from_its_file(tmp_path, asked):
    """One of them ended a run when its model was saved, one in its first update."""
    config = read_config(write(tmp_path, REFERENCE | asked))
    assert config.return_dict and not config.output_attentions and not config.output_hidden_states


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_size_is_named(tmp_path, name):
    fields = {key: value for key, value in REFERENCE.items() if key != name}
    with pytest.raises(UserError, match=f"{name} is missing"):
        read_config(write(tmp_path, fields))


def test_files_that_cannot_be_read(tmp_path):
    write(tmp_path, REFERENCE, "llama_60m.json")
    with pytest.raises(UserError, match=r"llama_60.json: cannot be read.*There are: llama_60m.json"):
        read_config(tmp_path / "llama_60.json")
    with pytest.raises(UserError, match="There is no JSON file in"):
        read_config(tmp_path / "nowhere" / "llama_60m.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="line 2, column 14: not valid JSON"):
        read_config(write(tmp_path, '{"hidden_size": 32,\n"vocab_size" 60}'))
    with pytest.raises(UserError, match="not a list"):
        read_config(write(tmp_path, "[1]"))


# Building


def test_equals_a_model_built_the_usual_way():
    """Names, shapes, and the rotary buffers, which no checkpoint holds: same weights in, same logits out."""
    ours, usual = build(), LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    usual.load_state_dict(ours.state_dict())
    buffers, expected = dict(ours.named_buffers()), dict(usual.named_buffers())
    assert buffers.keys() == expected.keys() and any("inv_freq" in name for name in buffers)
    for name, buffer in buffers.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, expected[name]), name
    tokens = random_tokens()
    assert torch.equal(ours(tokens).logits, usual(tokens, use_cache=False).logits)


def test_weights_have_the_right_distribution():
    model = build(hidden_size=128, intermediate_size=256, vocab_size=1000, initializer_range=0.05)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        else:
            assert weight.std().item() == pytest.approx(0.05, rel=0.05), name
            assert abs(weight.mean().item()) < 0.05 * 5 / weight.numel() ** 0.5, name


def test_biases_start_at_zero():
    model = build(attention_bias=True, mlp_bias=True)
    biases = [weight for name, weight in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 7 and not any(bias.any() for bias in biases)


def test_the_seed_decides_and_the_global_state_is_left_alone():
    state = torch.get_rng_state()
    first, again, other = build(seed=7), build(seed=7), build(seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)


def test_bfloat16_reaches_every_parameter_but_no_rotary_buffer():
    model = build(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


def test_tied_weights_stay_tied():
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_no_second_copy_is_made(dtype, tied):
    with LiveBytes() as bytes_:
        model = build(dtype=dtype, hidden_size=128, intermediate_size=256, vocab_size=2000, tie_word_embeddings=tied)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size <= bytes_.live and bytes_.peak <= 1.1 * size


def test_the_config_given_is_not_changed():
    config = LlamaConfig(**SIZES)
    before = config.to_dict()
    model = build_model(config, device="cpu", dtype=torch.bfloat16, seed=0)
    assert config.to_dict() == before and config.use_cache
    assert not model.config.use_cache


# Running


@pytest.mark.parametrize("changes", [{"pad_token_id": -1}, {"pad_token_id": 1}])
def test_every_row_of_the_vocabulary_learns(tmp_path, changes):
    """pad_token_id -1, in all reference files, froze the embedding of the last word; 1 would freeze the end of text."""
    model = build_model(read_config(write(tmp_path, REFERENCE | changes)), device="cpu", dtype=torch.float32, seed=0)
    before = model.model.embed_tokens.weight.detach().clone()
    token_loss_sum(model, torch.arange(64)[None], torch.arange(64).roll(-1)[None]).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert (model.model.embed_tokens.weight != before).any(dim=1).all()


def test_attention_is_sdpa_with_its_causal_kernel(monkeypatch):
    """No mask is built, so that the fused kernels can be taken; the CPU's refuses to run otherwise."""
    calls = []
    attention = nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        token_loss_sum(build(), random_tokens(), random_tokens())
    assert len(calls) == SIZES["num_hidden_layers"]
    assert all(call["attn_mask"] is None and call["is_causal"] for call in calls)


def test_later_tokens_do_not_change_earlier_states():
    model, tokens = build(initializer_range=0.2), random_tokens()
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 64
    before, after = (model.model(t).last_hidden_state for t in (tokens, changed))
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.isclose(before[:, 15:], after[:, 15:]).all(dim=-1).any()


def test_activation_checkpointing_changes_memory_not_gradients(recwarn):
    plain, saving = build(), build(activation_checkpointing=True)
    tokens, kept = random_tokens(), []
    for model in (plain, saving):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = token_loss_sum(model, tokens, tokens)
        loss.backward()
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 3
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert not [warning for warning in recwarn if "checkpoint" in str(warning.message)]


# The dtype


def test_the_default_dtype_is_the_fastest_native_one(monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(dtypes, "native_bfloat16", lambda device, native=native: native)
        assert resolve_dtype(None, "cpu") == dtype
        assert resolve_dtype("fp32", "cpu") == resolve_dtype("float32", "cpu") == torch.float32


def test_bfloat16_must_be_native(monkeypatch):
    monkeypatch.setattr(dtypes, "native_bfloat16", lambda device: True)
    assert resolve_dtype("bf16", "cpu") == resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    monkeypatch.setattr(dtypes, "native_bfloat16", lambda device: False)
    with pytest.raises(UserError, match="Use --dtype float32"):
        resolve_dtype("bf16", "cpu")
    with pytest.raises(UserError, match="unknown --dtype 'fp16'"):
        resolve_dtype("fp16", "cpu")


def test_native_bfloat16_asks_the_hardware(monkeypatch):
    for capability, native in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert native_bfloat16("cuda:0") == native
    for found, native in (({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert native_bfloat16("cpu") == native
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # as before torch 2.13
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert native_bfloat16("cpu")
