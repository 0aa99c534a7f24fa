"""Norms and MLPs that keep little for the backward pass, beside transformers' own and beside float64."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config

from peft_pretraining.model.build import build_model
from peft_pretraining.model.family import FAMILIES
from peft_pretraining.model.lean_layers import RMSNorm, SwiGLU, swiglu_linear
from peft_pretraining.model.loss import token_loss_sum

HIDDEN, INTERMEDIATE, LAYERS, TOKENS = 64, 160, 3, 2 * 24
SHAPE = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, vocab_size=96)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
}


def pair(kind: str, dtype: torch.dtype, **more: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model as it is built here, and transformers' own with the same weights."""
    config = copy.deepcopy(CONFIGS[kind])
    for name, value in more.items():
        setattr(config, name, value)
    ours = build_model(config, device="cpu", dtype=dtype, seed=0)
    theirs = FAMILIES[kind].model(config).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    theirs.model.rotary_emb = ours.model.rotary_emb  # in float32 whatever the dtype
    theirs.set_attn_implementation(ours.config._attn_implementation)
    return ours, theirs


def loss_and_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    loss = token_loss_sum(model, ids, ids)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_computes_what_transformers_computes(kind, dtype):
    """The loss to the last bit; gradients as close as roundings allow."""
    ours, theirs = pair(kind, dtype)
    (loss, found), (expected, wanted) = map(loss_and_gradients, (ours, theirs))
    assert torch.equal(loss, expected)
    close = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= close * gradient.norm(), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_keeps_less(kind):
    """By 8 x hidden + 4 x intermediate bytes for each token and layer in bfloat16, and more for the last norm."""
    kept = []
    for model in pair(kind, torch.bfloat16):
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = token_loss_sum(model, ids := torch.zeros(2, 24, dtype=torch.int64), ids)
        kept.append(sum(storages.values()))
        del loss
    ours, theirs = kept
    saved = TOKENS * (LAYERS * (8 * HIDDEN + 4 * INTERMEDIATE) + 4 * HIDDEN)
    assert saved <= theirs - ours <= 1.5 * saved


def test_layers_that_are_run_again_do_not_make_their_last_product_again():
    """Of transformers' own layers, torch leaves the down-projection out, as it keeps the input of the product first."""
    flops = []
    for model in pair("llama", torch.float32):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(model)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


def test_another_activation_is_left_to_transformers():
    ours, theirs = pair("llama", torch.float32, hidden_act="gelu")
    assert torch.equal(loss_and_gradients(ours)[0], loss_and_gradients(theirs)[0])
    assert type(ours.model.layers[0].mlp) is type(theirs.model.layers[0].mlp)


WEIGHT = torch.randn(33, 33, generator=torch.Generator().manual_seed(2), dtype=torch.float64).bfloat16().double()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * gate.sigmoid() * up


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("apply, oracle", [
    (lambda x, w: RMSNorm.apply(x, w[0, 0], 1e-6), lambda x, w: rms_norm(x, w[0, 0])),
    (SwiGLU.apply, swiglu),
    (lambda gate, up: swiglu_linear(gate, up, WEIGHT.to(gate)), lambda gate, up: swiglu(gate, up) @ WEIGHT.T),
], ids=["norm", "gate", "gate and product"])  # fmt: skip
@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str)
def test_gradients_are_those_of_float64(apply, oracle, dtype, close):
    """Norms of rows of very different sizes, too."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-3, 3, 7)[None, :, None]
    inputs = [torch.randn(5, 7, 33, generator=generator) * sizes, torch.randn(5, 7, 33, generator=generator)]
    inputs = [each.to(dtype).requires_grad_() for each in inputs]
    dy = torch.randn(5, 7, 33, generator=generator).to(dtype)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    found = torch.autograd.grad(apply(*inputs), inputs, dy)
    wanted = torch.autograd.grad(oracle(*wide), wide, dy.double())
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        assert (((ours - theirs).norm(dim=-1)) <= close * theirs.norm(dim=-1) + 1e-30).all()


@pytest.mark.parametrize("frozen", ["norm", "input"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, w = torch.randn(3, 8, requires_grad=frozen != "input"), torch.ones(8, requires_grad=frozen != "norm")
    RMSNorm.apply(x, w, 1e-6).sum().backward()
    assert (x.grad is None) == (frozen == "input") and (w.grad is None) == (frozen == "norm")


def test_it_can_be_copied():
    ours, _ = pair("llama", torch.float32)
    other = copy.deepcopy(ours)
    other.model.norm.weight.data.fill_(2.0)
    assert not torch.equal(loss_and_gradients(other)[0], loss_and_gradients(ours)[0])
    assert type(ours.model.norm).__name__ == "LlamaRMSNorm"


@pytest.mark.parametrize("where", ["gate_proj", "up_proj", "down_proj", "everywhere"])
def test_what_hooks_have_seen_stays_as_it_was(where):
    """Gradients are not written over activations that somebody else may have kept, and every call is seen."""
    ours, theirs = pair("llama", torch.float32)
    found = []
    for model in (ours, theirs):
        kept = []

        def keep(module, given, output, kept=kept):
            if isinstance(module, torch.nn.Linear):
                kept.append(output.detach())

        if where == "everywhere":
            hook = torch.nn.modules.module.register_module_forward_hook(keep)
        else:
            hook = getattr(model.model.layers[1].mlp, where).register_forward_hook(keep)
        loss_and_gradients(model)
        hook.remove()
        found.append(kept)
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_under_autocast_layers_are_transformers_own():
    ours, theirs = pair("llama", torch.float32)
    found = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ids = torch.arange(24).unsqueeze(0)
            model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
