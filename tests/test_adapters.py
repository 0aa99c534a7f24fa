"""LoRA, ReLoRA and W = B A: their formulas by hand, what is trained and what is not, resets, export, bad input."""

import sys

import pytest
import torch
from support.adapted_models import CONFIG, LORA, LOW_RANK, UP_PROJ, build
from support.checkpointed_models import write_checkpoint
from support.command_line import flags_refusal, parse
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_pretraining.checkpoint.files import Checkpoint
from peft_pretraining.checkpoint.snapshot import restore_model
from peft_pretraining.errors import UserError
from peft_pretraining.export.__main__ import export
from peft_pretraining.model.adapters import KINDS, Adapters, base_parameters, is_factor, reset
from peft_pretraining.model.build import build_model, meta_model
from peft_pretraining.model.loss import token_loss_sum
from qgalore.factory import OPTIMIZERS, Settings, create_optimizer, create_updates
from qgalore.memory import kept_bytes
from qgalore.param_groups import frozen_parameters, split_parameters
from qgalore.sync import GradSync

IDS = torch.randint(0, 64, (6, 4, 17), generator=torch.Generator().manual_seed(1))


def updates_of(model: LlamaForCausalLM, optimizer: str, **settings: float):
    groups = split_parameters(model)
    built = create_optimizer(optimizer, groups=groups, settings=Settings(**{"lr": 0.01} | settings))
    return create_updates(optimizer, optimizer=built, sync=GradSync())


def train(model: LlamaForCausalLM, updates, *, start: int = 0, count: int = 3) -> None:
    for ids in IDS[start : start + count]:
        (token_loss_sum(model, ids[:, :-1], ids[:, 1:]) / 64).backward()
        updates.finish()


def copies(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def logits(model: LlamaForCausalLM) -> torch.Tensor:
    return model(IDS[0]).logits.float()


@pytest.mark.parametrize("adapters", [LORA, LOW_RANK], ids=lambda adapters: adapters.kind)
def test_a_model_with_adapters_learns_as_its_formula_does(adapters):
    """Beside it the plain model in float64, given W0 + (alpha / r) B A or B A, and torch's AdamW."""
    model = build(adapters, dtype=torch.float64)
    first = copies(model)
    optimizer = updates_of(model, "adamw", weight_decay=0.1).optimizer
    for ids in IDS:
        optimizer.zero_grad()
        (token_loss_sum(model, ids[:, :-1], ids[:, 1:]) / 64).backward()
        optimizer.step()

    plain = build(None, dtype=torch.float64)
    trained = {name: first[name].clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    matrices = [name for group in split_parameters(plain) if group.kind == "matrix" for name in group.names]
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.1)
    for ids in IDS:
        weights = {name: trained[name] for name in trained.keys() & dict(plain.named_parameters()).keys()}
        for name in matrices:
            module = name.removesuffix(".weight")
            A, B = (trained[adapters.part(module, letter)] for letter in "AB")
            W0 = plain.get_parameter(name).detach() if adapters is LORA else 0.0
            weights[name] = W0 + (8 / 4 if adapters is LORA else 1) * B @ A
        z = functional_call(plain, weights, (ids[:, :-1],)).logits
        loss = cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, p in trained.items():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-6, atol=1e-9)
        assert (p - first[name]).abs().max() > 0.01, name


def test_nothing_moves_but_factors_embedding_norms_and_head():
    plain, model = build(None), build(LORA)
    base = base_parameters(model)
    assert base.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(p, base[name]) for name, p in plain.named_parameters()), "as drawn without adapters"
    before = copies(model)
    train(model, updates_of(model, "adamw", weight_decay=0.1))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    (frozen,) = frozen_parameters(model)
    assert still == set(frozen.names) and len(still) == 14
    assert all(name.endswith("proj.base_layer.weight") for name in still)
    assert all(p.grad is None for p in frozen.parameters)


@pytest.mark.parametrize("optimizer", [name for name, recipe in OPTIMIZERS.items() if not recipe.projected])
def test_every_optimizer_that_does_not_project_moves_all_that_is_trained(optimizer):
    for adapters in (LORA, LOW_RANK):
        model = build(adapters)
        before = copies(model)
        train(model, updates_of(model, optimizer, lr=0.3 if optimizer == "sgd" else 0.01))
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) != p.requires_grad, name


def test_the_rate_of_the_matrices_is_that_of_the_factors():
    model = build(LORA)
    updates = updates_of(model, "adamw", matrix_lr_ratio=0.25)
    rates = {group["name"]: group["lr"] for group in updates.optimizer.param_groups}
    (matrices, *_) = split_parameters(model)
    assert all(is_factor(name) for name in matrices.names) and len(matrices.names) == 28
    assert rates == {"attention and MLP": 0.0025, "embedding": 0.01, "head": 0.01, "norms and others": 0.01}


