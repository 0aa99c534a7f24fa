"""transformers' Trainer by qgalore.hf: what is trained, with what, saved, resumed, exported and logged."""

import copy
import json
import warnings

import accelerate
import pytest
import torch
from support.contract import same, weights
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_optimizer import _setup_low_rank_optimizer

from qgalore.hf import LogRefreshes, QGaLore, export, linear_layers, quantize
from qgalore.optimizer import LowRankOptimizer
from qgalore.storage.quantized_weight import QuantizedWeight
from scripts import train_with_trainer

DATA = [{"input_ids": row, "labels": row} for row in (torch.arange(16) + torch.arange(36)[:, None]) % 64]
LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, use_cache=False
)
QWEN = Qwen3Config(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, vocab_size=64, tie_word_embeddings=True, use_cache=False,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16, resid_pdrop=0.1, use_cache=False)
MODELS = {"llama": (LlamaForCausalLM, LLAMA), "qwen": (Qwen3ForCausalLM, QWEN), "gpt2": (GPT2LMHeadModel, GPT2)}
every_model = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(autouse=True)
def quiet():
    """What is said of clipping per layer has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="per layer, max_grad_norm")
        yield


def model_of(kind, *, int8=False):
    torch.manual_seed(0)
    cls, config = MODELS[kind]
    model = cls(copy.deepcopy(config))
    if int8:
        quantize(model, group_size=32)
    return model


def trainer_of(model, folder, name, *, callbacks=(), options=None, **arguments):
    chosen = dict(
        max_steps=6, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        save_strategy="no", learning_rate=0.01, seed=1, warmup_steps=2, lr_scheduler_type="cosine",
    )  # fmt: skip
    args = TrainingArguments(folder, **(chosen | arguments))
    pair = QGaLore.for_trainer(args, name, **(dict(rank=8, update_proj_gap=3) | (options or {})))
    return Trainer(model, args, train_dataset=DATA, optimizer_cls_and_kwargs=pair, callbacks=list(callbacks))


def losses_of(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def inner(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


class Stop(TrainerCallback):
    """Ends the run after so many updates, as a time limit would."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **rest):
        control.should_training_stop |= state.global_step == self.after


@pytest.mark.parametrize("int8, name", [(False, "galore_adamw"), (True, "q_galore_adamw8bit_per_layer")])
@every_model
def test_every_model_trains_and_is_exported(kind, int8, name, tmp_path):
    model = model_of(kind, int8=int8)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer = trainer_of(model, tmp_path / "run", name)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0] - 0.1
    assert not [key for key, p in model.named_parameters() if torch.equal(p.detach(), before[key])]
    projected = {id(p) for group in inner(trainer).param_groups if group["rank"] for p in group["params"]}
    assert projected == {id(model.get_submodule(layer).weight) for layer in linear_layers(model)}
    quantized = {key for key, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
    assert quantized == ({f"{layer}.weight" for layer in linear_layers(model)} if int8 else set())
    export(model, tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = DATA[0]["input_ids"][None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert quantized == {key for key, p in model.named_parameters() if isinstance(p, QuantizedWeight)}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind, name", [
    ("gpt2", "q_galore_adamw8bit_per_layer"), ("llama", "galore_adamw_per_layer"), ("qwen", "q_galore_adamw8bit"),
])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(kind, name, accumulation, tmp_path):
    """To the last bit. With accumulation 4, an epoch of 9 micro-batches ends with an update of a single one.

    transformers' own layer-wise GaLore has no state in its checkpoints, and refuses accumulation.
    """
    int8, arguments = "q_" in name, dict(gradient_accumulation_steps=accumulation, save_steps=3, save_strategy="steps")
    whole = trainer_of(model_of(kind, int8=int8), tmp_path / "whole", name, **arguments)
    whole.train()
    trainer_of(model_of(kind, int8=int8), tmp_path / "cut", name, callbacks=[Stop(3)], **arguments).train()
    second = trainer_of(model_of(kind, int8=int8), tmp_path / "cut", name, **arguments)
    second.train(resume_from_checkpoint=True)
    assert losses_of(whole) == losses_of(second)
    assert same(weights(whole.model), weights(second.model))
    p = next(iter(inner(second).updates))
    assert inner(second).state[p]["step"] == 6, "the state of every parameter is in the checkpoint"


@every_model
def test_per_layer_is_the_whole_model(kind, tmp_path):
    """With one micro-batch to an update and no clipping, to the last bit; gradients are gone after backward."""
    models = [model_of(kind, int8=True) for _ in range(2)]
    for model, name in zip(models, ("q_galore_adamw8bit", "q_galore_adamw8bit_per_layer"), strict=True):
        trainer_of(model, tmp_path, name, max_grad_norm=0.0).train()
    assert same(weights(models[0]), weights(models[1]))


def test_accumulated_per_layer_is_nearly_the_whole_model(tmp_path):
    """Only the first bases differ. The Trainer divides the loss by the target tokens of all micro-batches."""
    runs = []
    for name in ("galore_adamw", "galore_adamw_per_layer"):
        trainer = trainer_of(model_of("llama"), tmp_path, name, max_grad_norm=0.0, gradient_accumulation_steps=4)
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0][0] == runs[1][0] and max(abs(a - b) for a, b in zip(*runs, strict=True)) < 0.1


