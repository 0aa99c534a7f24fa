from dataclasses import replace

import pytest
import torch
from torch import nn

from qgalore.factory import OPTIMIZERS, Settings, create_optimizer, find_recipe, set_lr
from qgalore.param_groups import split_parameters


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.mlp = nn.Linear(8, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 16, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.mlp(self.embedding(ids))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_every_parameter_at_its_first_update(name, dtype):
    """Embeddings, norms and head included: the reference's per-layer mode leaves those where they are."""
    model = Model().to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = create_optimizer(name, groups=split_parameters(model), settings=Settings(lr=0.1, rank=4))
    ids = torch.arange(16)
    nn.functional.cross_entropy(model(ids).float(), ids.flip(0)).backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    torch.manual_seed(0)
    model, ids = Model(), torch.arange(16)
    optimizer = create_optimizer(name, groups=split_parameters(model), settings=Settings(lr=0.1, rank=4, beta1=None))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids), ids.flip(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_settings_reach_the_optimizer():
    settings = Settings(lr=0.3, weight_decay=0.2, beta1=0.7, beta2=0.8, rank=4, update_proj_gap=9, scale=0.5,
                        proj_type="left", subspace="svd", moments_on_refresh="keep", proj_lr=0.4, proj_reg=0.6,
                        lift="fira")  # fmt: skip
    optimizer = create_optimizer("galore_adamw", groups=split_parameters(Model()), settings=settings)
    projected, *others = optimizer.param_groups
    assert projected["proj_bits"] is None and projected["cos_threshold"] is None
    assert projected["name"] == "attention and MLP" and {group["rank"] for group in others} == {None}
    expected = dict(lr=0.3, weight_decay=0.2, betas=(0.7, 0.8), rank=4, update_proj_gap=9, scale=0.5, proj_type="left",
                    subspace="svd", moments_on_refresh="keep", proj_lr=0.4, proj_reg=0.6,
                    lift="fira")  # fmt: skip
    assert {key: projected[key] for key in expected} == expected
    assert create_optimizer("sgd", groups=split_parameters(Model()), settings=settings).defaults["momentum"] == 0.7
    assert create_optimizer("adam", groups=split_parameters(Model()), settings=settings).defaults["betas"] == (0.7, 0.8)
    adamw = create_optimizer("adamw", groups=split_parameters(Model()), settings=Settings())
    assert adamw.defaults["betas"] == (0.9, 0.999)
    lion = create_optimizer("galore_lion", groups=split_parameters(Model()), settings=Settings(rank=4))
    assert {group["betas"] for group in lion.param_groups} == {(0.9, 0.99)}
    assert {group["rule"] for group in lion.param_groups} == {"lion"}


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "adamw8bit", "galore_adamw_per_layer"])
def test_the_matrices_may_have_a_learning_rate_of_their_own(name):
    groups, settings = split_parameters(Model()), Settings(lr=0.4, matrix_lr_ratio=0.25, rank=4)
    optimizer = create_optimizer(name, groups=groups, settings=settings)
    for lr in (0.4, 0.8):
        set_lr(optimizer, lr)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates.pop("attention and MLP") == lr / 4 and set(rates.values()) == {lr}
    assert [" at 0.25 x lr" in find_recipe(name).describe(group, settings) for group in groups] == [
        group.kind == "matrix" for group in groups
    ]


def test_bits_of_moments_follow_the_name_and_the_group():
    def bits(name, **settings):
        groups = create_optimizer(name, groups=split_parameters(Model()), settings=Settings(**settings)).param_groups
        return {group["name"]: group["state_bits"] for group in groups}

    assert set(bits("galore_adamw", rank=4).values()) == {32}
    vectors = "norms and others"
    assert bits("q_galore_adamw8bit", rank=4) == {"attention and MLP": 8, "embedding": 8, "head": 8, vectors: 32}
    careful = bits("adamw8bit", embedding_state_bits=32)
    assert careful["embedding"] == careful["head"] == 32 and careful["attention and MLP"] == 8


def test_what_is_said_of_a_group_is_what_it_gets():
    projected, embedding, head, norms = split_parameters(Model())
    recipe, settings = find_recipe("q_galore_adamw8bit"), Settings(proj_bits=4, cos_threshold=0.6, rank=4)
    assert recipe.describe(projected, settings) == (
        "8-bit AdamW, rank 4 (std), INT4 orthogonal iteration every 50 updates, lazily, scale 1"
    )
    online = replace(settings, proj_type="continuous_lion", lift="fira", proj_bits=None)
    assert find_recipe("galore_adamw_per_layer").describe(projected, online) == (
        "AdamW, rank 4 (continuous_lion), online PCA by Lion, scale 1, residual recovered, "
        "micro-batches summed at full size"
    )
    random = replace(settings, proj_type="random")
    assert find_recipe("galore_adafactor").describe(projected, random) == (
        "Adafactor, rank 4 (random), INT4 random bases every 50 updates, scale 1"
    )
    assert find_recipe("lion").describe(projected, random) == "Lion, full rank"
    assert recipe.describe(embedding, settings) == "8-bit AdamW, full rank"
    assert recipe.describe(norms, settings) == "AdamW, full rank", "vectors keep float32 moments"


def test_adam8bit_couples_weight_decay_like_adam():
    """On a matrix small enough for float32 moments the two are the same."""
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    settings = Settings(lr=0.01, weight_decay=0.1)
    optimizers = [
        create_optimizer(name, groups=split_parameters(model), settings=settings)
        for name, model in (("adam8bit", ours), ("adam", theirs))
    ]
    for _ in range(10):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_names_are_found_in_any_case():
    assert find_recipe("AdamW") is OPTIMIZERS["adamw"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown optimizer 'galore_adam'. Did you mean galore_adamw\? Known: adam,"):
        find_recipe("galore_adam")