@pytest.mark.parametrize("kind", KINDS)
def test_the_rank_is_clamped_to_the_shorter_side(kind):
    structure = meta_model(CONFIG, adapters=Adapters(kind, rank=40, alpha=8), dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in structure.named_parameters() if is_factor(name)}
    assert {p.dtype for p in structure.parameters()} == {torch.bfloat16}
    module = "model.layers.0.self_attn.k_proj"  # (16, 32)
    part = Adapters(kind, rank=40, alpha=8).part
    assert shapes[part(module, "A")] == (16, 32) and shapes[part(module, "B")] == (16, 16)
    assert shapes[part(UP_PROJ, "A")] == (32, 32) and shapes[part(UP_PROJ, "B")] == (48, 32)
    if kind != "low_rank":
        assert structure.get_submodule(module).scaling == {"default": 8 / 16}, "alpha over the clamped rank"


@pytest.mark.parametrize("rank", [4, 32])
def test_products_of_factors_have_the_variance_of_initial_weights(rank):
    adapters = Adapters("low_rank", rank=rank, alpha=1)
    parts = dict(build(adapters, hidden_size=256, intermediate_size=512).named_parameters())
    A, B = (parts[adapters.part(UP_PROJ, letter)] for letter in "AB")
    assert (B @ A).std().item() == pytest.approx(CONFIG.initializer_range, rel=0.1)
    assert A.std().item() == pytest.approx(B.std().item(), rel=0.1)


def test_factors_are_drawn_from_the_seed_and_no_generator():
    before = torch.get_rng_state()
    model, twin = build(LORA), build(LORA)
    other = build_model(CONFIG, device="cpu", dtype=torch.float32, seed=4, adapters=LORA)
    assert torch.equal(torch.get_rng_state(), before)
    A = LORA.part(UP_PROJ, "A")
    assert torch.equal(model.get_parameter(A), twin.get_parameter(A))
    assert not torch.equal(model.get_parameter(A), other.get_parameter(A))
    assert model.get_parameter(A).abs().max() <= 32**-0.5
    assert model.get_parameter(A).std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.1)
    assert all(not p.any() for name, p in model.named_parameters() if "lora_B" in name)
    assert torch.equal(logits(model), logits(build(None))), "at the start, the product adds nothing"


@pytest.mark.parametrize(
    "optimizer, dtype",
    [
        ("adamw", torch.float32),
        ("adamw", torch.bfloat16),
        ("adamw8bit_per_layer", torch.bfloat16),
        ("adafactor", torch.float32),
    ],
)
def test_a_reset_changes_neither_the_function_nor_what_else_is_trained(optimizer, dtype):
    model = build(LORA, dtype=dtype)
    updates = updates_of(model, optimizer)
    train(model, updates)
    before, expected = copies(model), logits(model)
    reset(model, updates.optimizer, LORA, seed=0, update=3)
    after = copies(model)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (logits(model) - expected).abs().max() <= tolerance * expected.abs().max()
    for name, tensor in after.items():
        if "lora_B" in name:
            assert not tensor.any() and before[name].any()
        else:
            assert torch.equal(tensor, before[name]) != (is_factor(name) or "base_layer" in name), name
    train(model, updates, start=3, count=1)
    states = updates.optimizer.state
    steps = {(is_factor(name), int(states[p]["step"])) for name, p in model.named_parameters() if p.requires_grad}
    assert steps == {(True, 1), (False, 4)}


def test_merging_into_bfloat16_is_right_on_average():
    """W0's step is 2**-7; the product, half of one of a hundred steps, would be lost by rounding to nearest."""
    model = build(LORA, dtype=torch.bfloat16)
    parts = dict(model.named_parameters())
    W0, A, B = (parts[f"{UP_PROJ}.{part}.weight"] for part in ("base_layer", "lora_A.default", "lora_B.default"))
    merged = torch.zeros_like(W0, dtype=torch.float32)
    for update in range(200):
        with torch.no_grad():
            W0.fill_(1.0)
            A.fill_(2.0**-6)
            B.fill_(2.0**-8)  # 8/4 * 4 * 2**-14 = 2**-11, a sixteenth of a step
        reset(model, torch.optim.SGD([A, B], lr=0.1), LORA, seed=0, update=update)
        merged += W0.float() / 200
    assert merged.mean().item() - 1 == pytest.approx(2.0**-11, rel=0.02)