def test_what_the_training_arguments_say_is_what_is_done(tmp_path):
    """transformers' own GaLore ignores betas, eps and weight decay."""
    arguments = dict(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5, weight_decay=0.3, learning_rate=0.02)
    trainer = trainer_of(model_of("gpt2"), tmp_path, "galore_adamw", optim_target_modules=["attn"], **arguments)
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decays = set(trainer.get_decay_parameter_names(trainer.model))
    for group in trainer.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.95), 1e-5)
        for p in group["params"]:
            name = names[id(p)]
            assert group["weight_decay"] == (0.3 if name in decays else 0.0), name
            assert bool(group["rank"]) == (".attn." in name and p.ndim == 2), name
    for name in ("adamw", "lion"):
        trainer = trainer_of(model_of("llama"), tmp_path, name, **arguments)
        group = trainer.create_optimizer().param_groups[0]
        assert group["betas"] == ((0.8, 0.95) if name == "adamw" else (0.9, 0.99))
        assert name == "lion" or group["eps"] == 1e-5


@pytest.mark.parametrize(
    "targets",
    [["attn", "mlp"], ["q_proj", "v_proj"], r".*\.(q|k)_proj", "all-linear", "all_linear", [r"model\.layers\.1\..*"],
     ["lm_head"], ["model.layers.0.mlp.up_proj"]],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_target_modules_are_those_of_transformers(kind, targets, tmp_path):
    """As its own GaLore finds them; only what is tied to an embedding can be had there in no way."""
    model = model_of(kind)
    args = TrainingArguments(tmp_path, optim_target_modules=targets, use_cpu=True)
    try:
        _, found = _setup_low_rank_optimizer(args, model, "galore", {"galore": None}, {}, {})
        theirs = {id(p) for p in found["params"][1]["params"]}
    except ValueError:
        theirs = set()
    try:
        ours = {id(model.get_submodule(name).weight) for name in linear_layers(model, targets)}
    except ValueError:
        ours = set()
    tied = {id(model.lm_head.weight)} if kind == "qwen" and targets == ["lm_head"] else set()
    assert ours == theirs | tied


def test_what_is_tied_to_an_embedding_is_left_alone():
    model = model_of("gpt2")
    expected = [f"transformer.h.{i}.{name}" for i in range(2) for name in (
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    )]  # fmt: skip
    assert linear_layers(model) == linear_layers(model, "all-linear") == linear_layers(model, ".*") == expected
    assert linear_layers(model, ["lm_head"]) == ["lm_head"]
    with pytest.raises(ValueError, match="lm_head is shared with another module"):
        quantize(model, ["lm_head"])
    assert "lm_head" not in linear_layers(model_of("llama")) and "lm_head" in linear_layers(model_of("llama"), ".*")


def test_an_int8_conv1d_computes_what_its_values_compute():
    """And autograd keeps nothing of the weight's size in floating point for it."""
    model = model_of("gpt2", int8=True)
    layer = model.transformer.h[0].mlp.c_fc
    plain, x = copy.deepcopy(layer), torch.randn(3, 32, requires_grad=True)
    plain.weight = torch.nn.Parameter(layer.weight.detach().dequantize())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    y.square().sum().backward()
    ours, x.grad = (x.grad, layer.weight.grad, layer.bias.grad), None
    plain(x).square().sum().backward()
    assert torch.equal(y, plain(x))
    assert all(torch.equal(a, b) for a, b in zip(ours, (x.grad, plain.weight.grad, plain.bias.grad), strict=True))
    assert not [t for t in saved if t.numel() >= layer.weight.numel() and not isinstance(t, QuantizedWeight)]


def test_clipping_per_layer_is_each_parameters_own_and_said(tmp_path):
    trainer = trainer_of(model_of("llama"), tmp_path, "galore_adamw_per_layer", max_grad_norm=0.5)
    with pytest.warns(UserWarning, match="max_grad_norm = 0.5 limits the gradient of each parameter"):
        trainer.create_optimizer()
    assert {group["clip"] for group in trainer.optimizer.param_groups} == {0.5}
    with pytest.warns(UserWarning, match="give QGaLore the max_grad_norm"):
        QGaLore()(model_of("llama"), optimizer="galore_adamw_per_layer")


def test_clipping_of_all_gradients_sees_int8_weights(tmp_path):
    losses = []
    for norm in (1e-12, 1.0):
        trainer = trainer_of(model_of("llama", int8=True), tmp_path, "galore_adamw", max_grad_norm=norm)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0][-1] > losses[1][-1] + 0.05, "gradients far below eps move nothing"


