import pytest
import torch
from torch import nn

from qgalore.param_groups import split_parameters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=True)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 12, bias=False)})
        self.norm = nn.LayerNorm(8)
        self.other = nn.Linear(8, 8, bias=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 20, bias=False)


def names_by_group(model) -> dict[str, tuple[str, ...]]:
    return {group.name: group.names for group in split_parameters(model)}


def test_every_trainable_parameter_is_owned_exactly_once():
    model = Model()
    model.layers[0].norm.bias.requires_grad_(False)
    owned = [p for group in split_parameters(model) for p in group.parameters]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(owned) == len(trainable) == len({id(p) for p in owned})
    assert {id(p) for p in owned} == {id(p) for p in trainable}
    assert sum(group.elements for group in split_parameters(model)) == sum(p.numel() for p in trainable)


def test_projected_are_the_matrices_inside_attention_and_mlp():
    groups = names_by_group(Model())
    assert groups["attention and MLP"] == tuple(
        f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    )
    assert groups["embedding"] == ("embedding.weight",)
    assert set(groups["head"]) == {"layers.0.other.weight", "layers.1.other.weight", "head.weight"}
    assert "layers.0.self_attn.q_proj.bias" in groups["norms and others"], "a bias is no matrix"
    assert [group.kind for group in split_parameters(Model())] == ["matrix", "embedding", "head", "norm"]


def test_a_tied_head_is_owned_once_as_the_embedding():
    model = Model()
    model.head.weight = model.embedding.weight
    groups = names_by_group(model)
    assert groups["embedding"] == ("embedding.weight",)
    assert "head.weight" not in groups["head"]


def test_a_frozen_model_is_refused():
    model = Model()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        split_parameters(model)


def test_groups_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        model = Model()
    assert sum(group.elements for group in split_parameters(model)) == sum(p.numel() for p in Model().parameters())


def test_the_matrices_may_be_named_one_by_one():
    """They need no name of attention or MLP; a linear layer that is not among them is a head."""
    model = Model()
    chosen = [model.layers[1].other.weight, model.layers[0].mlp.up_proj.weight]
    groups = {group.kind: set(group.names) for group in split_parameters(model, matrices=chosen)}
    assert groups["matrix"] == {"layers.1.other.weight", "layers.0.mlp.up_proj.weight"}
    assert "layers.1.mlp.up_proj.weight" in groups["head"]