@pytest.mark.parametrize("adapters", [LORA, LOW_RANK], ids=lambda adapters: adapters.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exported_model_computes_what_the_adapters_do(tmp_path, adapters, dtype):
    """With biases and a tied head, too. In bfloat16, merged weights are rounded once more."""
    live = build(adapters, dtype=dtype, attention_bias=True, tie_word_embeddings=True)
    train(live, updates_of(live, "adamw8bit"), count=6)
    args = dict(peft=adapters.kind, rank=4, peft_alpha=8, reset_every=None)
    folder = write_checkpoint(live, tmp_path / "checkpoint-6", **args)
    difference = export(folder, tmp_path / "out", verify=True)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    largest = logits(live.eval()).abs().max().item()
    assert written.dtype == dtype
    found = (logits(written) - logits(live)).abs().max().item()
    assert max(found, difference) <= (1e-5 if dtype == torch.float32 else 0.05) * largest
    assert (logits(written) - logits(build(None, dtype=dtype))).abs().max() > 0.1 * largest, "it was trained"


def test_an_export_that_forgets_the_adapters_is_found_out(tmp_path, monkeypatch):
    from peft_pretraining.export.__main__ import NotTheSameModel

    live = build(LORA)
    train(live, updates_of(live, "adamw"), count=6)
    args = dict(peft="lora", rank=4, peft_alpha=8, reset_every=None)
    folder = write_checkpoint(live, tmp_path / "checkpoint-6", **args)
    monkeypatch.setattr(Adapters, "product", lambda self, A, B: torch.zeros(len(B), A.shape[1]))
    with pytest.raises(NotTheSameModel, match="with merged adapters"):
        export(folder, tmp_path / "out", verify=True)


def test_a_checkpoint_of_another_rank_or_kind_is_refused(tmp_path):
    folder = write_checkpoint(build(LORA), tmp_path / "checkpoint-3")
    for adapters in (None, LOW_RANK, Adapters("lora", rank=8, alpha=8)):
        with pytest.raises(UserError, match="does not fit"):
            restore_model(build(adapters), Checkpoint.open(folder))


def test_what_adapters_keep_is_counted():
    for adapters in (LORA, LOW_RANK):
        model = build(adapters)
        updates = updates_of(model, "adamw")
        train(model, updates, count=1)
        kept = kept_bytes(model, updates.optimizer)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert kept["weights"] == sum(p.nbytes for p in model.parameters())
        assert kept["moments"] == 2 * sum(p.nbytes for p in trained) + 4 * len(trained)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [LORA, LOW_RANK], ids=lambda adapters: adapters.kind)
def test_compiled_layers_compute_what_eager_ones_do(adapters):
    from peft_pretraining.model.build import compile_layers

    eager, compiled = build(adapters), build(adapters)
    compile_layers(compiled)
    for model in (eager, compiled):
        train(model, updates_of(model, "adamw8bit"))
    for name, p in eager.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name), p, rtol=1e-3, atol=1e-4)


def test_relora_completes_the_schedule():
    relora = ("--peft", "relora", "--reset_every", 200)
    args = parse(*relora)
    assert (args.scheduler, args.cycle_length, args.restart_warmup_steps) == ("cosine_restarts", 200, 20)
    assert parse(*relora, "--restart_warmup_steps", 7).restart_warmup_steps == 7
    assert parse("--peft", "relora", "--reset_every", 5000).restart_warmup_steps == 100
    assert (parse().scheduler, parse().restart_warmup_steps) == ("cosine", 0)
    assert parse("--peft", "lora").scheduler == "cosine"
    assert "contradicts --peft relora" in flags_refusal(*relora, "--scheduler", "linear")
    assert "where it is 200" in flags_refusal(*relora, "--cycle_length", 100)


def test_what_cannot_be_had_with_adapters_is_refused():
    assert "which projects gradients" in flags_refusal("--peft", "lora", "--optimizer", "galore_adamw")
    for kind, more in (("low_rank", ()), ("relora", ("--reset_every", 9))):
        refused = flags_refusal("--peft", kind, "--optimizer", "adamw8bit", "--weight_quant", *more)
        assert "only the weights below lora stay as they are" in refused
    for flag in ("--embedding_weight_bits 8", "--int8_matmul all"):
        refused = flags_refusal("--peft", "lora", "--optimizer", "adamw8bit", "--weight_quant", *flag.split())
        assert f"{flag} with --peft lora: only the matrices are quantized" in refused
    assert "--peft relora needs --reset_every" in flags_refusal("--peft", "relora")
    assert "only --peft relora resets" in flags_refusal("--peft", "lora", "--reset_every", 10)
    assert flags_refusal("--peft", "relora", "--reset_every", 1).startswith("--reset_every 1: must be at least 2")
    assert flags_refusal("--peft", "lora", "--peft_alpha", 0).startswith("--peft_alpha 0")
    assert "low_rank" in flags_refusal("--peft", "dora")


def test_factors_alone_cannot_begin_with_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    message = flags_refusal("--peft", "low_rank", "--continue_from", tmp_path)
    assert "--peft low_rank cannot begin with the weights of" in message and "lora or relora" in message


def test_flags_of_adapters_without_effect_are_known():
    without = dict.fromkeys(("--peft_alpha", "--reset_every"), "without --peft")
    assert parse("--peft_alpha", 16, "--reset_every", 10).ignored == without
    factors = parse("--peft", "low_rank", "--peft_alpha", 16, "--rank", 8).ignored
    assert factors == {"--peft_alpha": "with --peft low_rank"}
    assert parse("--peft", "lora", "--peft_alpha", 16, "--rank", 8).ignored == {}


def test_without_the_package_peft_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="need the package peft .*: pip install peft"):
        meta_model(CONFIG, adapters=LORA)
    assert meta_model(CONFIG, adapters=LOW_RANK).num_parameters() > 0, "which low_rank can do without"