@pytest.mark.parametrize("name", ["q_galore_adamw8bit", "q_galore_adamw8bit_per_layer"])
def test_refreshes_are_logged(name, tmp_path, capsys):
    trainer = trainer_of(model_of("llama"), tmp_path, name, callbacks=[LogRefreshes()])
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    counts = [line["refreshes"] for line in lines]
    optimizer = inner(trainer)
    found = [each for p in optimizer.updates if (each := optimizer.refreshes(p))]
    assert counts[0] == len(found) == 14 and counts == sorted(counts)
    assert counts[-1] == sum(each["refreshes"] for each in found) > counts[0]
    assert lines[-1]["failed_refreshes"] == 0 and lines[-1]["mean_gap"] == 3.0
    assert all(line["grad_norm"] > 0 for line in lines), "per layer, too"
    assert f"'refreshes': {counts[-1]}" in capsys.readouterr().out


def test_another_trainer_of_the_same_model_takes_over(tmp_path):
    """The hooks of the first would update the model as well."""
    model = model_of("llama")
    optimizers = []
    for name in ("galore_adamw_per_layer", "galore_adamw_per_layer", "galore_adamw"):
        trainer = trainer_of(model, tmp_path, name, max_steps=3)
        trainer.train()
        optimizers.append(inner(trainer))
    for optimizer in optimizers:
        assert {state["step"] for state in optimizer.state.values()} == {3}


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_per_layer"])
def test_an_accelerate_loop_takes_the_same_object(name, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = model_of("qwen", int8=True)
    optimizer = QGaLore()(
        model, optimizer=name, lr=0.01, rank=8, gradient_accumulation_steps=2,
        **({"max_grad_norm": 1.0} if name.endswith("per_layer") else {}),
    )  # fmt: skip
    assert isinstance(optimizer, LowRankOptimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    batch, losses = torch.stack([row["input_ids"] for row in DATA[:8]]), []
    for part in list(batch.split(4)) * 8:
        with accelerator.accumulate(model):
            loss = model(input_ids=part, labels=part).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(state["step"] == 8 for state in optimizer.state.values()), "updates, not micro-batches"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rnk=4), "unknown option 'rnk' of QGaLore. Did you mean 'rank'"),
        (dict(optimizer="galore_adam"), "Did you mean galore_adamw"),
        (dict(optim_target_modules=["nowhere"]), "matches no linear layer"),
        (dict(optim_target_modules=3), "must be a list, a regex or 'all-linear'"),
        (dict(optimizer="galore_adamw", max_grad_norm=1.0), "for updates per layer"),
        (dict(rank=0), "rank = 0 is out of range"),
    ],
)
def test_what_cannot_be_is_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        QGaLore()(model_of("llama"), **options)


def test_the_example_trains_on_a_text_file_and_goes_on(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A quick brown fox jumps over the lazy dog. " * 100)
    command = ["--text", str(text), "--output", str(tmp_path / "run")]
    assert train_with_trainer.main([*command, "--steps", "6"]) == 0
    assert train_with_trainer.main([*command, "--steps", "9"]) == 0
    state = json.loads((tmp_path / "run" / "checkpoint-9" / "trainer_state.json").read_text())
    assert state["global_step"] == 9 and (tmp_path / "run" / "checkpoint-6").exists(), "the first run's"
    model = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()[None, :128]
    assert model(input_ids=ids, labels=ids).loss < 5.0, "a byte that is drawn costs 5.5"
    assert train_with_trainer.main(["--text", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"error: --text {tmp_path / 'none'} is no file of at least 2 KB\n")
